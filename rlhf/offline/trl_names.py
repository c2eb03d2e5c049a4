"""TRL's log names in our vocabulary (names as logged by TRL 1.16 and transformers 5.23)."""

from typing import Literal

from rlhf.runs.metrics import is_known

COMMON = {
    "loss": "loss/total",
    "grad_norm": "grad/norm",
    "learning_rate": "learning_rate",
    "epoch": "epoch",
    "num_tokens": "budget/tokens_trained",
    "aux_loss": "loss/router",
    "train_tokens_per_second": "time/tokens_per_second",
    "train_runtime": "time/train",
}
GIVEN_TEXT = {"entropy": "token/entropy", "mean_token_accuracy": "token/accuracy"}
TRL_NAMES: dict[str, dict[str, str]] = {
    "sft": {**COMMON, **GIVEN_TEXT},
    "reward": {
        **COMMON,
        "accuracy": "reward/accuracy",
        "margin": "reward/margin",
        "log_loss": "reward/log_loss",
        "tie_parameter": "reward/tie_parameter",
        "min_reward": "reward/min",
        "mean_reward": "reward/mean",
        "max_reward": "reward/max",
    },
    "dpo": {
        **COMMON,
        **GIVEN_TEXT,
        "rewards/chosen": "dpo/reward_chosen",
        "rewards/rejected": "dpo/reward_rejected",
        "rewards/accuracies": "dpo/reward_accuracy",
        "rewards/margins": "dpo/reward_margin",
        "logps/chosen": "dpo/logprob_chosen",
        "logps/rejected": "dpo/logprob_rejected",
        "logits/chosen": "dpo/logit_chosen",
        "logits/rejected": "dpo/logit_rejected",
    },
}
# Speeds follow from time/; total_flos has its own idea of a flop (budget/flops is ours); train_loss
# is a mean over the whole run in the place of a step; the evaluation's num_tokens counts training.
DROPPED = {
    "total_flos",
    "train_loss",
    "num_input_tokens_seen",
    "eval_num_tokens",
    "eval_epoch",
    "step",
}


def rename_trl(logs: dict[str, float], stage: Literal["sft", "reward", "dpo"]) -> dict[str, float]:
    """Return TRL's (and transformers') log names in our vocabulary; `eval_x` becomes
    `eval/<x renamed>`.

    Names that are ours already pass and win over renamed ones (a callback may have counted
    `budget/tokens_trained`). What has no name here is kept as `trl/<name>`, so that no number of a
    newer TRL is lost.
    """
    names = TRL_NAMES[stage]
    ours = {name: value for name, value in logs.items() if is_known(name)}
    renamed = {}
    for name, value in logs.items():
        if (
            name in ours
            or name in DROPPED
            or name.endswith(("_samples_per_second", "_steps_per_second"))
        ):
            continue
        if name == "eval_runtime":
            renamed["time/evaluate"] = value
        elif name in names:
            renamed[names[name]] = value
        elif name.startswith("eval_"):
            rest = name[len("eval_") :]
            renamed["eval/" + names.get(rest, f"trl/{rest}")] = value
        else:
            renamed[f"trl/{name}"] = value
    return {**renamed, **ours}
