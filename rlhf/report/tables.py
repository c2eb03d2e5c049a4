"""The tables of a report: each function takes report.json's dict and yields header and rows as raw
text.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.report.format import (
    Number,
    Report,
    amount,
    initial_name,
    interval,
    main_score,
    method_name,
    nats,
    number,
    p_value,
    policy_name,
    score_name,
    share,
    usual_values,
    win_rate_of,
)
from rlhf.report.sentences import OUTCOMES
from rlhf.text import UNKNOWN, markdown_table

# The columns that every comparison ends with
DIFFERENCE = ["difference [95 %]", "p adjusted", "detectable"]


@dataclass(frozen=True)
class Table:
    """A table of raw text, whose columns from the second on hold numbers."""

    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> list[str]:
        """Return its Markdown, in which no cell can be more than text; nothing for a table without
        rows.
        """
        if not self.rows:
            return []
        header = list(map(escape, self.header))
        return [*markdown_table(header, self.rows, right=range(1, len(header)), escape=escape), ""]


def as_table(lines: Callable[[Report], Iterator[list[str]]]) -> Callable[[Report], Table]:
    """Return a function that makes a table of what `lines` yields: the header, then the rows."""

    @functools.wraps(lines)
    def table(report: Report) -> Table:
        header, *rows = lines(report)
        return Table(header, rows)

    return table


def escape(text: str) -> str:
    """Return `text` on one line such that Markdown shows it as it is: no HTML, links, pictures or
    emphasis.
    """
    return re.sub(r"([\\`*_\[\]<>&|~#$])", r"\\\1", " ".join(text.split()))


@as_table
def opening(report: Report) -> Iterator[list[str]]:
    """Yield one row a policy at the end of its training: main score, win rate over the initial
    policy, KL, shape.

    A method has the row of its tuned swept value; where nothing was tuned, one for each of its
    values.
    """
    score, initial = main_score(report), initial_name(report)
    title = "score" if score is None else score_name(report, score)
    tuned_values = usual_values(report)
    # the policy that all differences are to opens the table
    points = [report["initial_policy"]]
    for point in report["points"]:
        if point["last"] and point["swept"] == tuned_values.get(point["method"], point["swept"]):
            points.append(point)

    yield [
        "policy",
        f"{title} [95 %]",
        f"over {initial} [95 %]",
        f"wins over {initial} [95 %]",
        "KL, nats",
        "tokens",
        "ended",
        "seeds",
    ]
    first = (report["initial_policy"]["method"], None)
    for point in points:
        found = point["scores"].get(score) or {}
        yield [
            policy_name(point["method"], point.get("swept"), report),
            interval(found.get("mean")),
            interval(found.get("difference"), signed=True),
            share(win_rate_of(report, (point["method"], point.get("swept")), first)),
            _with_error(point["kl"]),
            _with_error(point["length"]),
            share(point["ended"]),
            _seeds(point),
        ]


def _with_error(estimate: Number | None) -> str:
    """Return "1.60 ± 0.06", which is shorter than the interval."""
    if estimate is None or estimate["se"] is None:
        return interval(estimate)
    return f"{number(estimate['estimate'])} ± {number(estimate['se'])}"


def _seeds(point: Mapping[str, Any]) -> str:
    # The initial policy has none
    return str(len(point["seeds"])) if "seeds" in point else UNKNOWN


@as_table
def equal_kl(report: Report) -> Iterator[list[str]]:
    """Yield a row a pair and KL, with the same read from straight lines instead of the fitted
    curve.
    """
    yield ["comparison", "KL, nats", "lines instead of the curve", *DIFFERENCE]
    for pair in report["frontier"]:
        lines = {row["kl"]: row["difference"] for row in pair.get("sensitivity") or []}
        for row in pair["rows"]:
            other = interval(lines.get(row["kl"]), signed=True)
            yield [_over(pair), nats(row["kl"]), other, *_difference(row)]


@as_table
def equal_kl_on_the_way(report: Report) -> Iterator[list[str]]:
    """Yield the rows at equal KL over all checkpoints on the way, which have not spent the same."""
    yield ["over all checkpoints, which have not spent the same", "KL, nats", "difference [95 %]"]
    for pair in report["frontier"]:
        # with few swept values, `rows` are over all checkpoints already
        path = pair.get("path") or {"rows": []}
        for row in path["rows"]:
            yield [_over(pair), nats(row["kl"]), interval(row["difference"], signed=True)]


@as_table
def tuned(report: Report) -> Iterator[list[str]]:
    """Yield a row a comparison of two methods, each at its tuned swept value."""
    yield ["comparison", "values chosen", *DIFFERENCE]
    for row in report["tuned"]["rows"]:
        values = f"{_values_chosen(report, row['a'])} against {_values_chosen(report, row['b'])}"
        yield [_over(row), values, *_difference(row)]


def _values_chosen(report: Report, method: str) -> str:
    # The initial policy was not tuned; where nothing is swept, the value is "None"
    shares = report["tuned"]["methods"].get(method, {}).get("shares", {})
    return ", ".join(value for value in shares if value != "None") or UNKNOWN


def _difference(row: Mapping[str, Any]) -> list[str]:
    return [
        interval(row["difference"], signed=True),
        p_value(row.get("p_adjusted")),
        number(row.get("minimum_detectable_effect")),
    ]


def _over(pair: Mapping[str, Any]) -> str:
    return f"{method_name(pair['a'])} over {method_name(pair['b'])}"


@as_table
def over_optimisation(report: Report) -> Iterator[list[str]]:
    """Yield a row a method and swept value: how judge and proxy change from the judge's peak to
    the largest KL.
    """
    yield [
        "method",
        "peak, KL",
        "largest KL",
        "judge, peak to end [95 %]",
        "proxy [95 %]",
        "p adjusted",
        "outcome",
    ]
    for entry in report["overoptimisation"]:
        proxy, change = entry["proxy"], UNKNOWN
        if proxy:
            change = f"{proxy['name']} {interval(proxy['change'], signed=True)}"
        yield [
            policy_name(entry["method"], entry["swept"], report),
            nats(entry["peak"]["kl"]),
            nats(entry["end"]["kl"]),
            interval(entry["judge"], signed=True),
            change,
            p_value(entry["p_adjusted"]),
            UNKNOWN if entry["sign"] is None else OUTCOMES[entry["sign"]],
        ]


@as_table
def win_rates(report: Report) -> Iterator[list[str]]:
    """Yield each pair of policies once, the later one over the earlier one."""
    yield ["comparison", "wins [95 %]", "at equal length [95 %]"]
    for later, earlier, raw, controlled in pairs_of_policies(report):
        ahead = policy_name(later["method"], later["swept"], report)
        behind = policy_name(earlier["method"], earlier["swept"], report)
        yield [f"{ahead} over {behind}", share(raw), share(controlled)]


def pairs_of_policies(report: Report) -> Iterator[tuple[dict, dict, Number, Number | None]]:
    """Yield each two policies that have a win rate: the later one, the earlier one, the later one's
    wins over it, and those at equal length.
    """
    wins = report["wins"] or {"policies": []}
    for (j, earlier), (i, later) in itertools.combinations(enumerate(wins["policies"]), 2):
        if wins["raw"][i][j]:
            yield later, earlier, wins["raw"][i][j], wins["controlled"][i][j]


@as_table
def judge_of_pairs(report: Report) -> Iterator[list[str]]:
    """Yield what a judge of pairs said, where one was asked in both orders."""
    asked = report.get("judge_of_pairs") or {"rows": [], "name": ""}
    header = [
        f"by the judge of pairs {asked['name']}",
        "wins [95 %]",
        "at equal length [95 %]",
        "ties",
        "consistent",
        "no verdict",
    ]
    # a column of its own, where votes on the same answers were there to correct the judge
    corrects = any(row.get("corrected") for row in asked["rows"])
    if corrects:
        header.append("corrected by votes [95 %]")
    yield header
    for row in asked["rows"]:
        cells = [
            _over(row),
            share(row["raw"]),
            share(row["controlled"]),
            _percent(row["ties"]),
            _percent(row["consistency"]),
            str(row.get("no_verdict", 0)),
        ]
        if corrects:
            cells.append(share(row["corrected"]))
        yield cells


@as_table
def judge_itself(report: Report) -> Iterator[list[str]]:
    """Yield how far a judge of pairs agrees with people, and what it follows, where that was asked."""
    found = (report.get("judge_of_pairs") or {}).get("judge")
    yield ["what the judge of pairs follows", "judge", "people", "judge less people"]
    if found:
        from rlhf.judge.report import belief

        yield from belief(found)


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


@as_table
def cost(report: Report) -> Iterator[list[str]]:
    """Yield each counter of a trial, alone and in all, and the share of the matched budget that it
    used.
    """
    rows = report["budget"]["rows"]
    # every counter of any trial, in the order of the first one
    counters: dict[str, None] = {}
    for row in rows:
        # parts of other counters are in report.json alone
        counted = [counter for counter in row["total"] if not counter.startswith("reference_")]
        counters |= dict.fromkeys(counted)
    names = [f"{counter.replace('_', ' ')}: own / in all" for counter in counters]
    yield ["trial", *names, "of the matched budget"]
    # The first of the runs compared has a cost too; an initial policy of an experiment has none
    initial = report["initial_policy"]["budget"]
    if initial and rows:
        spent = map(amount, map(initial.get, counters))
        yield [initial_name(report), *spent, UNKNOWN]
    for row in rows:
        spent = []
        for counter in counters:
            own, in_all = row["own"].get(counter, 0), row["total"].get(counter)
            spent.append(f"{amount(own)} / {amount(in_all)}")
        ratio = UNKNOWN
        if row["ratio"] is not None:
            ratio = f"{100 * row['ratio']:.0f} % ({100 * row['ratio_own']:.0f} % own)"
        yield [policy_name(row["method"], row["swept"], report), *spent, ratio]


@as_table
def policies(report: Report) -> Iterator[list[str]]:
    """Yield every checkpoint: KL, each score, shape of the responses, variety and perplexities."""
    points = [report["initial_policy"], *report["points"]]
    scores = list(report["score_kinds"])
    # numbers that any policy has: its variety, and perplexities where texts were given
    numbers: dict[str, None] = {}
    for point in points:
        numbers |= dict.fromkeys(point["numbers"])
    header = ["policy", "step", "seeds", "KL, nats [95 %]"]
    header += [score_name(report, score) for score in scores]
    header += ["tokens", "ended", "repetition"]
    header += [name.replace("_", "-") for name in numbers]
    yield header
    for point in points:
        name = policy_name(point["method"], point.get("swept"), report)
        row = [name, str(point.get("step", 0)), _seeds(point), interval(point["kl"])]
        row += [_score(point, score) for score in scores]
        row += map(interval, (point["length"], point["ended"], point["repetition"]))
        row += map(number, map(point["numbers"].get, numbers))
        yield row


def _score(point: Mapping[str, Any], score: str) -> str:
    """Return a score over the initial policy's with its sign; the initial policy's own without."""
    found = point["scores"].get(score) or {}
    if found.get("difference"):
        return interval(found["difference"], signed=True)
    return interval(found.get("mean"))
