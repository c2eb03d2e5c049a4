"""`rlhf brand verdict`: SHIP or DO NOT SHIP, by named gates, each with its interval and bound."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.brand.answers import Scored, measure_answers, memorised, scored_answers
from rlhf.brand.gates import NONE, OFF, PASSED, Gate, Measured, bound_text, judge, read_gates
from rlhf.brand.measure import forgotten, read_measures
from rlhf.config import option
from rlhf.data.load import load
from rlhf.data.records import Preference, Scorer
from rlhf.data.sources import split_event
from rlhf.data.store import Store
from rlhf.errors import UserError
from rlhf.files import dumps, write_atomic
from rlhf.text import clip, markdown_table, short_names, with_interval
from rlhf.voting.ballots import Ballots, read_ballots
from rlhf.voting.page import SOURCES
from rlhf.voting.rates import summarise_votes

# the first line of a verdict, by who voted; None: nobody was asked
FIRST_LINES = {
    "human": "{word}, by votes of people.",
    "simulated": "{word}, by simulated votes: no person has judged these answers.",
    "judge": "{word}, by votes of a judge: no person has judged these answers.",
    "mixed": "{word}, by votes of people and of programs, mixed.",
    None: "{word}, without votes.",
}
CHECK_LINE = (
    "Training pairs were checked by {who}: of {judged} judged pairs {agreed} were kept as the voice has them, {turned} "
    "turned, {left} left out; {not_judged} were not judged."
)
# answers shown side by side
EXAMPLES = 3


@dataclass(kw_only=True)
class VerdictConfig:
    """Whether an adapter ships: its gates, by answers that were voted on beside its base's."""

    votes: str = option(
        help="the store with both policies' answers to test prompts and votes on them, STORE or STORE@EVENT"
    )
    model_name_or_path: str = option(help="the base, as the store names it")
    run: str = option(help="the adapter, as the store names it")
    voice: str = option(help="the brand voice (YAML)")
    judge: dict = option({}, "what measures the tone of the voice, as for rlhf brand run")
    measures: str | None = option(None, "what rlhf brand measure has written")
    training: str | None = option(
        None, "the pairs it was trained on, for what it may have memorised"
    )
    gates: dict = option(
        {}, "bounds that differ from the defaults, {facts: -0.02}; null turns a gate off"
    )
    refusal_phrases: list[str] = option(
        [], "regular expressions of refusals, beside the English ones"
    )
    validation_fraction: float = option(0.05, "as in training", low=0, high=1)
    test_fraction: float = option(0.1, "as in training", low=0, high=1)
    output_dir: str = option(help="where report.md and verdict.json are written")

    def validate(self) -> None:
        read_gates(self.gates)


def verdict(config: VerdictConfig, scorer: Scorer) -> dict[str, Any]:
    """Write report.md and verdict.json, print the gates; return the latter. Raises UserError."""
    path, event = split_event(config.votes)
    with Store.open(path, readonly=True) as store:
        view = store.at(event)
        answers = scored_answers(view.answers(), scorer)
        overlap, ballots = int(store.setting("overlap", "1")), read_ballots(view)
        votes = summarise_votes(ballots, overlap=overlap)
        stopped_early = is_stopped_early(ballots, overlap)
        at = view.event
    for model in (config.model_name_or_path, config.run):
        if model not in answers:
            known = ", ".join(answers) or "none"
            raise UserError(f"{path}: has no answers of '{model}'; it has those of: {known}")
    base, run = answers[config.model_name_or_path], answers[config.run]
    # what is measured on the answers themselves, then what needs votes, pairs or other text
    measured = measure_answers(base, run, config.refusal_phrases)
    measured["preference"] = preference(
        votes, config.model_name_or_path, config.run, stopped_early=stopped_early
    )
    measured["memorised"] = memorised_pairs(config, run)
    if config.measures:
        measured |= forgotten(read_measures(config.measures))

    bounds = read_gates(config.gates)
    source = None
    # with the gate off the verdict rests on nobody's votes, and must not name any
    if votes and bounds.preference is not None:
        source = votes["source"]
    found = decide(judge(measured, bounds), source)
    found |= {"run": config.run, "base": config.model_name_or_path, "votes": {"event": at}}
    if votes:
        found["votes"] |= {"source": votes["source"], "count": votes["votes"]}
    found["check"] = check_of(config.training)
    write_verdict(Path(config.output_dir), found, examples(base, run))
    return found


def write_verdict(
    folder: Path, found: dict[str, Any], shown: Sequence[tuple[Scored, Scored]]
) -> None:
    """Write verdict.json and report.md, and print the gates; shown: answers beside each other."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "verdict.json", dumps(found, indent=1) + "\n")
    write_atomic(folder / "report.md", "\n".join(report(found, shown)) + "\n")
    print("\n".join(text_lines(found)))
    print(f"{folder / 'report.md'}, {folder / 'verdict.json'}")


def decide(gates: Sequence[Gate], source: str | None) -> dict[str, Any]:
    """Return the verdict: an adapter ships where no gate blocks it, and some gate has passed.

    source: who voted, "human", "simulated", "judge" or "mixed"; None where the preference is no gate
    or nobody has voted.
    """
    # with every gate off nothing blocks, and nothing has been shown either
    has_passed = any(gate.status == PASSED for gate in gates)
    ships = has_passed and not any(gate.blocks for gate in gates)
    word = "SHIP" if ships else "DO NOT SHIP"
    return {
        "ship": ships,
        "verdict": FIRST_LINES[source].format(word=word),
        "gates": [gate.to_dict() for gate in gates],
    }


def is_stopped_early(ballots: Ballots, overlap: int) -> bool:
    """Return whether people's votes were read before every pair had all of them.

    Programs vote once for all, and skips of theirs are not asked for again.
    """
    if ballots.source == "simulated":
        return False
    items = itertools.chain.from_iterable(ballots.items.values())
    return any(not item.equal and len(item.shares) < overlap for item in items)


def preference(
    votes: Mapping[str, Any] | None, base: str, run: str, *, stopped_early: bool = False
) -> Measured:
    """Return the share of votes for the run against the base with its interval; nothing without a
    vote.

    votes: `summarise_votes`, of these two policies alone. base, run: their names in the store.
    stopped_early: the interval is that of the rule that may be read at any time, since an ordinary
    one would err too often where votes are read until they decide.
    """
    if not votes or len(votes["pairs"]) != 1:
        return Measured()
    # of two policies there is one pair
    pair = votes["pairs"][0]
    rate, stop = pair["rate"], pair["stop"]
    found = stop if stopped_early else rate
    estimate, groups = rate["estimate"], found["groups"]
    # None: so few groups have no interval
    low = math.nan if found["low"] is None else found["low"]
    high = math.nan if found["high"] is None else found["high"]
    run_name = short_names([base, run])[1]
    if pair["one"] == run_name:
        return Measured(estimate, low, high, groups)
    # the store met the base first
    return Measured(1 - estimate, 1 - high, 1 - low, groups)


def memorised_pairs(config: VerdictConfig, run: Sequence[Scored]) -> Measured:
    """Return how far answers repeat training answers, beyond those of pairs that were held out."""
    if config.training is None:
        return Measured(why="there are no training answers")
    texts = []
    for split in ("train", "validation"):
        # the same fractions as in training, so that the same pairs were held out
        records = load(
            config.training,
            Preference,
            split=split,
            validation_fraction=config.validation_fraction,
            test_fraction=config.test_fraction,
        )
        texts.append([record.chosen for record in records])
    return memorised(run, *texts)


def check_of(training: str | None) -> dict[str, Any] | None:
    """Return how far votes agreed with the training pairs, where they were checked."""
    file = Path(f"{training}.check.json")
    if not training or not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8"))


def check_line(check: Mapping[str, Any]) -> str:
    """Return one sentence about the check of the training pairs."""
    # what never happened is not in the file
    agreed, turned = check.get("agreed", 0), check.get("turned", 0)
    left = check.get("without a winner", 0)
    return CHECK_LINE.format(
        who=SOURCES.get(check["source"], "nobody"),
        judged=agreed + turned + left,
        agreed=agreed,
        turned=turned,
        left=left,
        not_judged=check.get("not judged", 0),
    )


def text_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the verdict as lines for a terminal."""
    lines = [found["verdict"], ""]
    for gate in found["gates"]:
        lines.append(f"{gate['status']:<14}  {gate['name']:<10}  {gate['sentence']}")
    return [*lines, ""]


def report(found: Mapping[str, Any], shown: Sequence[tuple[Scored, Scored]]) -> list[str]:
    """Return the lines of report.md."""
    header = ["gate", "", "estimate [95 %]", "bound", "groups", "what"]
    rows = []
    for gate in found["gates"]:
        rows.append(
            [
                gate["name"],
                gate["status"],
                with_interval(gate, "{:.3g}".format),
                bound_text(gate["direction"], gate["threshold"]),
                gate["groups"] or None,
                what_of(gate),
            ]
        )
    lines = [f"**{found['verdict']}**", "", *markdown_table(header, rows, right=[4]), ""]
    lines.append(
        "A gate passes where its whole interval keeps the bound; where the interval holds the bound, it is not shown. "
        "Every gate has to pass."
    )
    if found["check"]:
        lines += ["", check_line(found["check"])]
    lines += ["", f"Base: `{found['base']}`. Adapter: `{found['run']}`."]
    table = []
    for before, after in shown:
        prompt = clip(after.messages[-1]["content"], 100)
        table.append([prompt, f"{before.score:.2f}", before.text, f"{after.score:.2f}", after.text])
    lines += ["", "The first answers beside each other:", ""]
    return lines + markdown_table(["prompt", "score", "base", "score", "adapter"], table, [1, 3])


def what_of(gate: Mapping[str, Any]) -> str:
    """Return what a gate measures, with the reason where it does not apply."""
    if gate["status"] in (OFF, NONE):
        return gate["sentence"]
    # the numbers have columns of their own
    return gate["sentence"].partition(":")[0]


def examples(base: Sequence[Scored], run: Sequence[Scored]) -> list[tuple[Scored, Scored]]:
    """Return the first answers of both policies to the same prompts."""
    # reversed, so that of several answers to a prompt the first stays
    first = {answer.prompt: answer for answer in reversed(base)}
    both = [(first[answer.prompt], answer) for answer in run if answer.prompt in first]
    return both[:EXAMPLES]


def read_verdict(folder: str | Path) -> dict[str, Any]:
    """Return what verdict.json in a folder says."""
    return json.loads((Path(folder) / "verdict.json").read_text(encoding="utf-8"))
