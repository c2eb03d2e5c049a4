"""TRL's RewardTrainer with our objective: soft labels, ties, weights per pair, scores read at the
last response token.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from trl import RewardTrainer as TRLRewardTrainer

from reward.objective import reward_loss
from reward.ties import TieParameter
from rlhf.offline.pair_columns import DEFAULTS, OF_RECORDS, add_columns, column_tensors
from rlhf.tensors import pad_right


def pair_rows(encoded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of `encode` as this trainer reads them: whole sequences, and the
    columns of the data.
    """
    rows, records = [], []
    for row in encoded:
        prompt = row["prompt_ids"]
        # a reward model scores whole sequences
        whole = {"chosen_ids": prompt + row["chosen_ids"]}
        whole["rejected_ids"] = prompt + row["rejected_ids"]
        rows.append(whole)
        records.append(row["record"])
    add_columns(rows, records, OF_RECORDS)
    return rows


@dataclass
class PairCollator:
    """Turn rows {chosen_ids, rejected_ids, margin, label_prob, tie_prob, weight, offset} into
    right-padded tensors.

    input_ids and attention_mask are (2B, L), chosen rows first; the extras are (B,), absent where
    no row of the data has them.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = []
        for side in ("chosen_ids", "rejected_ids"):
            ids += [row[side] for row in rows]
        return {
            "input_ids": pad_right(ids, self.pad_token_id),
            "attention_mask": pad_right([[1] * len(row) for row in ids]),
            **column_tensors(rows),
        }


class RewardTrainer(TRLRewardTrainer):
    """Train on tokenized rows (prompt + response ids in `chosen_ids` and `rejected_ids`) and a
    model of reward.model.

    Logs what TRL logs, but `accuracy` counts equal scores as half, and the log-loss. An evaluation
    has `eval_log_loss`, the mean over all held-out pairs. `label_smoothing` is the chance that a
    pair without a label_prob of its own is labelled the wrong way round; `ties` makes the
    likelihood Davidson's.
    """

    def __init__(
        self, *args, label_smoothing: float = 0.0, ties: TieParameter | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.label_smoothing = label_smoothing
        self.ties = ties
        # of the pairs of an evaluation
        self._log_losses: list[float] = []
        if ties is not None:
            self.add_callback(ties)

    # transformers would drop the columns that are no arguments of the model's forward
    def _set_signature_columns_if_needed(self):
        self._signature_columns = ["chosen_ids", "rejected_ids", *DEFAULTS]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        extras = {name: inputs[name] for name in DEFAULTS if name in inputs}
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False, paired=True)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        loss, metrics = self.loss_of(chosen, rejected, extras)
        if self.ties is not None and mode == "train":
            shift = extras.get("offset", 0.0) - extras.get("margin", 0.0)
            self.ties.add(chosen - rejected + shift, extras.get("weight"))
        self._record(mode, inputs["attention_mask"], outputs.logits.detach(), metrics)
        return (loss, outputs) if return_outputs else loss

    def loss_of(
        self, chosen: Tensor, rejected: Tensor, extras: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `reward_loss` of pairs with these scores and columns, under the trainer's options."""
        return reward_loss(
            chosen,
            rejected,
            **extras,
            log_tie=None if self.ties is None else self.ties.log_tie,
            label_smoothing=self.label_smoothing,
            center_coefficient=self.args.center_rewards_coefficient or 0.0,
        )

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._log_losses = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._log_losses:
            mean = sum(self._log_losses) / len(self._log_losses)
            output.metrics[f"{metric_key_prefix}_log_loss"] = mean
        return output

    def _record(
        self, mode: str, attention_mask: Tensor, scores: Tensor, metrics: dict[str, Tensor]
    ) -> None:
        gather = self.accelerator.gather_for_metrics
        if mode == "train":
            self._total_train_tokens += int(gather(attention_mask.sum()).sum())
        log = self._metrics[mode]
        log["num_tokens"] = [self._total_train_tokens]
        # over all ranks, as TRL does with its own metrics; a row for each pair, since what is added
        # to the last batch is dropped by rows
        scores = gather(scores.reshape(2, -1).T.contiguous())
        log["min_reward"].append(scores.min().item())
        log["mean_reward"].append(scores.mean().item())
        log["max_reward"].append(scores.max().item())
        log["margin"].append(gather(metrics["margin"]).mean().item())
        # nan where no pair of a rank has a winner
        accuracy = gather(metrics["accuracy"]).nanmean().item()
        if not math.isnan(accuracy):
            log["accuracy"].append(accuracy)
        log_losses = gather(metrics["log_loss"]).tolist()
        if mode == "train":
            log["log_loss"].append(sum(log_losses) / len(log_losses))
        else:
            self._log_losses += log_losses
        if self.ties is not None:
            log["tie_parameter"].append(math.exp(self.ties.log_tie))
