"""The report as one self-contained HTML page: no script, no other host; the figures are inside it.

What models wrote is shown as text: jinja escapes everything, and the page forbids itself scripts and requests.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.compare.drawing import complete, main_score, methods_of, number, paths_of, score_label, trained_of
from rlhf.compare.markdown import (
    budget_rows,
    equal_kl_rows,
    explained,
    judge_rows,
    policy_rows,
    sign_rows,
    tuned_rows,
    win_rows,
)
from rlhf.compare.phrases import Report, counted, interval, kl, name, share, trial
from rlhf.compare.text import number as rounded
from rlhf.compare.words import equal_kl
from rlhf.files import dumps

Table = dict[str, Any]  # id, title, header, rows
TITLES = {
    "frontier": "score against distance",
    "proxy_gold": "proxy against gold",
    "wins": "win matrix",
    "time": "scores in time",
    "lengths": "lengths",
    "cost": "cost",
}


def page(report: Report, figures: Mapping[str, str | Path]) -> str:
    """The page of report.json's dict; figures: name -> PNG, as `rlhf.compare.figures.draw` returns them."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    report = complete(report)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(rounded=rounded, markup=_parts)
    return environment.get_template("report.html.j2").render(
        title=_title(report),
        report=report,
        facts=_facts(report),
        lead=(lead := _lead(report)),
        rest=[line for line in report["sentences"] if line not in lead],
        explained=explained(report),
        figures={key: _figure(report, key, Path(path)) for key, path in figures.items()},
        tables={table["id"]: table for table in _tables(report) if table["rows"]},
        samples=[_sample(sample, report) for sample in report["samples"]],
        meta=_meta(report["meta"]),
    )


def _title(report: Report) -> str:
    return " against ".join(name(m) for m in trained_of(report) or methods_of(report)) or "Comparison"


def _facts(report: Report) -> list[tuple[str, str, str]]:
    """(what, value, remark) in the tiles under the title."""
    unit, judge = report["unit"], report["judge"]
    kind = report["score_kinds"].get(judge)
    why = {"gold": "the true reward, never shown to training", "referee": "a reward model that no method has seen"}
    seeds, groups = len(unit["seeds"]), unit["groups"]
    speaks = "speaks of the methods" if report["scope"] == "method" else "speaks of these trained models only"
    facts = [
        ("What decides", score_label(report, judge) if judge else "nothing", why.get(kind, "no gold or referee score")),
        ("Run seeds", str(seeds), speaks),
        (
            "Test prompts",
            str(unit["prompts"]),
            f"{counted(groups, 'group')}, {unit['samples_per_prompt']} answers each",
        ),
    ]
    match, matched = report["budget"]["match"], report["budget"]["matched"]
    if match:
        word = {True: "matched", False: "not matched", None: "not known yet"}[matched]
        facts.append(("Budgets", word, f"{match['match'].replace('_', ' ')}, within {100 * match['tolerance']:g} %"))
    else:
        facts.append(("Budgets", "not matched", "none was set"))
    return facts


def _lead(report: Report) -> list[str]:
    """The sentences that answer the question, the differences at equal KL; without them the first one."""
    found = [line for pair in report["frontier"] for line in equal_kl(pair, report)]
    return [line for line in report["sentences"] if line in found] or report["sentences"][:1]


def _figure(report: Report, key: str, path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])  # of the PNG's header
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"uri": uri, "width": width, "height": height, "title": TITLES.get(key, key), "alt": _alt(report, key)}


def _alt(report: Report, key: str) -> str:
    """What the figure shows, in numbers, for those who do not see it."""
    methods = [name(m) for m in methods_of(report)]
    score = main_score(report)
    label = score_label(report, score) if score else "score"
    start = {
        "frontier": f"Scatter plot: {label} over the foundation against KL.",
        "proxy_gold": "Line plots, a row a method: proxy against KL, judge against KL, judge against proxy.",
        "wins": "Heat map: how often the row's policy beats the column's, in per cent.",
        "time": "Line plots: every score over the foundation by training step, a column a method.",
        "lengths": "Scatter plots against KL: tokens in a response, and the share of responses that end.",
        "cost": "Stacked bars: what each method cost, its own runs, the reward model and the pairs.",
    }.get(key, key)
    if key not in ("frontier", "time") or score is None:
        return f"{start} Methods: {', '.join(methods)}. The numbers stand in the tables of this page."
    parts = []
    for method in methods_of(report):
        points = [p for _, path in paths_of(report, method) for p in path]
        best = [(number((p["scores"].get(score) or {}).get("difference")), number(p["kl"])) for p in points]
        best = [b for b in best if b[0] == b[0]]
        if best:
            top, at = max(best)
            parts.append(f"{name(method)} reaches at most {rounded(top)}, at KL {kl(at)} nats")
    return " ".join([start, "; ".join(parts) + "." if parts else "", "The numbers stand in the tables of this page."])


def _tables(report: Report) -> list[Table]:
    return [
        _table("equal_kl", "Differences at equal KL", equal_kl_rows(report)),
        _table("tuned", "Each method at its best strength", tuned_rows(report)),
        _table("signs", "From the judge's peak to the largest KL", sign_rows(report)),
        _table("wins", "Wins over the foundation", win_rows(report)),
        _table("meetings", "Every pair of policies", _meeting_rows(report)),
        _table("judge", "By the judge of pairs", judge_rows(report)),
        _table("policies", "The ends of all trials", policy_rows(report)),
        _table("points", "Every checkpoint", _point_rows(report)),
        _table("forgetting", "What was forgotten", _forgetting_rows(report)),
        _table("budget", "Cost of one trial: alone / with its reward model and pairs", budget_rows(report)),
    ]


def _table(key: str, title: str, found: tuple[list[str], list[list[str]]]) -> Table:
    header, rows = found
    return {"id": key, "title": title, "header": [cell.replace("**", "") for cell in header], "rows": rows}


def _meeting_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Each pair once, the later policy over the earlier one."""
    wins = report["wins"] or {"policies": []}
    labels = [trial(p["method"], p["swept"], report) for p in wins["policies"]]
    rows = []
    for i, label in enumerate(labels):
        for j, other in enumerate(labels[:i]):
            if raw := wins["raw"][i][j]:
                rows.append([f"{label} over {other}", _share(raw), _share(wins["controlled"][i][j])])
    return ["meeting", "wins [95 %]", "at equal length [95 %]"], rows


def _share(estimate: dict | None) -> str:
    return "–" if not estimate or estimate["estimate"] is None else share(estimate)


def _point_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """All checkpoints: KL, every score over the foundation, the shape of the responses."""
    scores = list(report["score_kinds"])
    header = [
        "policy",
        "step",
        "seeds",
        "KL, nats [95 %]",
        *(score_label(report, s) for s in scores),
        "length",
        "ended",
    ]
    rows = []
    for p in report["points"]:
        row = [trial(p["method"], p["swept"], report), str(p["step"]), str(len(p["seeds"])), _cell(p["kl"])]
        row += [_cell((p["scores"].get(s) or {}).get("difference"), sign=True) for s in scores]
        rows.append([*row, _cell(p.get("length")), _cell(p.get("ended"))])
    return header, rows


def _forgetting_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Perplexity of held-out texts and the variety of the responses, for the ends of all trials."""
    ends = [report["foundation"], *(p for p in report["points"] if p["last"])]
    names = list(dict.fromkeys(n for p in ends for n in p.get("numbers") or {}))
    label = {n: n.replace("perplexity/", "perplexity of ").replace("_", "-") for n in names}
    rows = []
    for p in ends if names else []:
        cells = [rounded(p["numbers"][n]) if p.get("numbers", {}).get(n) is not None else "–" for n in names]
        rows.append([trial(p["method"], p.get("swept"), report), *cells, _cell(p.get("repetition"))])
    return ["policy", *label.values(), "repetition"], rows


def _cell(estimate: dict | None, *, sign: bool = False) -> str:
    return "–" if not estimate or estimate["estimate"] is None else interval(estimate, sign=sign)


def _sample(sample: dict[str, Any], report: Report) -> dict[str, Any]:
    prompt = sample["prompt"]
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    responses = []
    for label, r in sample["responses"].items():
        values = {_kind(n, report): v for n, v in r["scores"].items()} | {"KL": r["kl"], "tokens": r.get("length")}
        shown = {n: f"{v:g}" if n == "tokens" else rounded(v) for n, v in values.items() if v is not None}
        responses.append({"label": label, "text": r["response"], "ended": r["ended"], "values": shown})
    return {"messages": messages, "responses": responses}


def _kind(score: str, report: Report) -> str:
    kind = report["score_kinds"].get(score, "other")
    return score if kind in ("other", score) else f"{score} ({kind})"


def _meta(meta: dict[str, Any]) -> dict[str, Any]:
    """What repeats the experiment: short facts in a list, the rest as YAML to unfold."""
    import yaml

    plain = json.loads(dumps(meta))
    short = {key: value for key, value in plain.items() if isinstance(value, (str, int, float))}
    long = {
        key: yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
        for key, value in plain.items()
        if key not in short and value not in (None, [], {})
    }
    return {"short": short, "long": long}


def _parts(text: str) -> list[tuple[str, str]]:
    """(kind, text) of a line in the little Markdown that report.md uses: **bold** and `code`; the template escapes."""
    parts = []
    for i, piece in enumerate(text.removeprefix("- ").split("**")):
        for j, bit in enumerate(piece.split("`")):
            if bit:
                parts.append(("strong" if i % 2 else "code" if j % 2 else "", bit))
    return parts
