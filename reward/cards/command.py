"""`rlhf reward card`: the report card of a trained reward model, from its run or from any pairs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rlhf.config import option
from rlhf.errors import UserError


@dataclass(kw_only=True)
class CardConfig:
    """Write the report card of a reward model: can it be trusted before RL starts?"""

    run: str = option(help="the reward model: the folder of its run, or a Hub name")
    pairs: list[str] | None = option(
        None, "preference pairs to judge it on; default: those that its run held out"
    )
    output_dir: str | None = option(
        None, "where card.json, card.md and the figures go; default: the run's folder"
    )
    batch_size: int = option(32, "answers scored together", low=1)
    max_prompt_length: int | None = option(
        None, "tokens; longer prompts are left out; default: the run's", low=1
    )
    max_response_length: int | None = option(
        None, "tokens with EOS; longer answers are left out; default: the run's", low=1
    )
    json: bool = option(False, "print the card as JSON instead of its verdict")


def make_card(config: CardConfig) -> dict[str, Any]:
    """Score the pairs, write the card and print what it says; returns the card."""
    from pathlib import Path

    from reward.cards.card import doubts, report_card
    from reward.cards.page import write_card
    from reward.cards.pairs import pairs_of_run, run_config, score_pairs
    from reward.model import load_reward
    from rlhf.data.load import load
    from rlhf.data.records import Preference

    trained = run_config(config.run)
    if config.pairs is None and trained is None:
        raise UserError(
            f"{config.run}: has no config.yaml that says which pairs were held out; give them: --pairs FILE"
        )
    pairs = load(config.pairs, Preference) if config.pairs else pairs_of_run(trained, "validation")
    if not pairs:
        raise UserError(f"{config.run}: its run held out no pairs; give some: --pairs FILE")

    limits = [
        config.max_prompt_length or getattr(trained, "max_prompt_length", 512),
        config.max_response_length or getattr(trained, "max_response_length", 512),
    ]
    reward = load_reward(config.run)
    scored = score_pairs(reward, pairs, *limits, batch_size=config.batch_size)
    card = report_card(
        scored.pairs,
        scored.chosen,
        scored.rejected,
        scored.chosen_lengths,
        scored.rejected_lengths,
        title=Path(config.run).name,
    )
    path = write_card(card, config.output_dir or config.run)
    if config.json:
        print(json.dumps(card, indent=2, ensure_ascii=False))
    else:
        for doubt in doubts(card):
            print(f"WARNING: {doubt}")
        print(f"report card: {path}")
    return card
