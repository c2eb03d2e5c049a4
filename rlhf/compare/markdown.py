"""report.md: what can be said, how to read it, and the tables it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.compare.phrases import Report, interval, kl, name, share, trial
from rlhf.compare.text import count, escape, number, table

PROGRAMS = {
    "ppo": "samples answers, has a reward model score them and moves towards higher scores (reinforcement learning)",
    "dpo": "learns from the preference pairs directly, without a reward model and without sampling",
    "best_of_n": "trains nothing: it samples n answers of the foundation and keeps the one that the reward model "
    "scores highest; its KL is log n - (n - 1) / n",
}


def markdown(report: Report, figures: Sequence[str] = ()) -> str:
    """report.md; figures: names of the PNG files beside it (without .png), shown after the sentences."""
    lines = [f"# {report['name']}", "", *(f"- {line}" for line in report["sentences"]), ""]
    lines += [f"![{figure.replace('_', ' ')}]({figure}.png)\n" for figure in figures]
    lines += ["## How to read this", "", *explained(report), ""]
    for title, (header, rows) in (
        ("At equal KL", equal_kl_rows(report)),
        ("At the best strength", tuned_rows(report)),
        ("Wins over the foundation", win_rows(report)),
        ("By the judge of pairs, asked in both orders", judge_rows(report)),
        ("Over-optimisation", sign_rows(report)),
        ("Policies", policy_rows(report)),
        ("What it cost", budget_rows(report)),
    ):
        if rows:
            lines += [f"## {title}", "", *table(header, rows), ""]
    lines += ["A **proxy** is a score that methods learn from: it shows what was optimised, not what was won.", ""]
    lines += ["## Samples", "", "The prompts whose hash comes first: nobody picked them.", ""]
    for sample in report["samples"]:
        lines += _sample(sample)
    lines += ["## To repeat it", "", "Configurations, commits, versions and all digits are in `report.json`."]
    return "\n".join(lines).rstrip() + "\n"


def explained(report: Report) -> list[str]:
    """The words of the report, for a reader who knows no method."""
    initial = name(report["foundation"]["method"])
    lines = [f"- All methods start from the same model, {initial}, the foundation."]
    for method, entry in report["methods"].items():
        if entry["program"] in PROGRAMS:
            line = f"- **{name(method)}** {PROGRAMS[entry['program']]}. "
            option = entry["swept"]
            if entry["program"] != "best_of_n":
                line += f"`{option}` sets how strongly it is held to the foundation."
            lines.append(line.rstrip())
    lines += [
        f"- **KL**, in nats, is how far a policy has moved from {initial}: 0 is no change. Going further can win "
        "more and costs more of what the foundation knew, so methods are compared at the same KL.",
        "- Numbers in brackets are intervals: the truth lies inside in 95 of 100 such experiments. Where an interval "
        "holds 0, the data do not say which side is better; that is not the same as equal.",
        "- Each method was tried at several strengths. The best one is chosen on some of the prompts and judged on the "
        "others, since a winner looks too good on the data that chose it.",
        f"- Scores with a sign are differences to {initial}; its own stand without.",
        "- p is adjusted for all that the report claims in words (Holm 1979); what has no p is shown, not claimed.",
    ]
    return lines


def equal_kl_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    header = [
        "comparison",
        "KL, nats",
        "difference [95 %]",
        "lines instead of the curve",
        "p adjusted",
        "would be seen",
    ]
    rows = []
    for pair in report["frontier"]:
        lines = {row["kl"]: row["difference"] for row in pair.get("sensitivity") or []}
        for row in pair["rows"]:
            other = interval(lines[row["kl"]], sign=True) if row["kl"] in lines else "–"
            rows.append([f"{name(pair['a'])} over {name(pair['b'])}", kl(row["kl"]), *_difference(row, other)])
    return header, rows


def tuned_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    header = ["comparison", "strengths chosen", "difference [95 %]", "p adjusted", "would be seen"]
    rows = []
    for row in report["tuned"]["rows"]:
        chosen = [report["tuned"]["methods"].get(m, {}).get("shares", {}) for m in (row["a"], row["b"])]
        shown = " against ".join(", ".join(f"{float(s):g}" for s in c if s != "None") or "–" for c in chosen)
        rows.append([f"{name(row['a'])} over {name(row['b'])}", shown, *_difference(row)])
    return header, rows


def _difference(row: dict[str, Any], *between: str) -> list[str]:
    return [
        interval(row["difference"], sign=True),
        *between,
        _p(row.get("p_adjusted")),
        _number(row.get("minimum_detectable_effect")),
    ]


def win_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    wins = report["wins"] or {"policies": []}
    base = name(report["foundation"]["method"])
    header = ["policy", f"wins over {base} [95 %]", "at equal length [95 %]"]
    rows = []
    for i, policy in enumerate(wins["policies"]):
        if policy["swept"] is not None and wins["raw"][i][0] is not None:
            cells = [share(n) if n else "–" for n in (wins["raw"][i][0], wins["controlled"][i][0])]
            rows.append([trial(policy["method"], policy["swept"], report), *cells])
    return header, rows


def judge_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """What a judge of pairs said, where one was asked."""
    rows = []
    for row in (report.get("judge_of_pairs") or {"rows": []})["rows"]:
        agrees = row.get("consistency")
        shown = [f"{100 * x:.1f} %" if x is not None else "–" for x in (row.get("ties"), agrees)]
        rows.append([f"{name(row['a'])} over {name(row['b'])}", _rate(row["raw"]), _rate(row["controlled"]), *shown])
    return ["meeting", "wins [95 %]", "at equal length [95 %]", "ties", "same winner in both orders"], rows


def _rate(estimate: dict[str, Any] | None) -> str:
    return "–" if not estimate or estimate["estimate"] is None else share(estimate)


def sign_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    header = ["method", "peak, KL", "largest KL", "judge, peak to end [95 %]", "proxy [95 %]", "p adjusted", "verdict"]
    rows = []
    for e in report["overoptimisation"]:
        proxy = f"{e['proxy']['name']} {interval(e['proxy']['change'], sign=True)}" if e["proxy"] else "–"
        cells = [kl(e["peak"]["kl"]), kl(e["end"]["kl"]), interval(e["judge"], sign=True), proxy, _p(e["p_adjusted"])]
        rows.append([trial(e["method"], e["swept"], report), *cells, e["verdict"] or "–"])
    return header, rows


def policy_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """The ends of all trials: each score over the foundation, KL, shape and what was forgotten."""
    scores, kinds = list(report["score_kinds"]), report["score_kinds"]
    ends = [p for p in report["points"] if p["last"]]
    numbers = list(dict.fromkeys(n for p in [report["foundation"], *ends] for n in p["numbers"]))
    titles = [n + {"proxy": " (**proxy**)"}.get(kinds[n], " (judge)" if n == report["judge"] else "") for n in scores]
    header = [
        "policy",
        "seeds",
        "KL",
        *titles,
        "length",
        "ended",
        "repetition",
        *(n.replace("_", "-") for n in numbers),
    ]
    rows = []
    for p in [report["foundation"], *ends]:
        first = trial(p["method"], p.get("swept"), report)
        row = [first, str(len(p["seeds"])) if "seeds" in p else "–", _short(p["kl"])]
        for n in scores:
            found = p["scores"].get(n)
            shown = found and (found["difference"] or found["mean"])
            row.append("–" if not shown else interval(shown, sign=bool(found["difference"])))
        row += [_short(p[n]) for n in ("length", "ended", "repetition")]
        rows.append([*row, *(_number(p["numbers"].get(n)) for n in numbers)])
    return header, rows


def budget_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """The trial alone and in all, for each counter."""
    entry = report["budget"]
    counters = list(dict.fromkeys(c for r in entry["rows"] for c in r["total"]))
    header = ["trial", *(f"{c.replace('_', ' ')}: own / in all" for c in counters), "of the matched budget"]
    rows = []
    for r in entry["rows"]:
        cells = [f"{count(r['own'].get(c, 0))} / {count(r['total'].get(c))}" for c in counters]
        ratio = "–" if r["ratio"] is None else f"{100 * r['ratio']:.0f} % ({100 * r['ratio_own']:.0f} % own)"
        rows.append([trial(r["method"], r["swept"], report), *cells, ratio])
    return header, rows


def _sample(sample: dict[str, Any]) -> list[str]:
    prompt = sample["prompt"]
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    lines = [f"> **{m['role']}**: {escape(m['content'])}  " for m in messages]
    header, answers, marks = [], [], []
    for label, r in sample["responses"].items():
        header.append(label)
        answers.append(escape(r["response"]) + ("" if r["ended"] else " *(cut off)*"))
        values = {**r["scores"], "KL": r["kl"], "length": r["length"]}
        marks.append("<br>".join(f"{n} {number(v)}" for n, v in values.items() if v is not None))
    return [*lines, "", *table(header, [answers, marks], "---"), ""] if header else [*lines, ""]


def _p(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _number(x: float | None) -> str:
    return "–" if x is None else number(x)


def _short(n: dict[str, Any] | None) -> str:
    return "–" if n is None else number(n["estimate"])
