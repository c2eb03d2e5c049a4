"""What a report's numbers allow to say, in sentences that hedge as the numbers do. They read report.json alone.

Claims are of three kinds: ahead or behind at equal KL, ahead or behind at the tuned strengths, over-optimisation. They
are one family: a difference is stated where its interval leaves out 0 and its p, adjusted for all claims of the report
(Holm 1979), is below 1 - level. Otherwise "no difference can be shown", with the largest one that the interval still
holds. All else (checkpoints on the way, win rates, a judge of pairs, single strengths), and all that rests on fewer
than ENOUGH seeds, is shown with its interval and without a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.compare.phrases import (
    ENOUGH,
    Report,
    bound,
    capital,
    counted,
    decides,
    digits,
    interval,
    kl,
    kls,
    listed,
    name,
    of,
    prompts,
    share,
    side,
    trial,
    verdict,
)
from rlhf.compare.text import NO_WIN_RATE, judge_name

FEW = 5  # seeds, below which an outlier among them is hardly seen
NO_VERDICT = f"; fewer than {ENOUGH} run seeds allow no verdict on the methods"


def add_sentences(report: Report) -> Report:
    """Add to a report of `summarise` the sentences that the page, the tables and the Markdown show."""
    report["budget"]["sentence"] = budget(report)
    for entry in report["overoptimisation"]:
        entry["sentence"] = overoptimised(entry, report)
    return report | {"sentences": sentences(report)}


def sentences(report: Report) -> list[str]:
    """All that the report says, the most important first; the last two say how far it goes."""
    lines = [_decides(report), *_missing(report), *outliers(report)]
    if report["judge"] is not None:
        lines += [line for pair in report["frontier"] for line in equal_kl(pair, report)]
        lines += [tuned(row, report) for row in report["tuned"]["rows"]]
        lines += wins(report)
        lines += [overoptimised(entry, report) for entry in report["overoptimisation"] if entry["swept"] is None]
    lines += judged_pairs(report)
    if report["unit"]["samples_per_prompt"] < 2:
        lines.append(NO_WIN_RATE)
    lines.append(budget(report))
    if report["judge"] is not None:
        lines.append(power(report))
    return [*lines, scope(report)]


def _decides(report: Report) -> str:
    proxies = [name for name, kind in report["score_kinds"].items() if kind == "proxy"]
    if report["judge"] is None:
        shown = f" ({', '.join(proxies)})" if proxies else ""
        return (
            "No gold or referee score was given, so this report cannot judge which method is better. A score that a "
            f"method was trained on{shown} shows what was optimised, not what was won, and decides nothing."
        )
    rest = f"; {listed([repr(p) for p in proxies])}, which methods learn from, decides nothing" if proxies else ""
    return f"What decides is {judge_name(report)}, which no method was trained on{rest}."


def _missing(report: Report) -> list[str]:
    lines = []
    for method, entry in report["methods"].items():
        if not entry["swept_values"] and not entry["baseline"] and method != report["foundation"]["method"]:
            lines.append(f"Nothing of {name(method)} has been measured yet.")
    missing = report["missing"]
    if missing:
        shown = ", ".join(f"{trial(m['method'], m['swept'], report)} seed {m['seed']}" for m in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        verb = "trial has" if len(missing) == 1 else "trials have"
        lines.append(f"{len(missing)} {verb} not ended ({shown}{more}): what follows uses the seeds that are there.")
    for run, reason in (report["meta"] or {}).get("stopped", {}).items():
        lines.append(f"{run} was stopped by a guard ({reason}): its end is where it stopped.")
    unmeasured = [n for n in (report["meta"] or {}).get("missing", []) if n.startswith("measure/seed-")]
    if unmeasured:
        shown = ", ".join(n.removeprefix("measure/") for n in unmeasured[:4])
        more = f" and {len(unmeasured) - 4} more" if len(unmeasured) > 4 else ""
        lines.append(
            f"The experiment is not finished: {len(unmeasured)} of its measurements are missing ({shown}{more})."
        )
    for method, entry in report["tuned"]["methods"].items():
        gone = [s for s in report["methods"][method]["swept_values"] if s not in entry["swept_values"]]
        if gone:
            lines.append(
                f"{name(method)} at {report['methods'][method]['swept']} {listed([f'{s:g}' for s in gone])} lacks "
                "seeds and is left out where strengths are chosen, so that it had fewer tuning trials there."
            )
    return lines


def outliers(report: Report) -> list[str]:
    """Runs that lie far from the other seeds of their strength."""
    lines = []
    for run in report.get("outliers") or []:
        low, high = run["others"]
        lines.append(
            f"Seed {run['seed']} of {trial(run['method'], run['swept'], report)} is an outlier by "
            f"{judge_name(report)}: {run['score']:.3g}, the other seeds {low:.3g} to {high:.3g}. Intervals take the "
            "seeds to be alike and hold less often than they say where one run in ten fails."
        )
    return lines


def equal_kl(pair: dict[str, Any], report: Report) -> list[str]:
    """One pair of methods along their frontiers; where the KL ranges do not overlap, that alone."""
    a, b = name(pair["a"]), name(pair["b"])
    if not pair["seeds"]:
        return [f"{a} and {b} have no run seed in common whose trials have ended, so they are not compared."]
    if not pair["rows"]:
        ranges = [f"{name(m)} covers {kl(lo)} to {kl(hi)}" for m, (lo, hi) in pair["ranges"].items() if lo <= hi]
        known = f" ({' nats, '.join(ranges)} nats)" if len(ranges) == 2 else ""
        return [f"The KL ranges of {a} and {b} do not overlap{known}, so nothing can be said at equal KL."]
    judge, size = judge_name(report), of(pair["rows"][0]["difference"], report)
    if not decides(pair["rows"][0]["difference"]):
        sizes = listed([interval(r["difference"], sign=True) for r in pair["rows"]])
        line = f"At KL {kls(pair['rows'])} {a} differs from {b} by {sizes} by {judge} ({size}){NO_VERDICT}."
        return [line + _covered(pair), *_path(pair, report)]
    said = {r["kl"]: _said(r, pair, report) for r in pair["rows"]}
    groups = {sign: [r for r in pair["rows"] if said[r["kl"]] == sign] for sign in (1, -1, 0)}
    parts = []
    for sign, word in ((1, "ahead of"), (-1, "behind")):
        if rows := groups[sign]:
            sizes = listed([interval(r["difference"], flip=sign < 0) for r in rows])
            first = f"{a} is {word} {b}" if not parts else f"it is {word} {b}"
            parts.append(f"at KL {kls(rows)} {first} by {sizes}" + (f" by {judge} ({size})" if not parts else ""))
    if rows := groups[0]:
        hidden = f"as much as {bound(rows)} could hide in the intervals"
        where = f"at {kls(rows)}" if parts else f"at KL {kls(rows)}"
        between = "" if parts else f" between {a} and {b} by {judge} ({size})"
        sizes = listed([interval(r["difference"], sign=True) for r in rows])
        parts.append(f"{where} no difference can be shown{between}: {sizes}; {hidden}{_only_alone(rows)}")
    return [capital("; ".join(parts)) + "." + _covered(pair) + _form(pair, report), *_path(pair, report)]


def _covered(pair: dict[str, Any]) -> str:
    low, high = pair["overlap"]
    covered = "The ends of both methods' runs" if pair.get("over") == "ends" else "Both methods' checkpoints"
    rest = f" {covered} cover KL {kl(low)} to {kl(high)} nats; outside of it nothing is said."
    if pair.get("over") == "all checkpoints":
        rest += " These are checkpoints on the way, which have not spent the same."
    return rest


def _path(pair: dict[str, Any], report: Report) -> list[str]:
    """The same over all checkpoints of the runs, which have not spent the same: shown, not judged."""
    path = pair.get("path")
    if not path or not path["rows"]:
        return []
    sizes = listed([interval(row["difference"], sign=True) for row in path["rows"]])
    low, high = path["overlap"]
    return [
        f"Over all checkpoints on the way, which have not spent the same, from KL {kl(low)} to {kl(high)} nats: "
        f"{name(pair['a'])} over {name(pair['b'])} at KL {kls(path['rows'])}: {sizes}, without a verdict."
    ]


def _said(row: dict[str, Any], pair: dict[str, Any], report: Report) -> int:
    """What may be said of a row: its verdict, but nothing where lines from point to point lie on the other side."""
    lines = {r["kl"]: r["difference"]["estimate"] for r in pair.get("sensitivity") or []}
    where = verdict(row, report)
    return where if lines.get(row["kl"], where) * where > 0 else 0


def _only_alone(rows: Sequence[dict[str, Any]]) -> str:
    """A remark where an interval leaves out 0 and the correction for the number of comparisons does not."""
    alone = [r for r in rows if side(r["difference"]) != 0]
    if not alone:
        return ""
    return f" (at {kls(alone)} the interval leaves out 0, but not after correcting for the number of comparisons)"


def _form(pair: dict[str, Any], report: Report) -> str:
    """A remark where lines from point to point would not show what the fitted curve shows."""
    lines = {row["kl"]: side(row["difference"]) for row in pair.get("sensitivity") or []}
    rows = [r for r in pair["rows"] if verdict(r, report) not in (0, lines.get(r["kl"], verdict(r, report)))]
    against = [r for r in rows if not _said(r, pair, report)]
    rows = [r for r in rows if r not in against]
    text = ""
    if rows:
        text = f" At KL {kls(rows)} this rests on the form of the curve: lines from point to point do not show it."
    if against:
        text += f" At KL {kls(against)} the curve shows a difference that lines from point to point contradict."
    return text


def tuned(row: dict[str, Any], report: Report) -> str:
    """Two methods, each at its best strength, or one over the foundation."""
    methods, judge = report["tuned"]["methods"], judge_name(report)
    d, where = row["difference"], verdict(row, report)
    sides = [_chosen(m, methods, report) for m in (row["a"], row["b"])]
    against_foundation = row["b"] == report["foundation"]["method"]
    ending = "" if against_foundation else " This is not a comparison at equal KL."
    opening = "At the strength" if against_foundation else "Each at the strength"
    opening += " that did best on other prompts" + (" and seeds" if (d["seeds"] or 0) >= ENOUGH else "")
    tried = [report["methods"].get(m, {}).get("swept_values") or [] for m in (row["a"], row["b"])]
    if max(map(len, tried)) == 1:
        opening = "At the end of its runs" if against_foundation else "Each at the end of its runs"
    if not decides(d):
        return (
            f"{opening}, {sides[0]} differs from {sides[1]} by {interval(d, sign=True)} by {judge} "
            f"({of(d, report)}){NO_VERDICT}.{ending}"
        )
    if where == 0:
        alone = ". Alone the interval would show one; beside this report's other claims it does not" if side(d) else ""
        return (
            f"{opening}, no difference can be shown between {sides[0]} and {sides[1]} by {judge}: "
            f"{interval(d, sign=True)} ({of(d, report)}); as much as {bound([row])} could hide{alone}.{ending}"
        )
    word = "ahead of" if where > 0 else "behind"
    size = interval(d, flip=where < 0)
    return f"{opening}, {sides[0]} is {word} {sides[1]} by {size} by {judge} ({of(d, report)}).{ending}"


def _chosen(method: str, methods: dict[str, Any], report: Report) -> str:
    """PPO (kl_coef 0.05, KL 8.1 nats); all strengths that were chosen."""
    if method not in methods:
        return name(method)
    entry = methods[method]
    shares = sorted(entry["shares"], key=lambda s: -entry["shares"][s])
    option = report["methods"][method]["swept"]
    swept_values = " or ".join(f"{float(s):g}" for s in shares if s != "None")
    setting = f"{option} {swept_values}, " if swept_values else ""
    return f"{name(method)} ({setting}KL {kl(entry['kl']['estimate'])} nats)"


def wins(report: Report) -> list[str]:
    """Win rates among the foundation and each method at its tuned strength, raw and with length held equal: shares with
    their intervals, without a verdict, which `tuned` has."""
    table = report["wins"]
    if not table:
        return []
    usual = {m: e["usual"] for m, e in report["tuned"]["methods"].items()}
    shown = [i for i, p in enumerate(table["policies"]) if p["swept"] is None or usual.get(p["method"]) == p["swept"]]
    lines = []
    for x, i in enumerate(shown):
        for j in shown[:x]:
            a, b = (i, j) if table["policies"][j]["swept"] is None else (j, i)
            if table["raw"][a][b] is not None:
                lines.append(_win(a, b, table, report))
    return lines


def _win(i: int, j: int, table: dict[str, Any], report: Report) -> str:
    raw, held = table["raw"][i][j], table["controlled"][i][j]
    a, b = (trial(table["policies"][k]["method"], table["policies"][k]["swept"], report) for k in (i, j))
    line = f"{a} wins {share(raw)} of its comparisons with {b}, ties half ({of(raw, report)})"
    if any(len(_tried(table["policies"][k], report)) > 1 for k in (i, j)):
        line += " (a strength that was chosen on these prompts, which favours it a little)"
    length = (table.get("length_difference") or {i: {j: None}})[i][j]
    if length is not None and round(abs(length), 1):
        line += f"; its answers are {abs(length):.1f} tokens {'longer' if length > 0 else 'shorter'}"
    if held is None:
        return line + "."
    line += f"; with the length of the answers held equal {share(held)}"
    if side(raw, 0.5) and side(held, 0.5) != side(raw, 0.5):
        return line + ", so the length may make the difference."
    return line + "."


def _tried(policy: dict[str, Any], report: Report) -> list[float]:
    return report["methods"].get(policy["method"], {}).get("swept_values") or []


def judged_pairs(report: Report) -> list[str]:
    """What a judge of pairs says, where one was asked: shares with their intervals, without a verdict."""
    asked = report.get("judge_of_pairs") or {"rows": [], "name": ""}
    lines = []
    for row in asked["rows"]:
        rate = row["raw"]
        line = f"By the judge of pairs {asked['name']} {name(row['a'])} wins {share(rate)} of its comparisons with "
        line += f"{name(row['b'])}, ties half ({of(rate, report)})"
        if row["consistency"] is not None:
            line += f"; it names the same winner in both orders in {100 * row['consistency']:.0f} % of the pairs"
        lines.append(line + ".")
    return lines


def overoptimised(entry: dict[str, Any], report: Report) -> str:
    """Whether the proxy rises where the judge falls, for one method along its points."""
    judge, fall, proxy = judge_name(report), entry["judge"], entry["proxy"]
    along = "along all its points" if entry["swept"] is None else "along its checkpoints"
    start = f"Over-optimisation of {trial(entry['method'], entry['swept'], report)}, {along}"
    start += f": {entry['verdict']}. " if entry["verdict"] else ", without a verdict. "
    end, peak = kl(entry["end"]["kl"]), kl(entry["peak"]["kl"])
    if entry["ends_at_peak"] == 1.0:
        return (
            start + f"{capital(judge)} is highest at the largest KL ({end} nats): within this range no fall was found."
        )
    at = f"near KL {peak} nats" if entry["peak"]["kl"] else "the foundation itself"
    where = f"from {judge}'s peak ({at}) to the largest KL ({end} nats)"
    change = f"{judge} changes by {interval(fall, sign=True)}"
    line = f"{capital(where)} {change} ({of(fall, report)})"
    if proxy:
        whose = "" if proxy["optimised"] else f", which {name(entry['method'])} does not learn from,"
        line += f" and the proxy '{proxy['name']}'{whose} by {interval(proxy['change'], sign=True)}"
    if not (proxy and proxy["optimised"]):
        line += f"; at the peak it is {interval(entry['rise'], sign=True)} over {name(report['foundation']['method'])}"
    line += "."
    if entry["verdict"] == "undecided" and fall["low"] is not None and side(fall) >= 0:
        line += f" A fall of up to {digits(abs(min(fall['low'], 0.0)), fall)} could hide."
    if entry["verdict"] == "not reproduced" and side(fall) < 0:
        optimised = bool(proxy) and proxy["optimised"]
        line += " The proxy falls with the judge." if optimised else f" {capital(judge)} falls without having risen."
    return start + line


def budget(report: Report) -> str:
    """Whether what was spent is equal, with and without what the trials share, and how often each was tried."""
    entry, methods = report["budget"], report["methods"]
    tries = {name(m): e["trials"] for m, e in methods.items() if e["trials"] and not e["baseline"]}
    counts = sorted(set(tries.values()))
    if len(counts) == 1:
        trials = f"Each method had {counted(counts[0], 'tuning trial')} (its strengths)."
    else:
        shown = ", ".join(f"{m} {n}" for m, n in tries.items()) or "none has ended"
        trials = f"The methods had unequal numbers of tuning trials ({shown}); more tries find a better one by luck."
    rows = [r for r in entry["rows"] if not r["baseline"] and r["ratio"] is not None]
    if not entry["match"]:
        return f"Budgets were not matched, so a difference may come from what was spent. {trials}"
    counter = entry["match"]["match"].replace("_", " ")
    if not rows or entry["matched"] is None:
        return f"Budgets were to be matched in {counter}, but nothing can be said of them yet. {trials}"
    parts = listed([_spent(m, [r for r in rows if r["method"] == m]) for m in dict.fromkeys(r["method"] for r in rows)])
    word = "are matched" if entry["matched"] else "are not matched"
    rest = "" if entry["matched"] else ", so a difference may come from what was spent"
    return (
        f"Budgets {word} in {counter} (within {100 * entry['match']['tolerance']:g} %) from the foundation on, pairs "
        f"and reward model counted in full{rest}: {parts}. {trials}"
    )


def _spent(method: str, rows: Sequence[dict[str, Any]]) -> str:
    def span(key: str) -> str:
        low, high = min(100 * r[key] for r in rows), max(100 * r[key] for r in rows)
        return f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"

    return f"{name(method)} used {span('ratio')} % of it ({span('ratio_own')} % without them)"


def power(report: Report) -> str:
    """What this experiment could have seen."""
    entry = report["power"]
    line = (
        f"Power: {entry['pairs_needed']} independent comparisons are needed to see a win rate of "
        f"{100 * entry['win_rate']:g} % in 4 of 5 repeats."
    )
    trained = {m for m, e in report["methods"].items() if not e["baseline"]}
    for row in report["tuned"]["rows"]:
        if {row["a"], row["b"]} <= trained - {report["foundation"]["method"]} and row.get(
            "minimum_detectable_effect"
        ) is not None:
            d = row["difference"]
            line += (
                f" A difference between {name(row['a'])} and {name(row['b'])} at their tuned strengths would be seen "
                f"that often here, before correcting for the number of comparisons, if it were "
                f"{digits(row['minimum_detectable_effect'], d)} or more ({of(d, report)}"
            )
            if ends := row.get("minimum_detectable_effect_range"):
                shown = " to ".join(digits(x, d) for x in ends)
                line += f"; the spread that was measured leaves open from where: {shown}"
            line += ")"
            if more := row.get("seeds_for_half"):
                low, high = row["seeds_for_half_range"]
                line += f"; one of half that size needs about {more} run seeds ({low} to {high or 'any number'})"
            line += "."
    return line


def scope(report: Report) -> str:
    """For whom all of this holds."""
    unit = report["unit"]
    seeds, over = len(unit["seeds"]), prompts(unit["groups"], unit)
    samples = counted(unit["samples_per_prompt"], "sample")
    if report["scope"] == "models":
        return (
            f"All of this holds for these trained models, not for the methods: a method has fewer than {ENOUGH} run "
            f"seeds. The intervals are {100 * unit['level']:g} % over {over} ({samples} each) and do not hold the "
            "spread between runs."
        )
    few = f" {seeds} seeds can hardly show that one of them is an outlier." if seeds < FEW else ""
    return (
        f"Intervals are {100 * unit['level']:g} % over {counted(seeds, 'run seed')} and {over} ({samples} each), both "
        f"drawn at random: they speak of the methods on this foundation, these data and prompts like these.{few}"
    )
