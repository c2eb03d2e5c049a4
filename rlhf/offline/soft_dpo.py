"""TRL's DPOTrainer for pairs whose label is not certain: a probability and a weight for each row.

TRL 1.16 has neither: its `sigmoid` loss ignores `label_smoothing` and takes no weight. All else is
TRL's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from rlhf.errors import UserError
from rlhf.model.adapters import frozen_copy
from rlhf.offline.pair_columns import add_columns, column_tensors
from rlhf.offline.reference_cache import REFERENCE, ReferenceCache, row_keys

SOFT = ("label_prob", "weight")  # the columns that the loss reads


def soft_dpo_loss(
    delta: Tensor,
    beta: float,
    *,
    label_prob: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return DPO's loss of each row, with the probability p that `chosen` is the better one, and
    the row's weight w.

        L = -w [ p log sigmoid(beta delta) + (1 - p) log sigmoid(-beta delta) ]

    delta: (B,) log-ratio of the chosen response to the reference less that of the rejected one. p =
    w = 1 is Rafailov et al. 2023, eq. 7; p = 1 - label_smoothing is Mitchell 2023, "A note on DPO
    with noisy preferences". It is least where sigmoid(beta delta) = p. label_prob, weight: (B,) or
    None; a row without a soft label has NaN there and takes 1 - label_smoothing. Returns (B,).
    """
    # in bf16 a label_prob would have 3 digits
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
    p = torch.full_like(delta, 1.0 - label_smoothing)
    if label_prob is not None:
        p = torch.where(label_prob.isnan(), p, label_prob.to(delta.dtype))
    rows = -p * F.logsigmoid(beta * delta) - (1 - p) * F.logsigmoid(-beta * delta)
    return rows if weight is None else rows * weight.to(delta.dtype)


def soft_rows(encoded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of `encode` for a DPO trainer: ids, and the `SOFT` columns that the
    data has.
    """
    rows, records = [], []
    for row in encoded:
        ids = dict(row)
        records.append(ids.pop("record"))
        rows.append(ids)
    add_columns(rows, records, SOFT)
    return rows


def unsupported_option(args: Any) -> str | None:
    """Return the TRL option that soft labels and weights cannot be combined with, or None."""
    if list(args.loss_type) != ["sigmoid"]:
        return f"loss_type {', '.join(args.loss_type)}"
    for name, default in (
        ("f_divergence_type", "reverse_kl"),
        ("use_weighting", False),
        ("ld_alpha", None),
    ):
        value = getattr(args, name)
        if getattr(value, "value", value) != default:
            return name
    return "loss_weights" if args.loss_weights not in (None, [1.0]) else None


@dataclass
class SoftCollator(DataCollatorForPreference):
    """TRL's collator, with the (B,) columns of `SOFT` that the rows have."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call(examples) | column_tensors(examples)


class EncodedDPOTrainer(DPOTrainer):
    """TRL's trainer on rows that already are ids, encoded as for every other stage.

    The reference is `ref_model`, or the adapter `REFERENCE`: all of the policy's adapter at the
    start, since TRL's own copy leaves out LoRA on embeddings and trainable tokens. Its
    log-probabilities are taken from `reference_cache` where that has them, and added to it where
    not.
    """

    def __init__(
        self, model, ref_model=None, reference_cache: ReferenceCache | None = None, **kwargs
    ):
        self.reference_cache = reference_cache
        if ref_model is None and hasattr(model, "peft_config"):
            if REFERENCE not in model.peft_config:
                frozen_copy(model, "default", REFERENCE)
            # TRL would add its own copy
            model.add_adapter = lambda name, config: None
        super().__init__(model=model, ref_model=ref_model, **kwargs)
        vars(model).pop("add_adapter", None)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = self.with_reference(inputs)
        # to TRL it is as if the reference had been computed before training
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            return super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed

    def with_reference(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with the reference's log-probabilities in it."""
        if "ref_chosen_logps" in inputs:
            return inputs
        chosen, rejected = self.reference_logprobs(inputs)
        if self.reference_cache is not None:
            self.reference_cache.pay(row_keys(inputs, self.ld_alpha))
        return inputs | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def reference_logprobs(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return log pi_ref of the chosen and of the rejected responses, both (B,), in nats.

        Where there is a cache, it has to be paid for apart.
        """
        reference, cache = self.ref_model or self.model, self.reference_cache
        if cache is None:
            return self.compute_ref_log_probs(reference, inputs)
        keys = row_keys(inputs, self.ld_alpha)
        is_missing = not all(key in cache for key in keys)
        # under ZeRO-3 all ranks make a pass, or none
        if cache.world.sum(float(is_missing)):
            with cache.budget.apart() as cost:
                logprobs = torch.cat(self.compute_ref_log_probs(reference, inputs))
                # waits for the device
                values = logprobs.tolist()
            cache.add(keys, values, cost)
        else:
            device = inputs["input_ids"].device
            logprobs = torch.tensor(cache.get(keys), dtype=torch.float32, device=device)
        chosen, rejected = logprobs.chunk(2)
        return chosen, rejected


class SoftDPOTrainer(EncodedDPOTrainer):
    """The same with `soft_dpo_loss` in place of TRL's `sigmoid`; its forward passes and its logs
    stay TRL's.

    Rows come from `soft_rows`, `data_collator` is a `SoftCollator`. `dpo_trainer` takes it where
    the options allow that.
    """

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in SOFT if name not in self._signature_columns]

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(model, without_soft(inputs))

    def _compute_loss(self, model, inputs, return_outputs):
        soft = {name: inputs[name] for name in SOFT if name in inputs}
        inputs = self.with_reference(without_soft(inputs))

        # keep the outputs of the forward pass that TRL makes
        passes = []

        def recorded(**kwargs):
            passes.append(model(**kwargs))
            return passes[-1]

        result = super()._compute_loss(recorded, inputs, return_outputs)
        trl_loss, outputs = result if return_outputs else (result, None)

        # prompt-learning adapters put virtual tokens before the completion
        length = inputs["completion_mask"].size(1) - 1
        chosen, rejected = passes[0].log_probs[:, -length:].sum(dim=1).chunk(2)
        delta = (chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"])
        rows = soft_dpo_loss(delta, self.beta, **soft, label_smoothing=self.label_smoothing)
        # TRL's loss holds the hard labels' loss, and maybe a router's auxiliary loss, which stays
        hard_rows = soft_dpo_loss(delta, self.beta)
        loss = trl_loss + (rows - hard_rows).mean()
        return (loss, outputs) if return_outputs else loss


def without_soft(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in SOFT}


def dpo_trainer(
    args: Any,
    rows: list[dict[str, Any]],
    pad_token_id: int,
    log: Callable[[str], None],
) -> tuple[type[EncodedDPOTrainer], SoftCollator | None]:
    """Return the trainer class and data collator for TRL options and rows of `soft_rows`; log what
    the loss reads.

    The loss is TRL's own where no row has a soft column and `sigmoid` has no label_smoothing, or
    where the options do not allow them. Raises UserError if that makes label_smoothing do nothing.
    """
    columns = " and ".join(name for name in SOFT if name in rows[0])
    reason = unsupported_option(args)
    if reason and args.label_smoothing and list(args.loss_type) == ["sigmoid"]:
        raise UserError(f"'label_smoothing' of loss_type sigmoid does not go with {reason}")
    if columns:
        reader = f"{reason} does not read" if reason else "the loss reads"
        log(f"{reader} {columns} of the pairs")
    if reason or not (columns or args.label_smoothing):
        return EncodedDPOTrainer, None
    return SoftDPOTrainer, SoftCollator(pad_token_id)
