"""The options of SFT, the reward model and DPO, which train on given rows through TRL."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from rlhf.config import option
from rlhf.errors import UserError, did_you_mean
from rlhf.library_names import optimizers, trl_options
from rlhf.options.guards import OFFLINE_GUARDS, check_guards
from rlhf.options.shared import AdapterConfig, RunConfig, SamplingConfig

Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
# The losses for which TRL reads label_smoothing, besides sigmoid alone.
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}
# transformers' schedules by name
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
]  # fmt: skip
# options of TRL that a program of this package cannot follow, by what takes their place
REPLACED = {
    "upload the finished run: rlhf export RUN --to merged --push_to_hub USER/NAME": (
        *("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_strategy"),
        *("hub_always_push", "hub_revision"),
    ),
    "checkpoints are written by save_steps and save_total_limit, and resumed from by resume": (
        *("save_strategy", "save_only_model", "save_on_each_node", "enable_jit_checkpoint"),
        *("resume_from_checkpoint", "restore_callback_states_from_checkpoint", "ignore_data_skip"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    ),
    "evaluation follows eval_steps": (
        *("eval_strategy", "eval_delay", "eval_on_start", "batch_eval_metrics"),
        *("include_for_metrics", "prediction_loss_only", "do_train", "do_eval", "do_predict"),
    ),
    "set dtype, which decides in what numbers is computed": (
        *("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"),
    ),
    "devices are those of the launcher (deepspeed, torchrun), and weights are divided by --deepspeed": (
        *("use_cpu", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config"),
        *("auto_find_batch_size", "local_rank", "ddp_backend", "debug"),
    ),
    "model, tokenizer and template are those of model_name_or_path": (
        *("model_init_kwargs", "trust_remote_code", "chat_template_path", "eos_token", "pad_token"),
    ),
    "give the rows in a form of docs/data.md": ("dataset_text_field", "dataset_kwargs"),
}


@dataclass(kw_only=True)
class TrainerConfig(AdapterConfig):
    """Training through TRL, under TRL's names."""

    use_peft: bool = option(True, "train LoRA adapters; false: train the whole model")
    num_train_epochs: float = option(1.0, "passes over the data", resume="free", above=0)
    max_steps: int = option(-1, "stop after this many steps; -1: by epochs", resume="free", low=-1)
    gradient_accumulation_steps: int = option(
        1, "forward and backward passes before each step", low=1
    )
    lr_scheduler_type: Schedule = option("linear", "course of the step size, as in transformers")
    warmup_steps: float = option(
        0.0, "warm-up steps of the learning rate; below 1: a share of all steps", low=0
    )
    weight_decay: float = option(0.0, "weight decay of AdamW", low=0)
    guards: dict = option(
        {},
        "guards by name: a threshold, an action or a mapping, or off; see docs/guards.md",
        resume="free",
    )
    trl: dict = option({}, "any further option of TRL's config for this stage, by its name")

    def validate(self) -> None:
        super().validate()
        if self.max_steps == 0:
            raise UserError(
                "'max_steps' is 0, expected -1 (by epochs) or at least 1: a run needs at least one step"
            )
        known = ["adamw", *optimizers()]
        # without transformers' own there is nothing to compare with
        if self.optim not in known and known[1:]:
            near = did_you_mean(self.optim, known)
            raise UserError(f"'optim' is '{self.optim}', expected one of {', '.join(known)}.{near}")
        for name, value in self.trl.items():
            if hasattr(self, name):
                raise UserError(f"trl: '{name}' is an option of this program: --{name} {value}")
            for instead, names in REPLACED.items():
                if name in names:
                    raise UserError(f"trl: '{name}' is not handed on to TRL: {instead}")


def check_trl(trl: dict[str, Any], config: str, known: Iterable[str] = ()) -> None:
    """Raise UserError for a name under `trl:` that TRL's class `config` does not have, and for one that
    needs a package which is not here.

    known: the names of its options; default: those in TRL's source.
    """
    names = known or (trl_options(config) if trl else [])
    for name in trl:
        if names and name not in names:
            raise UserError(f"trl: '{name}' is no option of {config}.{did_you_mean(name, names)}")
    if trl.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        raise UserError(
            "trl: 'use_liger_kernel' needs a package that is not installed. Install it with: pip install liger-kernel"
        )


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
        check_trl(self.trl, "SFTConfig")
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
        check_trl(self.trl, "RewardConfig")
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
        check_trl(self.trl, "DPOConfig")
        if (
            self.label_smoothing
            and self.loss_type != ["sigmoid"]
            and SMOOTHED.isdisjoint(self.loss_type)
        ):
            raise UserError(
                f"'label_smoothing' has no effect on loss_type {', '.join(self.loss_type)} in TRL; use sigmoid "
                "alone or robust"
            )
