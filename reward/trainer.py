"""TRL's RewardTrainer with our objective: soft labels, weights per pair, scores read at the last
response token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from trl import RewardTrainer as TRLRewardTrainer

from reward.objective import reward_loss
from rlhf.offline.pair_columns import DEFAULTS, add_columns, column_tensors
from rlhf.tensors import pad_right


def pair_rows(encoded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of `encode_preferences` as this trainer reads them: whole sequences, and the
    columns of the data.
    """
    rows = [
        {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}
        for row in encoded
    ]
    add_columns(rows, [row["record"] for row in encoded], DEFAULTS)
    return rows


@dataclass
class PairCollator:
    """Turn rows {chosen_ids, rejected_ids, margin, label_prob, weight} into right-padded tensors.

    input_ids and attention_mask are (2B, L), chosen rows first; the three extras are (B,), absent
    where no row of the data has them.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        return {
            "input_ids": pad_right(ids, self.pad_token_id),
            "attention_mask": pad_right([[1] * len(row) for row in ids]),
            **column_tensors(rows),
        }


class RewardTrainer(TRLRewardTrainer):
    """Train on tokenized rows (prompt + response ids in `chosen_ids` and `rejected_ids`) and a
    model of reward.model.

    Logs what TRL logs, but `accuracy` counts a tie as half. `label_smoothing` is the chance that a
    pair without a label_prob of its own is labelled the wrong way round.
    """

    def __init__(self, *args, label_smoothing: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.label_smoothing = label_smoothing

    # transformers would drop the columns that are no arguments of the model's forward
    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["chosen_ids", "rejected_ids", *DEFAULTS]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        extras = {name: inputs[name] for name in DEFAULTS if name in inputs}
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**batch, use_cache=False, paired=True)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        loss, metrics = reward_loss(
            chosen,
            rejected,
            **extras,
            label_smoothing=self.label_smoothing,
            center_coefficient=self.args.center_rewards_coefficient or 0.0,
        )
        self._record(mode, inputs["attention_mask"], outputs.logits.detach(), metrics)
        return (loss, outputs) if return_outputs else loss

    def _record(
        self, mode: str, attention_mask: Tensor, scores: Tensor, metrics: dict[str, Tensor]
    ) -> None:
        gather = self.accelerator.gather_for_metrics
        if mode == "train":
            self._total_train_tokens += int(gather(attention_mask.sum()).sum())
        log = self._metrics[mode]
        log["num_tokens"] = [self._total_train_tokens]
        # over all ranks, as TRL does with its own metrics
        scores = gather(scores)
        log["min_reward"].append(scores.min().item())
        log["mean_reward"].append(scores.mean().item())
        log["max_reward"].append(scores.max().item())
        for name in ("accuracy", "margin"):
            log[name].append(gather(metrics[name]).mean().item())
