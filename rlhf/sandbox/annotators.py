"""`rlhf sandbox annotate`: simulated annotators, who prefer by the gold score with noise and have
habits of their own.

An annotator who sees responses a and b prefers a with probability (Bradley and Terry 1952)

    p = sigmoid( (gold(a) - gold(b)) / noise + length_bias * (words(a) - words(b)) / 10 +- side_bias )   + if a is left

and says that they are equal with the probability of a third outcome (Rao and Kupper 1967), whose
width is `ties`. Votes go into the preference store that people use, under names that say they are
simulated.
"""

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from rlhf.config import SEED, option
from rlhf.data.agreement import agreement_summary
from rlhf.data.annotator_report import describe_alpha
from rlhf.data.load import load
from rlhf.data.records import Prompt, Samples, Scorer
from rlhf.data.store import Store
from rlhf.data.votes import Vote
from rlhf.errors import UserError
from rlhf.sandbox import SHOP_VOICE


@dataclass(frozen=True)
class Annotator:
    """One simulated person. Biases are in units of the logit, shares are probabilities."""

    name: str
    # for each ten words more
    length_bias: float = 0.0
    # for the response on the left
    side_bias: float = 0.0
    # share of votes that look at nothing
    careless: float = 0.0
    # half the width, in logits, of "they are equal"
    ties: float = 0.3
    # share of comparisons left alone
    skips: float = 0.01
    # calls both bad where neither reaches this gold score
    strict: float = 0.15
    # median time of a vote
    seconds: float = 8.0


ANNOTATORS = (
    Annotator("sim-careful", ties=0.4, skips=0.02, seconds=14.0),
    Annotator("sim-likes-length", length_bias=0.8),
    Annotator("sim-careless", careless=0.25, seconds=3.0),
    Annotator("sim-favours-left", side_bias=0.6),
    Annotator("sim-strict", strict=0.3, ties=0.2, skips=0.03, seconds=11.0),
)


@dataclass(frozen=True)
class Choice:
    """What an annotator answers: choice as the store knows it, strength 1 (slightly) to 3 (much),
    time taken.
    """

    # "a", "b", "tie", "both_bad" or "skip"
    choice: str
    strength: int | None
    duration_ms: int


def choose(
    annotator: Annotator,
    gold: tuple[float, float],
    words: tuple[int, int],
    left: str,
    noise: float,
    rng: random.Random,
) -> Choice:
    """Return the annotator's answer to one comparison; `gold` and `words` are of (a, b), `left` is
    the side shown left.
    """
    duration = round(1000 * annotator.seconds * math.exp(rng.gauss(0.0, 0.5)))
    # every draw is made whatever the answer, so that one annotator's habits do not shift another's
    # luck
    skip, care, side, verdict = (rng.random() for _ in range(4))
    if skip < annotator.skips:
        return Choice("skip", None, duration)
    if care < annotator.careless:
        return Choice("a" if side < 0.5 else "b", 1, duration)
    if max(gold) < annotator.strict:
        return Choice("both_bad", None, duration)
    logit = preference_logit(annotator, gold, words, left, noise)
    p_a, p_b = sigmoid(logit - annotator.ties), sigmoid(-logit - annotator.ties)
    if verdict < p_a:
        return Choice("a", strength_of(logit), duration)
    if verdict >= 1 - p_b:
        return Choice("b", strength_of(-logit), duration)
    return Choice("tie", None, duration)


def preference_logit(
    annotator: Annotator, gold: tuple[float, float], words: tuple[int, int], left: str, noise: float
) -> float:
    """Return log p(a over b) / p(b over a) of the annotator; `noise` is the gold difference worth
    one logit.
    """
    # in favour of what was shown left, whichever response that was
    side = annotator.side_bias if left == "a" else -annotator.side_bias
    return (gold[0] - gold[1]) / noise + annotator.length_bias * (words[0] - words[1]) / 10 + side


def strength_of(logit: float) -> int:
    """Return how much better the chosen one seems: 1 below one logit in its favour, 2 below three,
    else 3.
    """
    if logit < 1:
        return 1
    return 2 if logit < 3 else 3


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)), in the form that does not overflow on either side."""
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))


@dataclass
class AnnotateConfig:
    """Let simulated annotators vote on the comparisons of a preference store, by the gold score
    with noise.
    """

    store: str = option(
        help="the preference store, a SQLite file with comparisons (rlhf collect sample makes them)"
    )
    voice: str = option(
        str(SHOP_VOICE),
        "the brand-voice specification that is the true reward; default: the shop's",
    )
    seed: int = option(
        0, "run seed: who judges which pair, which side is shown left, and the noise", **SEED
    )
    noise: float = option(
        0.2, "difference in gold score (0 to 1) that is worth one logit; larger is noisier", above=0
    )
    votes_per_pair: int = option(
        1,
        f"annotators who judge each comparison, 1 to {len(ANNOTATORS)}",
        low=1,
        high=len(ANNOTATORS),
    )
    judged_by_all: int = option(
        0,
        "number of validation comparisons that every annotator votes on, to measure their agreement",
        low=0,
    )
    habits: bool = option(
        True, "annotators have their biases, ties and skips; false leaves the noise alone"
    )


def annotate(config: AnnotateConfig, gold: Scorer) -> dict[str, Any]:
    """Vote until every comparison has `votes_per_pair` simulated votes; print and return the
    agreement with gold.

    A vote depends on the seed, the comparison and the annotator only, so that an interrupted call
    can be repeated. Of `judged_by_all`, the further votes come after all others and on validation
    pairs: training sees none of them.
    Returned: {"annotators": {name: {"votes", "ties", ..., "agreement"}}, "all": the same over all,
    "comparisons", "between": what `agreement_summary` says of them}. `gold` reads texts and
    metadata; the samples it receives have no ids.
    """
    with Store.open(config.store) as store:
        every = store.at().pairs().values()
        pairs = [pair for pair in every if pair["kind"] == "normal"]
        if not pairs:
            raise UserError(
                f"{config.store}: has no comparisons to judge; make some with: rlhf collect sample"
            )
        scores = gold_scores(pairs, gold)
        names = [annotator.name for annotator in ANNOTATORS]
        known = [vote for vote in store.at().votes() if vote.annotator in names]
        done: dict[int, set[str]] = {}
        for vote in known:
            done.setdefault(vote.comparison, set()).add(vote.annotator)
        ids = {name: store.add_annotator(name, kind="model") for name in names}

        def cast(pair: dict, annotator: Annotator) -> None:
            _vote(store, pair, annotator, ids[annotator.name], scores[pair["id"]], config)
            done.setdefault(pair["id"], set()).add(annotator.name)

        with store.transaction():
            for pair in tqdm(pairs, desc="simulated votes", unit="pair", mininterval=5):
                voted = done.get(pair["id"], set())
                lacking = max(0, config.votes_per_pair - len(voted))
                for annotator in _who_may_judge(config, pair, voted)[:lacking]:
                    cast(pair, annotator)
        # after all others: a vote may join groups, and with them move splits
        shared = _held_out(config, pairs)
        with store.transaction():
            for pair, annotator in itertools.product(shared, ANNOTATORS):
                if annotator.name not in done.get(pair["id"], set()):
                    cast(pair, annotator)
        votes = [vote for vote in store.at().votes() if vote.annotator in names]
    report = agreement(votes, scores)
    words = {pair["id"]: len(f"{pair['text_a']} {pair['text_b']}".split()) for pair in pairs}
    report["between"] = agreement_summary(votes, words=words)
    print(
        f"{config.store}: {len(votes) - len(known)} new votes by simulated annotators, {len(votes)} in all"
    )
    print_agreement(report)
    print(f"{describe_alpha(report['between'])}.")
    for person in report["between"]["annotators"]:
        for flag in person["flags"]:
            print(f"{person['annotator']}: {flag}")
    return report


def agreement(votes: list[Vote], scores: dict[int, tuple[float, float]]) -> dict[str, Any]:
    """Return counts of each choice, and the share of votes for a side that chose more gold; equal
    gold is left out.
    """
    counts: dict[str, Counter] = {}
    for vote in votes:
        a, b = scores[vote.comparison]
        for name in (vote.annotator, "all"):
            count = counts.setdefault(name, Counter())
            count["votes"] += 1
            count[vote.choice] += 1
            if vote.choice in ("a", "b") and a != b:
                count["clear"] += 1
                count["agreed"] += (vote.choice == "a") == (a > b)
    everyone = _row(counts.pop("all", Counter()))
    rows = {name: _row(count) for name, count in sorted(counts.items())}
    return {
        "annotators": rows,
        "all": everyone,
        "comparisons": len({vote.comparison for vote in votes}),
    }


def _row(count: Counter) -> dict[str, Any]:
    """Return what `agreement` says of the votes of one annotator, or of all."""
    return {
        "votes": count["votes"],
        "ties": count["tie"],
        "both_bad": count["both_bad"],
        "skips": count["skip"],
        "agreement": count["agreed"] / count["clear"] if count["clear"] else math.nan,
    }


def print_agreement(report: dict[str, Any]) -> None:
    """Print the record of the annotators as a table."""
    print(
        f"{'annotator':20s} {'votes':>6s} {'ties':>5s} {'both bad':>9s} {'skips':>6s}  agreement with gold"
    )
    for name, row in [*report["annotators"].items(), ("all", report["all"])]:
        counts = f"{row['votes']:6d} {row['ties']:5d} {row['both_bad']:9d} {row['skips']:6d}"
        print(f"{name:20s} {counts}  {row['agreement']:.3f}")


def _who_may_judge(config: AnnotateConfig, pair: dict, voted: set[str]) -> list[Annotator]:
    """Return the annotators who have not voted on a pair, in the order in which they are asked.

    It depends on seed and pair alone, so that a repeated call asks the same.
    """
    rng = random.Random(f"who {config.seed} {pair['id']}")
    order = rng.sample(ANNOTATORS, len(ANNOTATORS))
    return [annotator for annotator in order if annotator.name not in voted]


def _held_out(config: AnnotateConfig, pairs: list[dict]) -> list[dict]:
    """Return comparisons of the validation split, drawn by the seed; after the first votes, when
    groups are what they are.
    """
    if not config.judged_by_all:
        return []
    records = load([config.store], Prompt, split="validation")
    # by their text: mappings cannot be members of a set
    held_out = {json.dumps(record.prompt, sort_keys=True) for record in records}
    found = [pair for pair in pairs if json.dumps(pair["messages"], sort_keys=True) in held_out]
    if len(found) < config.judged_by_all:
        print(
            f"{config.store}: {len(found)} comparisons are held out for validation; all of them are judged by all"
        )
    count = min(config.judged_by_all, len(found))
    return random.Random(f"judged by all {config.seed}").sample(found, count)


def _vote(
    store: Store,
    pair: dict,
    annotator: Annotator,
    id: int,
    gold: tuple[float, float],
    config: AnnotateConfig,
) -> None:
    """Write one annotator's vote on a comparison into the store; `id` is the annotator's there."""
    # the same vote whenever and in whatever order it is cast
    rng = random.Random(f"vote {config.seed} {pair['id']} {annotator.name}")
    left = rng.choice("ab")
    words = (len(pair["text_a"].split()), len(pair["text_b"].split()))
    if not config.habits:
        annotator = Annotator(
            annotator.name, ties=0.0, skips=0.0, strict=-1.0, seconds=annotator.seconds
        )
    answer = choose(annotator, gold, words, left, config.noise, rng)
    store.vote(
        pair["id"],
        id,
        answer.choice,
        left=left,
        strength=answer.strength,
        duration_ms=answer.duration_ms,
    )


def gold_scores(pairs: list[dict], gold: Scorer) -> dict[int, tuple[float, float]]:
    """Return the gold scores of (a, b) by comparison."""
    samples = Samples()
    for pair in pairs:
        for side in "ab":
            # None: not known, which counts as ended
            ended = pair[f"ended_{side}"] != 0
            samples.add(pair["messages"], pair[f"text_{side}"], pair["metadata"], ended=ended)
    total = gold(samples).total
    return {pair["id"]: (total[2 * i], total[2 * i + 1]) for i, pair in enumerate(pairs)}
