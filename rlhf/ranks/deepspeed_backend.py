"""DeepSpeed: the only file that imports it, and what it has to be told about our models."""

import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import UserError

# What is used of DeepSpeed beside its documented calls, as in this version: functions and classes, which
# `check_version` looks for at the start of a program; attributes of ZeRO's optimizer by stage; and those
# that it gives to parameters. No other version's are known.
MADE_FOR = "0.19.8"
ZERO_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
ZERO_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
NAMES = (
    "deepspeed.constants:default_pg_timeout",
    "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
    "deepspeed.runtime.zero:register_external_parameter",
    # TRL asks for this mark on weights
    "deepspeed.runtime.zero.partition_parameters:ZeroParamStatus.AVAILABLE",
    # norms by group, and a norm of NaN for a step that is discarded
    f"{ZERO_2}.get_grad_norm_direct",
    f"{ZERO_2}.complete_grad_norm_calculation_for_cpu_offload",
    f"{ZERO_2}.scaled_global_norm",
    f"{ZERO_3}.get_grad_norm_direct",
    f"{ZERO_3}.complete_grad_norm_calculation_for_cpu_offload",
    f"{ZERO_3}._get_norm_groups",
)
OF_ZERO_2 = (
    # steps that are dropped, of weights in bfloat16
    "check_grad_overflow",
    # a state written by another number of ranks
    *("optimizer", "bit16_groups", "single_partition_of_fp32_groups"),
    # float64
    *("parallel_partitioned_bit16_groups", "ipg_buckets", "communication_data_type"),
    *("gradient_accumulation_dtype", "master_weights_and_grads_dtype", "averaged_gradients"),
    *("use_separate_grad_accum", "use_grad_accum_attribute"),
)
OF_ZERO_3 = (
    # a state written by another number of ranks
    *("optimizer", "fp16_groups", "fp32_partitioned_groups_flat", "sub_group_to_group_id"),
    # passes of a step that do not go through engine.forward
    *("micro_step_id", "grad_partitions_flat_buffer"),
)
OF_PARAMETERS = {
    1: ("_hp_mapping",),
    2: ("_hp_mapping",),
    3: (
        *("ds_id", "ds_numel", "ds_shape", "ds_tensor", "ds_persist", "ds_zero_partition_rank"),
        # as they are loaded, and layer by layer
        *("convert_to_zero_parameters", "all_gather", "partition"),
    ),
}

# between the time after which a rank counts as hanging and that of a collective operation
MARGIN_SECONDS = 600.0


def init_process_group(hang_timeout: float = 0.0) -> None:
    """Connect the ranks that the launcher has started.

    Their collective operations wait longer than `hang_timeout` seconds, after which a rank that hangs
    is named; they would only end.
    """
    import deepspeed

    check_version()
    from deepspeed.constants import default_pg_timeout

    longer = timedelta(seconds=hang_timeout + MARGIN_SECONDS)
    deepspeed.init_distributed(verbose=False, timeout=max(default_pg_timeout, longer))


def initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine for a module and its optimizer."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    check_engine(engine)
    return engine


def check_version() -> None:
    """Raise UserError unless DeepSpeed has all functions and classes of `NAMES`."""
    for name in NAMES:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            raise unknown_version(name) from None


def check_engine(engine: Any) -> None:
    """Raise UserError unless the engine's optimizer and parameters are of the form that is used here."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return
    for name in OF_ZERO_3 if stage == 3 else OF_ZERO_2:
        if not hasattr(engine.optimizer, name):
            raise unknown_version(f"{type(engine.optimizer).__name__}.{name} in ZeRO {stage}")
    trained = next(parameter for parameter in engine.module.parameters() if parameter.requires_grad)
    for name in OF_PARAMETERS[stage]:
        if not hasattr(trained, name):
            raise unknown_version(f"'{name}' on the parameters of ZeRO {stage}")


def unknown_version(name: str) -> UserError:
    import deepspeed

    return UserError(
        f"DeepSpeed {deepspeed.__version__} has no {name}, which is used here as in {MADE_FOR}. Install that version: "
        f"pip install deepspeed=={MADE_FOR}"
    )


def zero_config_class() -> type:
    """Return the pydantic model of the `zero_optimization` section."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig


@contextmanager
def gathered(parameters: Iterable[Any], modify: bool = False) -> Iterator[None]:
    """Make those of the parameters whole that ZeRO-3 has divided among ranks; otherwise do nothing.

    All ranks enter it together. With `modify`, what rank 0 changes in them is kept on all ranks.
    Forward passes inside need `without_hooks`.
    """
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0 if modify else None):
        yield


def divider(settings: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """Return a function that divides a parameter as the engine of ZeRO-3 with these settings would.

    All ranks divide the same parameters in the same order; the main rank's numbers count.
    """
    import deepspeed

    zero = {k: v for k, v in settings["zero_optimization"].items() if v != "auto"}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    # one that is divided already divides others, as DeepSpeed's engine does with new ones
    # drawn from, the random generator would give a new adapter other weights than without ZeRO-3
    first = nn.utils.skip_init(nn.Linear, 1, 1, bias=False)
    deepspeed.zero.Init(module=first, config_dict_or_path=config)

    def divide(parameter: nn.Parameter) -> None:
        # what the file holds need not be read by a rank whose numbers are not taken, nor written to
        is_main = torch.distributed.get_rank() == 0
        values = parameter.data.contiguous() if is_main else torch.empty_like(parameter.data)
        parameter.data = values.contiguous()
        first.weight.convert_to_zero_parameters(param_list=[parameter])

    return divide


@contextmanager
def without_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Make passes inside without ZeRO-3's hooks, by which ranks gather parameters together."""
    removed: list[tuple[dict, dict]] = []
    for module in {part for root in modules for part in root.modules()}:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            ours = {key: hook for key, hook in hooks.items() if not _is_deepspeeds(hook)}
            if len(ours) < len(hooks):
                removed.append((hooks, dict(hooks)))
                _refill(hooks, ours)
    try:
        yield
    finally:
        for hooks, before in removed:
            _refill(hooks, before | hooks)


def _is_deepspeeds(hook: Callable[..., Any]) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("deepspeed.")


def _refill(hooks: dict, content: dict) -> None:
    # in place: whoever registered a hook removes it from this dict
    hooks.clear()
    hooks.update(content)


@contextmanager
def known_to_peft() -> Iterator[None]:
    """Let PEFT know inside that weights are divided, so that it gathers those that it reads."""
    from transformers.integrations import deepspeed as known

    before = known._hf_deepspeed_config_weak_ref
    config = known.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        yield
    finally:
        del config
        known._hf_deepspeed_config_weak_ref = before


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
