"""The sentences of a report: a template for each kind of verdict and note (rlhf/compare/verdict.py),
filled with the numbers of report.json.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.report.format import (
    Report,
    basis,
    counted,
    digits,
    interval,
    largest_difference,
    listed,
    method_name,
    mirrored,
    nats,
    number,
    p_value,
    policy_name,
)

# trials or measurements that a note names; the rest is counted
NAMED = 4
# below which an outlier among them is hardly seen
FEW_SEEDS = 5

# Where a comparison was made, for each kind of verdict that has a sign, and what its sign says
PLACES = {
    "equal_kl": "at KL {kl}",
    "tuned": "{tuned} at the swept value that did best on other prompts",
    "end": "at the end of training",
}
SIGNS: dict[int | None, str] = {
    1: "{a} is ahead of {b} by {gain} by {judge} ({basis}), {place}.",
    -1: "{a} is behind {b} by {loss} by {judge} ({basis}), {place}.",
    0: "No difference can be shown between {a} and {b} by {judge}, {place}: {size} ({basis}). "
    "The interval leaves room for {bound}.",
    None: "{a} differs from {b} by {size} by {judge} ({basis}), {place}. There are too few seeds or prompts for a "
    "verdict.",
}
HEADLINE: dict[int | None, str] = {
    1: "ahead of {b}",
    -1: "behind {b}",
    0: "not shown to differ from {b}",
    None: "shown beside {b} without a verdict",
}
OVER_OPTIMISATION = (
    "Over-optimisation of {a}: {outcome}. From the peak of {judge} (KL {peak}) to the largest KL ({end}) it "
    "changes by {size} ({basis}){proxy}."
)
MOSTLY_RISING = (
    "Over-optimisation of {a}: {outcome}. Chosen on halves of the data, {judge} is highest most often at the largest "
    "KL ({end}); from the peak of each half to there it changes by {size} ({basis}){proxy}."
)
STILL_RISING = (
    "Over-optimisation of {a}: {outcome}. At the largest KL ({end}) {judge} is highest, so there is no fall from a "
    "peak to measure."
)
OUTCOMES = {1: "reproduced", -1: "not reproduced", 0: "undecided", None: "no verdict"}
EXPLOITED_PROXY = (
    "{a} raised {proxies} over {b} while {judge} fell by {loss}: the proxy was over-optimised."
)
RESERVATIONS = {
    "form": "This rests on the form of the fitted curve: straight lines from point to point do not show it.",
    "contradicted": "The fitted curve shows a difference that straight lines from point to point contradict.",
    "correction": "The interval alone excludes 0, the p adjusted for all claims of this report does not.",
    "win_rate": "Mean and win rate disagree: a few comparisons decide the mean.",
}
NOTES: dict[str, str] = {
    "judge": "What decides is {judge}, which no method was trained on.{proxies}",
    "no_judge": "No gold or referee score was given, so this report cannot judge which policy is better. A score that "
    "a method was trained on shows what was optimised and decides nothing.{proxies}",
    "not_measured": "Nothing of {method} has been measured yet.",
    "missing_trials": "Trials that have not ended: {trials}. The report uses the seeds that are there.",
    "stopped": "{run} was stopped by a guard ({reason}): its end is where it stopped.",
    "missing_measurements": "The experiment is not finished; measurements missing: {names}.",
    "left_out": "{method} at {swept_values} lacks seeds and cannot be chosen, so it had fewer tuning trials.",
    "outlier": "Seed {seed} of {method} is an outlier by {judge}: {score:.3g}, the other seeds {others}. Intervals "
    "assume that seeds are alike and hold less often than stated where single runs fail.",
    "no_common_seed": "{a} and {b} have no run seed in common whose trials have ended, so they are not compared.",
    "no_overlap": "No KL is reached by all runs of {a} and {b} ({ranges}), so there is no comparison at equal KL.",
    "few_groups": "{groups} groups are too few, a verdict needs {needed}: intervals are shown without one.",
    "no_win_rate": "No win rate is given: it takes two answers of each policy to each prompt with independent "
    "sampling noise (samples_per_prompt: 2).",
}
BUDGETS: dict[bool | None, str] = {
    True: "Budgets are matched: {counter} within {tolerance:g} %.",
    False: "Budgets are not matched in {counter} within {tolerance:g} %, so a difference may come from what was spent.",
    None: "Budgets were to be matched in {counter}, but nothing is known of them yet.",
}
UNMATCHED = "Budgets were not matched, so a difference may come from what was spent."
UNEQUAL_TRIALS = (
    " The numbers of tuning trials differ ({trials}): more tries find a better value by luck."
)
POWER = "To show a win rate of {rate:g} % in 4 of 5 repeats takes {pairs} independent comparisons."
DETECTABLE = (
    " {a} over {b}: a difference of {least} would be shown that often before the correction for all "
    "claims{more}."
)
SCOPES = {
    "models": "All of this holds for these trained models, not for the methods. Intervals are {level:g} % over {over}; "
    "they do not hold the spread between training runs.",
    "method": "Intervals are {level:g} % over {seeds} and {over}, both drawn at random: they speak of the methods on "
    "this initial policy, these data and prompts like these.",
}
NO_OUTLIER_SHOWN = " So few seeds can hardly show that one of them is an outlier."


def headline(report: Report) -> str:
    """Return the first verdict in one sentence; at equal KL what holds at all KLs of its two
    methods.
    """
    if not report["verdicts"]:
        return note_sentence(report["notes"][0], report)
    first = report["verdicts"][0]
    if first["kind"] != "equal_kl":
        return verdict_sentence(first, report)

    # Several KLs of one pair: grouped by what is said of them
    kls: dict[int | None, list[str]] = {}
    for verdict in report["verdicts"]:
        if (verdict["kind"], verdict["a"], verdict["b"]) == ("equal_kl", first["a"], first["b"]):
            kls.setdefault(verdict["sign"], []).append(nats(verdict["kl"]))
    a, b = method_name(first["a"]), method_name(first["b"])
    parts = []
    for sign, text in HEADLINE.items():
        if sign in kls:
            parts.append(f"{text.format(b=b)} at KL {listed(kls[sign])}")
    return f"By {judge_name(report)} {a} is {'; '.join(parts)}."


def verdict_sentence(verdict: Mapping[str, Any], report: Report) -> str:
    """Return one verdict of report.json in words."""
    estimate, evidence = verdict["difference"], verdict["evidence"] or {}
    fields = {
        "a": _side(verdict, "a", report),
        "b": _side(verdict, "b", report),
        "judge": judge_name(report),
        "size": interval(estimate, signed=True),
        "gain": interval(estimate),
        "loss": interval(mirrored(estimate)),
        "bound": largest_difference(estimate),
        "basis": _basis(verdict, report),
    }
    if verdict["kind"] == "over_optimisation":
        fields |= {
            "outcome": OUTCOMES[verdict["sign"]],
            "peak": nats(evidence["peak"]["kl"]),
            "end": nats(evidence["end"]["kl"]),
            "proxy": _proxy_change(evidence["proxy"]),
        }
        text = OVER_OPTIMISATION
        # the peak is the end wherever it was chosen, or in most places
        if evidence["ends_at_peak"] == 1:
            text = STILL_RISING
        elif evidence["peak"]["kl"] == evidence["end"]["kl"]:
            text = MOSTLY_RISING
        text = text.format(**fields)
    elif verdict["kind"] == "exploited_proxy":
        text = EXPLOITED_PROXY.format(**fields, proxies=listed(list(evidence["proxies"])))
    else:
        text = SIGNS[verdict["sign"]].format(**fields, place=_place(verdict, report))
    reservation = RESERVATIONS.get(verdict["reservation"])
    return f"{text} {reservation}" if reservation else text


def note_sentence(note: Mapping[str, Any], report: Report) -> str:
    """Return one limit of the report in words."""
    # Most fields are written as they are; those of NOTE_FIELDS are lists and names
    fields = {"judge": judge_name(report), **note}
    if "method" in note:
        fields["method"] = policy_name(note["method"], note.get("swept"), report)
    for name, write in NOTE_FIELDS.items():
        if name in note:
            fields[name] = write(note[name], report)
    return NOTES[note["kind"]].format(**fields)


def report_sentences(report: Report) -> list[str]:
    """Return all limits of the report, its budgets, power and scope, in words."""
    lines = [note_sentence(note, report) for note in report["notes"]]
    # What single runs spent was never to be matched
    if report["kind"] == "experiment":
        lines.append(_budget(report))
    if report["power"] is not None:
        lines.append(_power(report))
    return [*lines, _scope(report)]


def all_sentences(report: Report) -> list[str]:
    """Return the verdicts and then the limits of the report, in words."""
    verdicts = [verdict_sentence(verdict, report) for verdict in report["verdicts"]]
    return verdicts + report_sentences(report)


def judge_name(report: Report) -> str:
    """Return "the gold score", with the name of the score where that says more."""
    judge = report["judge"]
    if judge is None:
        return "no score"
    kind = report["score_kinds"][judge]
    return f"the {kind} score" + ("" if judge == kind else f" '{judge}'")


def _side(verdict: Mapping[str, Any], side: str, report: Report) -> str:
    """Return a side of a comparison; a method at its tuned value with that and with its KL."""
    method = verdict[side]
    entry = report["tuned"]["methods"].get(method)
    if verdict["kind"] != "tuned" or entry is None:
        return method_name(method)
    facts = [f"KL {nats(entry['kl']['estimate'])}"]
    if entry["usual"] is not None:
        facts.insert(0, f"{report['methods'][method]['swept']} {entry['usual']:g}")
    return f"{method_name(method)} ({', '.join(facts)})"


def _place(verdict: Mapping[str, Any], report: Report) -> str:
    # the other kinds of comparison are at the end of training, tuned or not
    if verdict["kind"] == "equal_kl":
        return PLACES["equal_kl"].format(kl=nats(verdict["kl"]))
    tuned = []
    for method in (verdict["a"], verdict["b"]):
        if len(report["methods"].get(method, {}).get("swept_values", ())) > 1:
            tuned.append(method_name(method))
    if not tuned:
        return PLACES["end"]
    return PLACES["tuned"].format(tuned=tuned[0] if len(tuned) == 1 else "each")


def _basis(verdict: Mapping[str, Any], report: Report) -> str:
    p = verdict["p_adjusted"]
    return basis(verdict["difference"], report) + ("" if p is None else f", p {p_value(p)}")


def _proxy_change(proxy: Mapping[str, Any] | None) -> str:
    """Return how a proxy changes where the judge falls, as the end of a sentence."""
    if proxy is None:
        return ""
    whose = "" if proxy["optimised"] else ", from which it does not learn,"
    return f", the proxy '{proxy['name']}'{whose} by {interval(proxy['change'], signed=True)}"


def _budget(report: Report) -> str:
    """Return whether all trials spent the same, and whether all methods had as many tries."""
    match = report["budget"]["match"]
    text = UNMATCHED
    if match is not None:
        fields = {
            "counter": match["match"].replace("_", " "),
            "tolerance": 100 * match["tolerance"],
        }
        text = BUDGETS[report["budget"]["matched"]].format(**fields)

    counts, each = set(), []
    for name, method in report["methods"].items():
        # a baseline has no trials to match
        if method["trials"] and not method["baseline"]:
            counts.add(method["trials"])
            each.append(f"{method_name(name)} {method['trials']}")
    if len(counts) > 1:
        text += UNEQUAL_TRIALS.format(trials=", ".join(each))
    return text


def _power(report: Report) -> str:
    """Return what this report could have shown, and what it would take to show less."""
    power, initial = report["power"], report["initial_policy"]["method"]
    text = POWER.format(rate=100 * power["win_rate"], pairs=power["pairs_needed"])
    for row in report["tuned"]["rows"]:
        least, seeds = row["minimum_detectable_effect"], row["seeds_for_half"]
        # nobody asks whether training changed the initial policy at all
        if least is not None and row["b"] != initial:
            more = f"; half of it takes about {counted(seeds, 'run seed')}" if seeds else ""
            sides = {"a": method_name(row["a"]), "b": method_name(row["b"])}
            text += DETECTABLE.format(**sides, least=digits(least, row["difference"]), more=more)
    return text


def _scope(report: Report) -> str:
    """Return what the conclusions hold for: these models or the methods, and which prompts."""
    unit = report["unit"]
    groups = counted(unit["groups"], "group")
    prompts = counted(unit["prompts"], "prompt")
    answers = counted(unit["samples_per_prompt"], "answer")
    seeds = len(unit["seeds"])
    fields = {
        "level": 100 * unit["level"],
        "over": f"{groups} of {prompts}, {answers} each",
        "seeds": counted(seeds, "run seed"),
    }
    text = SCOPES[report["scope"]].format(**fields)
    if report["scope"] == "method" and seeds < FEW_SEEDS:
        text += NO_OUTLIER_SHOWN
    return text


def _learnt_from(proxies: Sequence[str], _: Report) -> str:
    return f" Methods learnt from {listed(proxies)}, which decides nothing." if proxies else ""


def _trials(trials: Sequence[Mapping[str, Any]], report: Report) -> str:
    names = []
    for trial in trials:
        policy = policy_name(trial["method"], trial["swept"], report)
        names.append(f"{policy} seed {trial['seed']}")
    return _some(names, report)


def _some(names: Sequence[str], _: Report) -> str:
    """Return the first names and how many more there are."""
    shown = list(names[:NAMED])
    if len(names) > NAMED:
        shown.append(f"{len(names) - NAMED} more")
    return listed(shown)


def _swept_values(values: Sequence[float], _: Report) -> str:
    return listed(list(map("{:g}".format, values)))


def _others(scores: Sequence[float], _: Report) -> str:
    return " to ".join(map(number, scores))


def _method(method: str, _: Report) -> str:
    return method_name(method)


def _ranges(ranges: Mapping[str, Sequence[float]], _: Report) -> str:
    parts = []
    for method, (low, high) in ranges.items():
        # the highest start and the lowest end of its seeds: they may miss each other
        reached = f"{nats(low)} to {nats(high)} nats" if low <= high else "none by all its seeds"
        parts.append(f"{method_name(method)}: {reached}")
    return ", ".join(parts)


# field of a note -> how it is written, given the report
NOTE_FIELDS: dict[str, Callable[[Any, Report], str]] = {
    "proxies": _learnt_from,
    "trials": _trials,
    "names": _some,
    "ranges": _ranges,
    "swept_values": _swept_values,
    "others": _others,
    "a": _method,
    "b": _method,
}
