"""The options of SFT, the reward model and DPO, which train on given rows through TRL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.config import option
from rlhf.errors import UserError
from rlhf.options.guards import OFFLINE_GUARDS, check_guards
from rlhf.options.shared import RunConfig, SamplingConfig, TrainerConfig

Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
# The losses for which TRL reads label_smoothing, besides sigmoid alone.
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}


@dataclass(kw_only=True)
class SFTRunConfig(TrainerConfig, SamplingConfig):
    """Supervised fine-tuning on instructions; the loss is on the assistant's turns and their EOS."""

    train_on: Literal["all", "last"] = option(
        "all",
        "learn all turns of the assistant in a conversation, or the last alone; messages of weight 0 are never learnt",
        before="last",
    )
    learning_rate: float = option(2e-4, "peak step size of AdamW", above=0, high=1)
    merge: bool = option(
        False, "save full weights with the adapter merged in, instead of the adapter"
    )

    def validate(self) -> None:
        super().validate()
        check_guards(self.guards, OFFLINE_GUARDS["sft"])
        if self.merge and not self.use_peft:
            raise UserError("'merge' is true but 'use_peft' is false: there is no adapter to merge")


@dataclass(kw_only=True)
class RewardRunConfig(TrainerConfig, RunConfig):
    """Bradley-Terry reward model on preference pairs, judged on held-out pairs; it samples nothing."""

    learning_rate: float = option(
        1e-4, "peak step size of AdamW; about a tenth of that for full fine-tuning", above=0, high=1
    )
    center_rewards_coefficient: float = option(
        0.01, "weight of (r_chosen + r_rejected)^2, which keeps scores near 0; 0: off", low=0
    )
    label_smoothing: float = option(
        0.0, "probability that a label is wrong, for pairs without a label_prob", low=0, below=0.5
    )
    normalise: Literal["mean", "mean_std", "none"] = option(
        "mean",
        "after training, shift scores so that reference answers have mean 0 (mean_std: and deviation 1)",
    )
    reference_data: list[str] | None = option(
        None,
        "instructions whose answers score 0 on average; default: the chosen answers of the held-out pairs",
    )
    ties: Literal["drop", "soft", "davidson"] = option(
        "drop",
        "pairs and votes without a winner: left out; soft: learnt as a chance of one half; davidson: a third outcome",
    )
    length_correction: bool = option(
        False,
        "learn what the difference in length does not explain, so that the scores leave it out",
    )
    load_best_model_at_end: bool = option(
        False, "save the model of the evaluation with the lowest held-out log-loss", resume="free"
    )
    early_stopping_patience: int = option(
        0,
        "stop after this many evaluations in a row without a lower held-out log-loss, and save the best; 0: never",
        resume="free",
        low=0,
    )

    @property
    def keeps_best(self) -> bool:
        return self.load_best_model_at_end or bool(self.early_stopping_patience)

    def validate(self) -> None:
        super().validate()
        check_guards(self.guards, OFFLINE_GUARDS["reward"])
        if self.keeps_best and not self.eval_steps:
            name = "early_stopping_patience" if self.early_stopping_patience else ""
            raise UserError(
                f"'{name or 'load_best_model_at_end'}' needs evaluations on held-out pairs, but 'eval_steps' is 0. "
                "Set it to the steps between two of them: --eval_steps 50"
            )


@dataclass(kw_only=True)
class DPORunConfig(TrainerConfig, SamplingConfig):
    """DPO on preference pairs, from the SFT policy; the reference is a frozen copy of the initial
    policy.
    """

    learning_rate: float = option(5e-6, "peak step size of AdamW", above=0, high=1)
    beta: float = option(
        0.1,
        "strength of the pull to the reference; a smaller one lets the policy move further",
        above=0,
    )
    loss_type: list[Loss] = option(["sigmoid"], "TRL's losses by name")
    label_smoothing: float = option(
        0.0,
        "probability that a label is wrong, for pairs without a label_prob; read by sigmoid, robust and a few others",
        low=0,
        below=0.5,
    )

    def validate(self) -> None:
        super().validate()
        check_guards(self.guards, OFFLINE_GUARDS["dpo"])
        if (
            self.label_smoothing
            and self.loss_type != ["sigmoid"]
            and SMOOTHED.isdisjoint(self.loss_type)
        ):
            raise UserError(
                f"'label_smoothing' has no effect on loss_type {', '.join(self.loss_type)} in TRL; use sigmoid "
                "alone or robust"
            )
