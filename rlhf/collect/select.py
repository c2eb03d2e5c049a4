"""Which pairs of answers to put to a vote: those from which a reward model would learn most.

With Delta_i = r_i(a) - r_i(b), the difference in score by member i of K reward models, and its mean
over them m = (1/K) sum_i Delta_i, a pair comes the sooner the larger is

    uncertainty    -|sigmoid(m) - 1/2|: the vote is least certain. Uncertainty sampling (Lewis and
                   Gale 1994); of pairs of answers the smallest margin (Yang et al. 2024, arXiv
                   2406.17312). sigmoid(m) is the chance of Bradley and Terry (1952).
    disagreement   the standard deviation of Delta_i over members (over K): the models know least
                   (Christiano et al. 2017, arXiv 1706.03741, section 2.2.4). Two models or more.
    margin         |m|: the models are most certain, and a vote against them corrects most (Muldrew et
                   al. 2024, arXiv 2402.08114). The smallest margin would be `uncertainty` once more.
    random         a number drawn from seed, prompt and answers: the control.

A policy and its reference are one model: r = log p(response) - log p_reference(response), DPO's
implicit reward over beta (Rafailov et al. 2023, eq. 5). No order here depends on beta, or on a
common factor of the scores.
"""

import itertools
import json
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf.collect.pairs import Paired, all_pairs, is_different, prompt_digest
from rlhf.data.records import Samples, Scorer, digest
from rlhf.data.store import Store
from rlhf.errors import UserError
from rlhf.files import model_fingerprint
from rlhf.row_file import add_rows, continue_scores

# a prompt's digest and two texts
PairKey = tuple[str, frozenset[str]]
# answers that are scored between two writes
PART = 512

Rule = Literal["uncertainty", "disagreement", "margin", "random"]


def worth(
    rule: Rule, scores: Sequence[Sequence[float]], pairs: Sequence[tuple[int, int]]
) -> list[float]:
    """Return how much a vote on each pair is worth by a rule other than random; larger comes first.

    scores: K lists of B, by each member of each sample; pairs: numbers of samples.
    """
    table = np.asarray(scores, dtype=float)
    one, other = np.asarray(pairs, dtype=int).reshape(-1, 2).T
    differences = table[:, one] - table[:, other]
    margins = np.abs(differences.mean(axis=0))
    if rule == "disagreement":
        return differences.std(axis=0).tolist()
    # |sigmoid(m) - 1/2| grows with |m|; as a float it is 1/2 for all m above 37
    return (margins if rule == "margin" else -margins).tolist()


def choose(
    values: Sequence[float],
    prompts: Sequence[Hashable],
    budget: int | None = None,
    asked: Mapping[Hashable, int] | None = None,
) -> list[int]:
    """Return the numbers of `budget` pairs, those of the largest values first, equal ones in order.

    No prompt gets a further pair while another has fewer, since pairs of one prompt share its
    answers: a batch of the largest values alone repeats itself (Kirsch et al. 2019, arXiv
    1906.08158). prompts: of each pair. asked: pairs of each prompt that have been put to a vote
    before. Without a budget each prompt that has none gets one.
    """
    order = sorted(range(len(values)), key=lambda number: -values[number])
    counts = Counter(asked or {})
    turns = {}
    for number in order:
        turns[number] = counts[prompts[number]]
        counts[prompts[number]] += 1
    if budget is None:
        return [number for number in order if turns[number] == 0]
    return sorted(order, key=lambda number: (turns[number], -values[number]))[:budget]


def check_selection(config: Any) -> None:
    """Raise UserError for options of `SampleConfig` about which pairs to store that do not fit."""
    rule, models = config.select, config.select_by
    if rule is None:
        for name in ("select_by", "select_reference", "pairs"):
            if getattr(config, name):
                raise UserError(
                    f"'{name}' needs a rule: --select uncertainty, disagreement, margin or random "
                    "('select_by' alone meant disagreement)"
                )
        return
    if config.runs:
        raise UserError(
            "'select' would bend the win rate of 'runs': votes that decide between policies need all pairs"
        )
    if (rule == "random") == bool(models):
        expected = (
            "none" if rule == "random" else "reward models, or a policy with 'select_reference'"
        )
        raise UserError(f"'select_by' is {', '.join(models) or 'empty'}; {rule} takes {expected}")
    if config.select_reference and len(models) != 1:
        raise UserError(
            "'select_reference' is the reference of one policy: give that in 'select_by'"
        )
    if rule == "disagreement" and len(models) < 2:
        raise UserError(
            f"'select_by' is {models[0]}: disagreement takes two or more reward models; one has "
            "uncertainty and margin"
        )


def select_pairs(
    paired: list[Paired], config: Any, scorer: Scorer | None
) -> tuple[list[Paired], dict[str, int]]:
    """Return the pairs to put to a vote, each by itself, and counts. Pairs that have a vote already
    are left out, so that a call after the votes is the next round.

    scorer: of `select_by`; its breakdown holds the scores of each member. Raises UserError where no
    pair is left.
    """
    answered = answered_pairs(config.store)
    left, keys = [], []
    for own in paired:
        for pair in all_pairs(own.sides):
            key = pair_key(own.prompt.prompt, *(answer["text"] for answer in pair))
            if is_different(*pair) and key not in answered:
                left.append(Paired(own.prompt, [[answer] for answer in pair]))
                keys.append(key)
    if not left:
        raise UserError(
            f"{config.store}: every pair of these answers has a vote. Ask for more with "
            "--samples_per_prompt or --prompts"
        )

    if scorer is None:
        # by what they are, whatever else there is to choose from
        values = [
            random.Random(f"select {config.seed} {prompt} {sorted(texts)}").random()
            for prompt, texts in keys
        ]
    else:
        samples, places = samples_of(paired)
        models = [*config.select_by, *filter(None, [config.select_reference])]
        scores = kept_scores(Path(f"{config.store}.scores.jsonl"), models, samples, scorer)
        numbers = [(places[id(own.sides[0][0])], places[id(own.sides[1][0])]) for own in left]
        values = worth(config.select, scores, numbers)

    prompts = [prompt for prompt, _ in keys]
    asked = Counter(prompt for prompt, _ in answered)
    kept = [left[number] for number in choose(values, prompts, config.pairs, asked)]
    answers = {id(side[0]) for own in kept for side in own.sides}
    return kept, {
        "prompts": len({id(own.prompt) for own in kept}),
        "responses": len(answers),
        "comparisons": len(kept),
        "candidates": len(left),
    }


def pair_key(prompt: list[dict[str, Any]], one: str, other: str) -> PairKey:
    return prompt_digest(prompt), frozenset((one.strip(), other.strip()))


def answered_pairs(path: str) -> set[PairKey]:
    """Return the pairs of a store that somebody has judged; a skip, and a model's vote, is no
    judgement. None of a store that is not there.
    """
    if not Path(path).is_file():
        return set()
    with Store.open(path, readonly=True) as store:
        view = store.at()
        judged = set()
        for vote in view.votes():
            if vote.choice != "skip" and vote.source != "judge":
                judged.add(vote.comparison)
        pairs = view.pairs()
    return {
        pair_key(pairs[id]["messages"], pairs[id]["text_a"], pairs[id]["text_b"]) for id in judged
    }


def samples_of(paired: list[Paired]) -> tuple[Samples, dict[int, int]]:
    """Return every answer as scorers read it, and {id of the answer: its number}."""
    samples, places = Samples(), {}
    for own in paired:
        for answer in itertools.chain.from_iterable(own.sides):
            places[id(answer)] = len(samples)
            # without ids: those of the policy's tokenizer need not be the reward models'. None: not
            # known, which counts as ended
            ended = answer["ended"] is not False
            samples.add(own.prompt.prompt, answer["text"], own.prompt.metadata, ended=ended)
    return samples, places


def kept_scores(
    file: Path, models: list[str], samples: Samples, scorer: Scorer
) -> list[list[float]]:
    """Return the scores of each member, a list of B each; those in the file are not made again.

    A file of other models or answers is rewritten.
    """
    from tqdm import tqdm

    texts = [map(prompt_digest, samples.prompts), samples.responses, samples.ended]
    made_from = {
        "models": list(map(model_fingerprint, models)),
        "answers": digest(json.dumps(list(zip(*texts, strict=True)))),
    }
    rows = continue_scores(file, made_from, "models or answers")
    total = len(samples)
    with tqdm(total=total, initial=len(rows), desc="scoring", unit="answer", mininterval=5) as bar:
        while len(rows) < total:
            part = slice(len(rows), len(rows) + PART)
            columns = [getattr(samples, name)[part] for name in Samples.__dataclass_fields__]
            members = scorer(Samples(*columns)).breakdown
            new = [
                dict(zip(members, scores, strict=True))
                for scores in zip(*members.values(), strict=True)
            ]
            add_rows(file, new)
            rows += new
            bar.update(len(new))
    return [[row[name] for row in rows] for name in rows[0]]
