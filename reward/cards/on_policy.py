"""Pairs of the policy that RL starts from, and the true score of a pair's answers.

A reward model is trained on some answers and then scores others: those of the policy. Its accuracy
there is what RL can build on.
"""

import contextlib
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reward.cards.accuracy import (
    accuracy_with_interval,
    difference_with_interval,
    pair_accuracy,
)
from reward.cards.bias import correlation
from reward.cards.calibration import with_temperature
from reward.cards.card import distribution
from reward.cards.pairs import ScoredPairs, with_a_winner
from rlhf.data.load import load
from rlhf.data.records import Preference, Samples, Scorer, prompt_group
from rlhf.data.sources import is_store, split_event
from rlhf.data.store import Store
from rlhf.errors import UserError


def on_policy_pairs(
    source: str, gold: Scorer | None, trained_on: Collection[str] = ()
) -> tuple[list[Preference], str]:
    """Return the labelled pairs of a store or file, and what labelled them: "votes" or "gold".

    The votes of people are taken where there are any; else the true score labels the pairs of a
    store. Pairs whose prompts the reward model was trained on (`trained_on`, hashes of first user
    turns) are left out. Raises UserError where nothing is left.
    """
    labels = "votes"
    if is_store(source) and not _has_votes(source):
        if gold is None:
            raise UserError(
                f"{source}: nobody has judged its pairs. Collect votes (rlhf collect serve), or give the true score "
                "that labels them: --gold '[{voice: voice.yaml}]'"
            )
        # votes count before gold: they are what RL is to please
        pairs, labels = _labelled_by(gold, source), "gold"
    else:
        pairs = with_a_winner(load(source, Preference))

    # on prompts it was trained on the model would look better than it is
    known = set(trained_on)
    kept = [pair for pair in pairs if prompt_group(pair.prompt) not in known]
    if not kept:
        raise UserError(
            f"{source}: the reward model was trained on the prompts of all its {len(pairs)} pairs. Sample on other "
            "prompts: rlhf collect sample --data PROMPTS"
        )
    return kept, labels


def _has_votes(source: str) -> bool:
    name, event = split_event(source)
    with Store.open(name, readonly=True) as store:
        choices = store.at(event).stats()["choices"]
    return bool(choices["a"] + choices["b"])


def _labelled_by(gold: Scorer, source: str) -> list[Preference]:
    """Return the comparisons of a store with the better answer by gold first; equal ones are left
    out.
    """
    name, event = split_event(source)
    with Store.open(name, readonly=True) as store:
        view = store.at(event)
        found = [pair for pair in view.pairs().values() if pair["kind"] == "normal"]
        prompts = {str(row["prompt"]): row for row in view.prompt_rows()}
    if not found:
        raise UserError(f"{source}: has no comparisons; make some with: rlhf collect sample")
    gaps = gold_gaps(gold, [_as_preference(pair, prompts, better="a") for pair in found])
    labelled = []
    for pair, gap in zip(found, gaps, strict=True):
        if gap:
            labelled.append(_as_preference(pair, prompts, better="a" if gap > 0 else "b"))
    return labelled


def _as_preference(pair: dict[str, Any], prompts: dict[str, dict], better: str) -> Preference:
    worse = "b" if better == "a" else "a"
    prompt = prompts[str(pair["messages"])]
    return Preference(
        prompt=pair["messages"],
        chosen=pair[f"text_{better}"],
        rejected=pair[f"text_{worse}"],
        # 0: cut off; None: not known, which counts as ended
        chosen_ended=pair[f"ended_{better}"] != 0,
        rejected_ended=pair[f"ended_{worse}"] != 0,
        group=prompt.get("group") or prompt["default_group"],
        voice=prompt.get("voice"),
        source=prompt["source"],
        metadata=prompt["metadata"],
    )


def gold_gaps(gold: Scorer, pairs: Sequence[Preference]) -> np.ndarray:
    """Return (n,) true score of the chosen answer less that of the rejected one; it reads texts and
    metadata.
    """
    # a voice may need the facts of the prompt, and its channel
    samples = Samples()
    for pair in pairs:
        voice = {"voice": pair.voice} if pair.voice else {}
        metadata = pair.metadata | {"group": pair.group} | voice
        samples.add(pair.prompt, pair.chosen, metadata, ended=pair.chosen_ended)
        samples.add(pair.prompt, pair.rejected, metadata, ended=pair.rejected_ended)
    scores = np.array(gold(samples).total, float)
    return scores[::2] - scores[1::2]


def sampled_by(sources: Sequence[str]) -> set[str | None]:
    """Return the models that have written the answers of stores, as they were named; None where
    nobody knows (files, Hub data sets).
    """
    # answers of one other policy are enough to say no
    models: set[str | None] = set()
    for source in sources:
        if not is_store(source):
            models.add(None)
            continue
        with Store.open(split_event(source)[0], readonly=True) as store:
            for pair in store.at().pairs().values():
                models |= {pair["model_a"], pair["model_b"]}
    return models


def same_policy(
    sources: Sequence[str], policy: str, accuracy: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the on-policy part of a card whose held-out pairs are answers of `policy` themselves;
    None where they are not, or nobody knows.
    """
    with contextlib.suppress(UserError):
        if sampled_by(sources) == {policy}:
            return {"labels": "held-out", "source": policy, "accuracy": accuracy}
    return None


def on_policy_card(
    scored: ScoredPairs,
    held_out: ScoredPairs,
    temperature: float | None,
    source: str,
    labels: str,
    held_out_gold: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return the part of a card about pairs of the policy, beside the held-out ones.

    held_out_gold: (n,) true score of the chosen held-out answer less that of the rejected one.
    Where gold labels the policy's pairs it labels the held-out ones too, as people err: against
    their votes any model is less often right.
    {"accuracy", "held_out": the accuracy there, "difference": the former less the latter, over the
    groups of both, "calibration": at the temperature of the held-out pairs, "scores": of all its
    answers, "length_correlation"}.
    """
    gaps, there = scored.gaps, held_out.gaps
    groups = held_out.groups
    if labels == "gold":
        there = (np.sign(held_out_gold) * there)[held_out_gold != 0]
        groups = groups[held_out_gold != 0]
    right, held_out_right = pair_accuracy(gaps), pair_accuracy(there)
    return {
        "source": Path(source).name,
        "labels": labels,
        "pairs": len(gaps),
        "accuracy": accuracy_with_interval(right, scored.groups),
        "held_out": accuracy_with_interval(held_out_right, groups),
        "difference": difference_with_interval(right, scored.groups, held_out_right, groups),
        "calibration": with_temperature(gaps, scored.groups, temperature or math.inf),
        "scores": distribution(np.concatenate([scored.chosen, scored.rejected])),
        "length_correlation": correlation(gaps, scored.length_gaps),
    }
