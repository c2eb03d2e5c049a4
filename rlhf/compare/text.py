"""The words of a comparison: what its numbers allow to say, and report.md."""

from __future__ import annotations

import html
import re
from typing import Any

from rlhf.data.annotator_report import annotators_markdown

Number = dict[str, Any]  # Interval.to_dict()
NO_WIN_RATE = (
    "No win rate is given where all answers share their sampling noise: it takes two of each policy to each prompt "
    "(samples_per_prompt: 2)."
)


def verdict(report: dict[str, Any]) -> list[str]:
    """Sentences that say no more than the intervals do; the last gives their scope."""
    judge, reference = report["judge"], report["reference"]
    lines = []
    if judge is None:
        lines.append(
            "No gold or referee score was given, so this report cannot judge which policy is better: the scores below "
            "are ones that a run may have trained on."
        )
    else:
        name = judge_name(report)
        pairs = sorted(report["pairs"], key=lambda p: p["b"] == reference)  # methods against each other first
        lines += [_compare(pair, name, report) for pair in pairs]
        lines += [line for policy in list(report["policies"])[1:] if (line := _overoptimised(policy, report))]
    lines.append(_scope(report))
    return lines


def _compare(pair: dict[str, Any], judge: str, report: dict[str, Any]) -> str:
    a, b, difference, wins = pair["a"], pair["b"], pair["difference"], pair["win_rate"]
    numbers = signed(difference)
    numbers += f"; {a} wins {percent(wins)} of the comparisons, ties half" if wins else ""
    if difference["low"] is None:
        return f"Between {a} and {b} nothing can be shown by {judge}: with one group there is no interval ({numbers})."
    if not enough_groups(report):
        return f"Between {a} and {b} there is no verdict by {judge}: {too_few(report)} ({numbers})."
    if difference["low"] > 0:
        line = f"{a} is better than {b} by {judge}: {numbers}."
    elif difference["high"] < 0:
        line = f"{a} is worse than {b} by {judge}: {numbers}."
    else:
        line = f"Between {a} and {b} no difference can be shown by {judge}: {numbers}."
    opposite = wins and (
        (difference["low"] > 0 and wins["high"] < 0.5) or (difference["high"] < 0 and wins["low"] > 0.5)
    )
    if opposite:
        line += " Mean and win rate disagree: a few comparisons decide the mean."
    kl = pair["kl_difference"]
    if b != report["reference"] and (kl["low"] > 0 or kl["high"] < 0):
        kls = [report["policies"][p]["kl"]["estimate"] for p in (a, b)]
        line += (
            f" They stand at different distances from {report['reference']} (KL {kls[0]:.2f} and {kls[1]:.2f} nats), "
            "so this is not a comparison at equal KL."
        )
    return line


def _overoptimised(policy: str, report: dict[str, Any]) -> str | None:
    """The sign of an exploited proxy: it rose, the judge fell."""
    scores = report["policies"][policy]["scores"]
    judged = scores[report["judge"]]["difference"]
    if judged["high"] is None or judged["high"] >= 0 or not enough_groups(report):
        return None
    risen = [n for n, k in report["score_kinds"].items() if k == "proxy" and scores[n]["difference"]["low"] > 0]
    if not risen:
        return None
    return (
        f"{policy} raised its proxy ({', '.join(risen)}) while {judge_name(report)} fell: the proxy was over-optimised."
    )


def enough_groups(report: dict[str, Any]) -> bool:
    """Whether there are as many groups as a verdict needs."""
    return report["unit"]["groups"] >= report["unit"]["min_groups"]


def too_few(report: dict[str, Any]) -> str:
    return f"{report['unit']['groups']} groups are too few, a verdict needs {report['unit']['min_groups']}"


def _scope(report: dict[str, Any]) -> str:
    unit = report["unit"]
    per_prompt = sorted(set(unit["samples_per_prompt"].values()))
    samples = " to ".join(f"{n:g}" for n in (per_prompt if len(per_prompt) < 2 else (per_prompt[0], per_prompt[-1])))
    text = (
        f"Intervals are 95 % over {unit['groups']} groups ({unit['prompts']} prompts, {samples} "
        f"{'sample' if samples == '1' else 'samples'} each). "
    )
    if report["judge"] is not None and any(pair["win_rate"] is None for pair in report["pairs"]):
        text += f"{NO_WIN_RATE} "
    seeds = report["meta"].get("seeds", {}).get("run", [])
    seeds = seeds if isinstance(seeds, list) else [seeds]
    if len(set(seeds)) > 1:
        shown = ", ".join(map(str, sorted(set(seeds))))
        return text + f"Run seeds {shown}; the intervals do not hold the spread between runs."
    one = f"one run seed ({seeds[0]})" if seeds else "run seeds not given"
    return text + f"All of this holds for these trained models, not for the method: {one}."


def judge_name(report: dict[str, Any]) -> str:
    """'the gold score', or with its name if that says more."""
    judge, kind = report["judge"], report["score_kinds"][report["judge"]]
    return f"the {kind} score" + ("" if judge == kind else f" '{judge}'")


def policy_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: one row for each policy."""
    judge, reference = report["judge"], report["reference"]
    header = ["policy", f"KL to {reference} ± SE", "length", "ended", "distinct-2"]
    if judge is not None:
        header[1:1] = [f"{_titled(judge, report)} [95 %]", f"over {reference} [95 %]", f"wins over {reference} [95 %]"]
    else:
        header[1:1] = [
            _titled(name, report) + " [95 %]" for name, kind in report["score_kinds"].items() if kind == "proxy"
        ]
    against = {pair["a"]: pair for pair in report["pairs"] if pair["b"] == reference}
    rows = []
    for name, policy in report["policies"].items():
        row = [name]
        if judge is not None:
            pair = against.get(name)
            row.append(plain(policy["scores"][judge]["mean"]))
            row += [signed(pair["difference"]), percent(pair["win_rate"])] if pair else ["–", "–"]
        else:
            row += [plain(policy["scores"][n]["mean"]) for n, kind in report["score_kinds"].items() if kind == "proxy"]
        se = policy["kl"]["se"]
        row.append(number(policy["kl"]["estimate"]) + (f" ± {number(se)}" if se is not None else ""))
        row += [f"{policy['length']:.1f}", f"{100 * policy['ended']:.1f} %", f"{policy['distinct']:.3f}"]
        rows.append(row)
    return header, rows


def pair_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: each trained policy over each other (those over the reference stand with the policies)."""
    pairs = [pair for pair in report["pairs"] if pair["b"] != report["reference"]]
    header = ["comparison", "KL difference [95 %]"]
    if report["judge"] is not None:
        header[1:1] = [f"{_titled(report['judge'], report)} difference [95 %]", "win rate [95 %]"]
    rows = []
    for pair in pairs:
        row = [f"{pair['a']} over {pair['b']}"]
        if report["judge"] is not None:
            row += [signed(pair["difference"]), percent(pair["win_rate"])]
        rows.append([*row, signed(pair["kl_difference"])])
    return header, rows


def markdown(report: dict[str, Any]) -> str:
    """report.md."""
    names = list(report["policies"])
    lines = [f"# {', '.join(names[1:]) or 'nothing'} against {names[0]}", ""]
    lines += [f"- {line}" for line in report["verdict"]]
    lines += ["", "![score against KL](frontier.png)", "", "## Policies", "", *table(*policy_rows(report))]
    header, rows = pair_rows(report)
    if rows:
        lines += ["", "## Methods against each other", "", *table(header, rows)]
    lines += ["", "## All scores", "", *table(*_score_rows(report)), "", "![differences of all scores](scores.png)"]
    lines += ["", "A **proxy** is a score that a run was trained on: it shows what was optimised, not what was won."]
    if report["meta"].get("annotators"):
        lines += ["", "## Annotators", "", *annotators_markdown(report["meta"]["annotators"])]
    lines += ["", "## Cost", "", *_cost(report), "", "## Samples", ""]
    lines += [f"The {len(report['samples'])} prompts whose hash comes first; the first sample of each policy.", ""]
    for sample in report["samples"]:
        lines += _sample(sample)
    lines += ["## How this was measured", "", *_method(report)]
    return "\n".join(lines).rstrip() + "\n"


def _score_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = list(report["policies"])
    header = ["score", *(f"{n} [95 %]" for n in names), *(f"{n} over {names[0]} [95 %]" for n in names[1:])]
    rows = []
    for score, kind in report["score_kinds"].items():
        marks = [*(["judge"] if score == report["judge"] else []), *([kind] if kind not in ("other", score) else [])]
        mark = score + (f" ({', '.join(marks)})" if marks else "").replace("proxy", "**proxy**")
        entries = [report["policies"][n]["scores"][score] for n in names]
        rows.append([mark, *(plain(e["mean"]) for e in entries), *(signed(e["difference"]) for e in entries[1:])])
    return header, rows


def _cost(report: dict[str, Any]) -> list[str]:
    budgets = report["meta"].get("budgets") or {}
    if not budgets:
        return ["No budgets were recorded."]
    counters = list(dict.fromkeys(counter for budget in budgets.values() for counter in budget))
    rows = [[name, *(count(budget.get(counter)) for counter in counters)] for name, budget in budgets.items()]
    return table(["run", *(counter.replace("_", " ") for counter in counters)], rows)


def _sample(sample: dict[str, Any]) -> list[str]:
    prompt = sample["prompt"]
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    lines = [f"> **{m['role']}**: {escape(m['content'])}" + "  " for m in messages]
    header, row, marks = [], [], []
    for name, response in sample["responses"].items():
        header.append(name)
        row.append(escape(response["response"]) + ("" if response["ended"] else " *(cut off)*"))
        marks.append("<br>".join(f"{n} {number(v)}" for n, v in {**response["scores"], "KL": response["kl"]}.items()))
    return [*lines, "", *table(header, [row, marks], "---"), ""]


def _method(report: dict[str, Any]) -> list[str]:
    unit, meta = report["unit"], report["meta"]
    lines = [
        f"- Unit: the group, {unit['groups']} of them with {unit['prompts']} prompts. Samples are averaged within the "
        "prompt, prompts within the group.",
        "- Intervals: 95 %, Student's t over the means of groups, differences paired by group; of win rates Wilson's "
        "with that t. Not corrected for the number of comparisons.",
        "- Win rate: at each prompt each sample of the one against those of the other that do not share its sampling "
        f"noise, ties half (a tie: at most {unit['tie_margin']:g} apart).",
        f"- KL: log p - log p of {report['reference']} summed over the response's tokens, nats; SE clustered by group.",
    ]
    for key in ("sampling", "seeds", "fingerprints"):
        known = {k: v for k, v in meta.get(key, {}).items() if v not in ([], {}, None)}
        if known:
            lines.append(f"- {key.capitalize()}: " + "; ".join(f"{k} {_inline(v)}" for k, v in known.items()) + ".")
    lines.append("- Everything above with all digits, and the resolved options of each run: `report.json`.")
    return lines


def table(header: list[str], rows: list[list[str]], align: str = "---:") -> list[str]:
    """A Markdown table, numbers to the right."""
    align = ["---"] + [align] * (len(header) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in [header, align, *rows]]


def _titled(name: str, report: dict[str, Any]) -> str:
    kind = report["score_kinds"][name]
    return name if kind in ("other", name) else f"{name} ({kind})"


def _inline(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def number(x: float) -> str:
    """About three significant digits, at most three decimals."""
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.2f}" if abs(x) < 100 else f"{x:.1f}"


def plain(n: Number) -> str:
    return number(n["estimate"]) + ("" if n["low"] is None else f" [{number(n['low'])}, {number(n['high'])}]")


def signed(n: Number) -> str:
    sign = "+" if n["estimate"] >= 0 else ""
    return sign + plain(n)


def percent(n: Number | None) -> str:
    if n is None:
        return "–"
    interval = "" if n["low"] is None else f" [{100 * n['low']:.1f}, {100 * n['high']:.1f}]"
    return f"{100 * n['estimate']:.1f} %{interval}"


def count(x: float | None) -> str:
    """1234567 -> 1.23M; above 1e15 (flops) in powers of ten."""
    if x is None:
        return "–"
    for limit, letter in ((1e15, ""), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit:
            return f"{x / limit:.3g}{letter}" if letter else f"{x:.2e}"
    return f"{x:.4g}"


def escape(text: str) -> str:
    """Sampled text for a Markdown table cell: shown as it is, on one line."""
    text = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"\r?\n", "<br>", text)
