"""DeepSpeed JSON files: read, and compared with the options of a program."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.errors import UserError, did_you_mean
from rlhf.ranks.deepspeed_backend import zero_config_class
from rlhf.ranks.distributed import DistributedContext

SHIPPED = Path(__file__).parent.parent / "configs" / "deepspeed"
ZERO = "zero_optimization"
# what options decide: single keys, and sections
DECIDED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
SECTIONS = ("optimizer", "scheduler", "bf16", "fp16")
# what a file may decide: how memory and time are spent, and what is logged
FREE = (
    ZERO,
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "activation_checkpointing",
    "aio",
    "communication_data_type",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "checkpoint",
    "disable_allgather",
    "compile",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "tensorboard",
    "csv_monitor",
    "wandb",
    "log_level",
)
KNOWN = (*FREE, *DECIDED, *SECTIONS)
SCHEDULES = {
    "linear": "WarmupDecayLR",
    "cosine": "WarmupCosineLR",
    "constant": "WarmupLR",
    "constant_with_warmup": "WarmupLR",
}


class Decided(NamedTuple):
    """A value that options decide, and what a message calls the option."""

    value: Any
    option: str


def read_deepspeed_config(
    path: str | None, world: DistributedContext, options: Any = None
) -> dict[str, Any] | None:
    """Return the DeepSpeed JSON as a dict, or None for a process without a launcher.

    `path` is a file, or the name of a shipped one. With a program's `options`, whatever they decide
    is "auto" in the result. Raises UserError on a file that is not a DeepSpeed JSON, or that
    contradicts the options.
    """
    if not world.launched or path is None:
        return None
    file = Path(path)
    if not file.is_file():
        file = SHIPPED / f"{file.stem}.json"
    if not file.is_file():
        names = sorted(shipped.stem for shipped in SHIPPED.glob("*.json"))
        raise UserError(
            f"deepspeed: no file '{path}'.{did_you_mean(path, names)} Shipped: {', '.join(names)}"
        )
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {error.lineno}: not valid JSON: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    return check_deepspeed_config(content, str(file), world, options)


def check_deepspeed_config(
    config: Any, where: str, world: DistributedContext, options: Any = None
) -> dict[str, Any]:
    """Return the DeepSpeed JSON with "auto" for all that options decide, without optimizer and
    scheduler.

    PyTorch's AdamW and the program's own schedule are used under DeepSpeed too. Raises UserError on
    unknown keys, a missing ZeRO stage, and values other than "auto" that contradict the options.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(config).__name__}")
    for key in config:
        if key not in KNOWN:
            raise UserError(
                f"{where}: '{key}' is not read from a DeepSpeed JSON here.{did_you_mean(key, KNOWN)} "
                "A file of accelerate or of another program is not a DeepSpeed JSON; rlhf/configs/deepspeed has some"
            )
    _check_zero(config.get(ZERO), where)
    if options is not None:
        problems = _contradictions(config, _decided_by(options, world))
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise UserError(
                f'{where} contradicts the options; write "auto" there, or change the option:\n{lines}'
            )
    kept = {key: value for key, value in config.items() if key not in SECTIONS}
    kept |= dict.fromkeys(DECIDED, "auto") | {"bf16": {"enabled": "auto"}}
    if offloads(config[ZERO], "optimizer"):
        # PyTorch's AdamW updates what is offloaded too; DeepSpeed would insist on its own
        kept["zero_force_ds_cpu_optimizer"] = False
    # DeepSpeed takes optimizers of other libraries only when told to
    if getattr(options, "optim", "adamw") != "adamw":
        kept["zero_allow_untested_optimizer"] = True
    return kept


def _check_zero(zero: Any, where: str) -> None:
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        without = f'{{"{ZERO}": {{"stage": 0}}}}'
        raise UserError(
            f"{where}: {ZERO}.stage is {stage!r}, expected 0 to 3; without ZeRO write {without}"
        )
    for what, least in (("optimizer", 1), ("param", 3)):
        if stage < least and offloads(zero, what):
            raise UserError(
                f"{where}: {ZERO}.offload_{what} has no effect in stage {stage}, which divides none of it. Take stage "
                f"{least}{' to 3' * (least < 3)}, or leave it out"
            )
    cls = zero_config_class()
    try:
        cls(**{key: value for key, value in zero.items() if value != "auto"})
    except ValueError as error:
        # pydantic's: the first of its problems is enough
        first = error.errors()[0]
        place = ".".join(map(str, (ZERO, *first["loc"])))
        near = ""
        if first["type"] == "extra_forbidden":
            near = did_you_mean(str(first["loc"][-1]), cls.model_fields)
        raise UserError(f"{where}: {place}: {first['msg']}.{near}") from None


def offloads(zero: dict[str, Any], what: str) -> bool:
    """Return whether optimizer state or parameters ("optimizer", "param") are kept off the device."""
    settings = zero.get(f"offload_{what}")
    return isinstance(settings, dict) and settings.get("device", "none") != "none"


def _decided_by(options: Any, world: DistributedContext) -> dict[str, Decided]:
    """Return what a program's options make of each value of a DeepSpeed JSON, by its dotted name."""
    size, rate = options.per_device_train_batch_size, options.learning_rate
    # PPO has no gradient accumulation, weight decay, warm-up or `trl`
    passes = getattr(options, "gradient_accumulation_steps", 1)
    trl = getattr(options, "trl", {})
    betas = [trl.get("adam_beta1", 0.9), trl.get("adam_beta2", 0.999)]
    epsilon = getattr(options, "adam_epsilon", trl.get("adam_epsilon", 1e-8))
    uses_bfloat16 = options.dtype == "bfloat16" or (
        options.dtype == "auto" and world.device.type == "cuda"
    )
    schedule = options.lr_scheduler_type
    optimizer = _optimizer_type(getattr(options, "optim", "adamw"))
    return {
        "train_micro_batch_size_per_gpu": Decided(size, "per_device_train_batch_size"),
        "gradient_accumulation_steps": Decided(passes, "gradient_accumulation_steps (1 in PPO)"),
        "train_batch_size": Decided(
            size * passes * world.size,
            "per_device_train_batch_size x gradient_accumulation_steps x processes",
        ),
        "gradient_clipping": Decided(options.max_grad_norm, "max_grad_norm"),
        "bf16.enabled": Decided(uses_bfloat16, "dtype bfloat16"),
        "fp16.enabled": Decided(False, "dtype float16"),
        "optimizer.type": Decided(optimizer, "the optimizer"),
        "optimizer.params.lr": Decided(rate, "learning_rate"),
        "optimizer.params.betas": Decided(betas, "trl: {adam_beta1, adam_beta2}"),
        "optimizer.params.eps": Decided(epsilon, "adam_epsilon (outside PPO under trl:)"),
        "optimizer.params.weight_decay": Decided(
            getattr(options, "weight_decay", 0.0), "weight_decay"
        ),
        "scheduler.type": Decided(SCHEDULES.get(schedule), f"lr_scheduler_type {schedule}"),
        "scheduler.params.warmup_min_lr": Decided(0, "the first step size of lr_scheduler_type"),
        "scheduler.params.warmup_max_lr": Decided(rate, "learning_rate"),
        "scheduler.params.warmup_num_steps": Decided(
            getattr(options, "warmup_steps", 0), "warmup_steps"
        ),
    }


def _optimizer_type(optim: str) -> str:
    """Return the name that a DeepSpeed JSON may give to the program's optimizer."""
    return "AdamW" if optim == "adamw" else optim


def _contradictions(config: dict[str, Any], decided: dict[str, Decided]) -> list[str]:
    """Return a line for each value in the file that the options do not have."""
    lines = []
    for key, value in _leaves(
        {key: config[key] for key in (*DECIDED, *SECTIONS) if key in config}
    ).items():
        is_precision_detail = key.startswith(("bf16.", "fp16.")) and key not in decided
        # DeepSpeed's Adam decays weights as AdamW does
        is_adam = key == "optimizer.type" and str(value).lower() in ("adam", "adamw")
        is_adam = is_adam and decided[key].value == "AdamW"
        if value == "auto" or is_precision_detail or is_adam:
            continue
        if key not in decided:
            lines.append(f"{key}: {json.dumps(value)}, which no option has")
        elif value != decided[key].value:
            lines.append(
                f"{key}: {json.dumps(value)}, but {decided[key].option} is {json.dumps(decided[key].value)}"
            )
    return lines


def _leaves(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their dotted names, without null."""
    found = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value
    return found
