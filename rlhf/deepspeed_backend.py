"""DeepSpeed: the only file that imports it, and what it has to be told about our models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def init_process_group() -> None:
    """Connect the ranks that the launcher has started."""
    import deepspeed

    deepspeed.init_distributed(verbose=False)


def initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine for a module and its optimizer."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def zero_config_class() -> type:
    """Return the pydantic model of the `zero_optimization` section."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig


@contextmanager
def gathered(
    module: nn.Module,
    parameters: list[nn.Parameter] | None = None,
    modify: bool = False,
) -> Iterator[None]:
    """Make the parameters of a module whole that ZeRO-3 has divided among ranks; otherwise do
    nothing.

    With `modify`, what rank 0 changes in them is kept on all ranks. Ranks may make different
    numbers of forward passes
    inside: without a claim on the parameters the first pass would release them, and each later one
    would gather them again, which all ranks have to do together.
    """
    divided = [
        parameter for parameter in parameters or module.parameters() if hasattr(parameter, "ds_id")
    ]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0 if modify else None):
        for parameter in divided:
            parameter.ds_active_sub_modules.add(gathered)
        try:
            yield
        finally:
            for parameter in divided:
                parameter.ds_active_sub_modules.discard(gathered)


def register_foreign_reads(module: nn.Module) -> None:
    """Tell ZeRO-3 which parameters PEFT reads in the forward pass of another module than their own.

    ZeRO-3 gathers a module's parameters when that module is called: never those in a ParameterDict
    (LoRA on embeddings, trainable tokens), nor the embeddings that the rows of trainable tokens are
    put into.
    """
    from deepspeed.runtime.zero import register_external_parameter
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from transformers import PreTrainedModel

    causal = next(part for part in module.modules() if isinstance(part, PreTrainedModel))
    for reader in module.modules():
        read = []
        for child in reader.children():
            if isinstance(child, nn.ParameterDict):
                read += child.values()
        if isinstance(reader, TrainableTokensLayer):
            read.append(reader.get_base_layer().weight)
            # TRL reads the head's weight in the model's own forward pass
            for parameter in read:
                register_external_parameter(causal, parameter)
            reader.get_merged_weights = _marked_as_gathered(reader.get_merged_weights)
        for parameter in read:
            register_external_parameter(reader, parameter)


def _marked_as_gathered(weight_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `weight_of` with a mark on its tensors by which TRL takes them for gathered parameters
    of ZeRO-3.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    def marked(*args: Any) -> Tensor:
        weight = weight_of(*args)
        weight.ds_status = ZeroParamStatus.AVAILABLE
        return weight

    return marked


def record_norms(optimizer: Any, norms: list[Tensor]) -> None:
    """Let ZeRO's optimizer add to `norms` the gradient norm of each group, over all ranks, as it
    measures them.
    """

    def recorded(measure: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def measure_and_record(*args: Any) -> Tensor:
            norms.append(measure(*args))
            return norms[-1]

        return measure_and_record

    # the second where the optimizer's state is offloaded
    for name in ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload"):
        setattr(optimizer, name, recorded(getattr(optimizer, name)))


def keep_float64(
    optimizer: Any,
    rank: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    norms: list[Tensor],
) -> None:
    """Let ZeRO 1 and 2 work in float64: otherwise gradients, their norm and updates are float32 for
    any model.

    Each step adds the gradient norm of each group to `norms`.
    """
    for own, parts in zip(
        optimizer.single_partition_of_fp32_groups,
        optimizer.parallel_partitioned_bit16_groups,
        strict=True,
    ):
        own.data = parts[rank].detach().clone()
    # the buckets of gradients on their way are keyed by the dtype they travel in
    (bucket,) = optimizer.ipg_buckets.values()
    optimizer.ipg_buckets = {torch.float64: bucket}
    optimizer.communication_data_type = torch.float64
    optimizer.gradient_accumulation_dtype = torch.float64
    optimizer.master_weights_and_grads_dtype = torch.float64
    optimizer.use_separate_grad_accum = False
    optimizer.use_grad_accum_attribute = False

    def norm() -> Tensor:
        squares, running = 0, []
        for group in optimizer.averaged_gradients.values():
            for gradient in group:
                squares = squares + gradient.square().sum()
            running.append(squares)
        sums = sum_over_ranks(torch.stack(running))
        norms.extend(torch.diff(sums, prepend=sums.new_zeros(1)).sqrt())
        return sums[-1].sqrt()

    optimizer.scaled_global_norm = norm
