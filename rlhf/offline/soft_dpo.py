"""TRL's DPOTrainer for pairs whose label is not certain: a probability and a weight for each row.

TRL 1.16 has neither: its `sigmoid` loss ignores `label_smoothing` and takes no weight. All else is TRL's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from rlhf.adapters import frozen_copy
from rlhf.config import UserError

SOFT = {"label_prob": math.nan, "weight": 1.0}  # columns a row may have, and what none means


def soft_dpo_loss(
    delta: Tensor,
    beta: float,
    *,
    label_prob: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO's loss of each row with the probability p that `chosen` is the better one, and the row's weight w.

        L = -w [ p log sigmoid(beta delta) + (1 - p) log sigmoid(-beta delta) ]

    delta: (B,) log-ratio of the chosen response to the reference less that of the rejected one. p = w = 1 is Rafailov
    et al. 2023, eq. 7; p = 1 - label_smoothing is Mitchell 2023, "A note on DPO with noisy preferences". It is
    least where sigmoid(beta delta) = p. label_prob, weight: (B,) or None; a row without a soft label has NaN there and
    takes 1 - label_smoothing. Returns (B,).
    """
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))  # a bf16 label_prob would have 3 digits
    p = torch.full_like(delta, 1.0 - label_smoothing)
    if label_prob is not None:
        p = torch.where(label_prob.isnan(), p, label_prob.to(delta.dtype))
    rows = -p * F.logsigmoid(beta * delta) - (1 - p) * F.logsigmoid(-beta * delta)
    return rows if weight is None else rows * weight.to(delta.dtype)


def soft_rows(encoded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `encode_preferences` for a DPO trainer: ids, and label_prob and weight where any record has them.

    Weights are divided by their mean, so that they do not change the step size.
    """
    records = [row["record"] for row in encoded]
    rows = [{name: value for name, value in row.items() if name != "record"} for row in encoded]
    if any(record.label_prob is not None for record in records):
        for row, record in zip(rows, records, strict=True):
            row["label_prob"] = SOFT["label_prob"] if record.label_prob is None else float(record.label_prob)
    total = sum(record.weight for record in records)
    if any(record.weight != 1.0 for record in records) and total > 0:
        for row, record in zip(rows, records, strict=True):
            row["weight"] = record.weight * len(records) / total
    return rows


def plain_trl(args: Any) -> str | None:
    """Why these TRL options leave no room for soft labels and weights; None where they do."""
    if list(args.loss_type) != ["sigmoid"]:
        return f"loss_type {', '.join(args.loss_type)}"
    for name, usual in (("f_divergence_type", "reverse_kl"), ("use_weighting", False), ("ld_alpha", None)):
        value = getattr(args, name)
        if getattr(value, "value", value) != usual:
            return name
    return "loss_weights" if args.loss_weights not in (None, [1.0]) else None


@dataclass
class SoftCollator(DataCollatorForPreference):
    """TRL's collator, with the (B,) columns of `SOFT` that the rows have."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        for name, nothing in SOFT.items():
            if name in examples[0]:
                values = [nothing if row[name] is None else row[name] for row in examples]  # Arrow may keep NaN as None
                batch[name] = torch.tensor(values, dtype=torch.float32)
        return batch


class EncodedDPOTrainer(DPOTrainer):
    """TRL's, on rows that already are ids, encoded as for every other stage.

    The reference is the adapter "ref", all of the policy's adapter at the start: TRL's own copy leaves out LoRA on
    embeddings and trainable tokens.
    """

    def __init__(self, model, ref_model=None, **kwargs):
        if ref_model is None and hasattr(model, "peft_config"):
            if "ref" not in model.peft_config:
                frozen_copy(model, "default", "ref")
            model.add_adapter = lambda name, config: None  # TRL would add its copy
        super().__init__(model=model, ref_model=ref_model, **kwargs)
        vars(model).pop("add_adapter", None)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class SoftDPOTrainer(EncodedDPOTrainer):
    """The same with `soft_dpo_loss` in the place of TRL's `sigmoid`; its forward passes and all it logs stay TRL's.

    Rows come from `soft_rows`, `data_collator` is a `SoftCollator`. Refuses (ValueError) what `plain_trl` names.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if reason := plain_trl(self.args):
            raise ValueError(f"soft labels and weights do not go with {reason}")

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in SOFT if name not in self._signature_columns]

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k not in SOFT})

    def _compute_loss(self, model, inputs, return_outputs):
        soft = {name: inputs[name] for name in SOFT if name in inputs}
        inputs = {name: value for name, value in inputs.items() if name not in SOFT}
        if "ref_chosen_logps" not in inputs:
            reference = self.model if self.ref_model is None else self.ref_model
            chosen, rejected = self.compute_ref_log_probs(reference, inputs)
            inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        seen = []

        def monitored(**kwargs):
            seen.append(model(**kwargs))
            return seen[-1]

        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True  # they are in `inputs`
        try:
            result = super()._compute_loss(monitored, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        theirs, outputs = result if return_outputs else (result, None)
        length = inputs["completion_mask"].size(1) - 1  # prompt-learning adapters put virtual tokens before
        chosen, rejected = seen[0].log_probs[:, -length:].sum(dim=1).chunk(2)
        delta = (chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"])
        rows = soft_dpo_loss(delta, self.beta, **soft, label_smoothing=self.label_smoothing)
        hard = soft_dpo_loss(delta, self.beta)  # what TRL's loss holds, beside a router's auxiliary loss
        loss = theirs + (rows - hard).mean()
        return (loss, outputs) if return_outputs else loss


def dpo_trainer(args: Any, rows: list[dict[str, Any]], pad_token_id: int, log: Callable[[str], None]) -> tuple:
    """(trainer class, data collator) for these TRL options and training rows of `soft_rows`; says what the loss reads.

    TRL's own where no row has a label_prob or weight and no label_smoothing is asked of `sigmoid`, or where the options
    leave no room for them. Raises UserError if that makes label_smoothing do nothing.
    """
    carried, reason = " and ".join(name for name in SOFT if name in rows[0]), plain_trl(args)
    if reason and args.label_smoothing and list(args.loss_type) == ["sigmoid"]:
        raise UserError(f"'label_smoothing' of loss_type sigmoid does not go with {reason}")
    if carried:
        log(f"{reason} does not read {carried} of the pairs" if reason else f"the loss reads {carried} of the pairs")
    if reason or not (carried or args.label_smoothing):
        return EncodedDPOTrainer, None
    return SoftDPOTrainer, SoftCollator(pad_token_id)
