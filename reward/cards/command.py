"""`rlhf reward card`: the report card of a trained reward model, on its held-out pairs and others."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config import option
from rlhf.errors import UserError, did_you_mean, near_file
from rlhf.model.files import read_reward

CATEGORY = "category"


@dataclass(kw_only=True)
class Scoring:
    """Scoring."""

    batch_size: int = option(32, "answers scored together", low=1)
    max_prompt_length: int | None = option(
        None, "tokens; longer prompts are left out; default: the run's", low=1
    )
    max_response_length: int | None = option(
        None, "tokens with EOS; longer answers are left out; default: the run's", low=1
    )


@dataclass(kw_only=True)
class CardConfig(Scoring):
    """Write the report card of a reward model: can it be trusted before RL starts?"""

    run: str = option(help="the reward model: the folder of its run, or a Hub name")
    pairs: list[str] | None = option(
        None, "other preference pairs to judge it on; default: those of its run"
    )
    split: Literal["validation", "test", "all"] | None = option(
        None, "which of the pairs; default: validation of the run's, all of --pairs"
    )
    on_policy: str | None = option(
        None,
        "a store or file with pairs of answers of the policy that RL starts from (rlhf collect sample), labelled by "
        "votes or by --gold",
    )
    gold: list[dict[str, Any]] | None = option(
        None,
        "scorers of the true reward, where it is known: what labels --on_policy and what bias is measured against",
    )
    rewardbench: str | None = option(
        None, "rows of RewardBench 2: a file, or allenai/reward-bench-2@test"
    )
    category: str = option(CATEGORY, "field of the pairs' metadata to list the accuracy by")
    output_dir: str | None = option(
        None, "where card.json, card.md and the figures go; default: the run's folder"
    )
    json: bool = option(False, "print the card as JSON instead of its verdict")

    def validate(self) -> None:
        if self.gold is not None:
            from reward.compose import check_scorers

            check_scorers(self.gold, where="gold")
        for source in (self.on_policy, self.rewardbench):
            check_exists(source)
        if self.output_dir is None and not Path(self.run).is_dir():
            raise UserError(
                f"{self.run}: no such folder{near_file(self.run)}. The card of a model on the Hub needs a folder of "
                "its own: --output_dir FOLDER"
            )


def check_exists(source: str | None) -> None:
    """Raise UserError for a file that is missing: it would be read after the pairs were scored."""
    from rlhf.data.sources import is_path, split_event

    if source is None:
        return
    name, _ = split_event(source)
    if is_path(name) and not Path(name).exists():
        raise UserError(f"{source}: no such file{near_file(name)}")


def make_card(config: CardConfig) -> dict[str, Any]:
    """Score the pairs, write the card and print its verdict; returns the card."""
    from reward.files import check_reward_files

    # before torch is imported, which takes seconds
    check_reward_files(config.run)
    from reward.cards.card import report_card
    from reward.cards.pairs import pairs_of_run, run_config
    from reward.compose import build_scorer
    from reward.model import load_reward

    # None for a model of the Hub
    trained = run_config(config.run)
    pairs = judged_pairs(config, trained)
    measure = Measured(config, trained, load_reward(config.run))
    # built once, for bias and for the policy's pairs
    if config.gold:
        measure.gold = build_scorer(config.gold)

    scored = measure.score(pairs, "pairs")
    # a temperature fitted on the run's held-out pairs holds for all others
    is_fitted_here = config.pairs is None and config.split in (None, "validation")
    temperature = None if is_fitted_here else read_reward(config.run).get("temperature")
    card = report_card(
        scored,
        title=Path(config.run).name,
        training=pairs_of_run(trained, "train") if trained else None,
        gold_gaps=measure.gold_gaps(scored.pairs),
        category=config.category,
        temperature=temperature,
    )
    if is_fitted_here:
        keep_temperature(config.run, card["calibration"]["temperature"])
    # what takes further scoring comes last, so that a mistake there costs least
    measure.add_sections(card, scored)
    show(card, config)
    return card


def judged_pairs(config: CardConfig, trained: Any) -> list[Any]:
    """Return the pairs that the card is about. Raises UserError where there are none."""
    from reward.cards.pairs import pairs_of_run, with_a_winner
    from rlhf.data.load import load
    from rlhf.data.records import Preference

    if config.pairs:
        split = None if config.split in (None, "all") else config.split
        pairs = with_a_winner(load(config.pairs, Preference, split=split))
    elif trained is None:
        raise UserError(
            f"{config.run}: has no config.yaml that says which pairs were held out; give them: --pairs FILE"
        )
    elif config.split == "all":
        raise UserError("split all: the run was trained on most of its pairs; give others: --pairs")
    else:
        pairs = pairs_of_run(trained, config.split or "validation")
    if not pairs:
        where = ", ".join(config.pairs or trained.data)
        raise UserError(f"{where}: no pair is in its split; give some: --pairs FILE")
    check_category(config.category, pairs)
    return pairs


def check_category(category: str, pairs: list[Any]) -> None:
    """Raise UserError where no pair has the field that was asked for."""
    known: set[str] = set()
    for pair in pairs:
        known.update(pair.metadata)
    if category != CATEGORY and category not in known:
        raise UserError(
            f"--category {category}: no pair has this field in its metadata.{did_you_mean(category, known)} "
            f"Known: {', '.join(sorted(known)) or 'none'}"
        )


@dataclass
class Measured:
    """A loaded reward model, and what is measured with it beside the pairs."""

    config: CardConfig
    trained: Any
    reward: Any
    gold: Any = None

    @property
    def lengths(self) -> tuple[int, int]:
        """Return the longest prompt and response, in tokens."""
        config = self.config
        return (
            config.max_prompt_length or getattr(self.trained, "max_prompt_length", 512),
            config.max_response_length or getattr(self.trained, "max_response_length", 512),
        )

    def score(self, pairs: list[Any], what: str) -> Any:
        from reward.cards.pairs import score_pairs

        size = self.config.batch_size
        return score_pairs(self.reward, pairs, *self.lengths, batch_size=size, what=what)

    def gold_gaps(self, pairs: list[Any]) -> Any:
        from reward.cards.on_policy import gold_gaps

        return None if self.gold is None else gold_gaps(self.gold, pairs)

    def add_sections(self, card: dict[str, Any], held_out: Any) -> None:
        """Add what the options ask for, and what the run's folder holds already."""
        from reward.cards.learning_curve import FILE
        from reward.cards.on_policy import on_policy_card, same_policy
        from reward.cards.rewardbench import benchmark

        config = self.config
        if config.on_policy:
            part, labels = self._on_policy_pairs()
            card["on_policy"] = on_policy_card(
                part,
                held_out,
                card["calibration"]["temperature"],
                config.on_policy,
                labels,
                self.gold_gaps(held_out.pairs),
            )
        elif self.trained is not None and config.pairs is None:
            card["on_policy"] = same_policy(
                self.trained.data, self.trained.model_name_or_path, card["accuracy"]
            )
        if config.rewardbench:
            card["rewardbench"] = benchmark(
                self.reward, config.rewardbench, *self.lengths, config.batch_size
            )
        curve = Path(config.run) / FILE
        if curve.is_file():
            card["learning_curve"] = json.loads(curve.read_text(encoding="utf-8"))

    def _on_policy_pairs(self) -> tuple[Any, str]:
        from reward.cards.on_policy import on_policy_pairs
        from rlhf.runs.rows import TRAINED_ON

        file = Path(self.config.run) / TRAINED_ON
        trained_on = file.read_text().split() if file.is_file() else []
        pairs, labels = on_policy_pairs(self.config.on_policy, self.gold, trained_on)
        return self.score(pairs, "pairs of the policy"), labels


def keep_temperature(run: str, temperature: float | None) -> None:
    """Write the temperature into the run's reward.json where it has none yet.

    One that is there stays: another machine's rounding would make it another file, and a PPO run
    that learns from the model could not be resumed.
    """
    from reward.model import write_reward

    kept = read_reward(run)
    if kept and "temperature" not in kept:
        write_reward(run, **kept, temperature=temperature)


def show(card: dict[str, Any], config: CardConfig) -> None:
    """Write the files of the card, and print its verdict or all of it."""
    from reward.cards.page import write_card

    path = write_card(card, config.output_dir or config.run)
    if config.json:
        print(json.dumps(card, indent=2, ensure_ascii=False))
        return
    accuracy = card["accuracy"]
    interval = ""
    # one group has none
    if accuracy["low"] is not None:
        interval = f" ({accuracy['low']:.3f} to {accuracy['high']:.3f})"
    print(f"{card['title']}: {card['verdict']}; accuracy {accuracy['accuracy']:.3f}{interval}")
    for reason in card["reasons"]:
        print(f"- {reason['severity']}: {reason['sentence']}")
    print(f"report card: {path}")
