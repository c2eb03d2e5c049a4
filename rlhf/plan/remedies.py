"""Which one option makes a run fit that does not."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rlhf.errors import UserError
from rlhf.plan.devices import Device
from rlhf.plan.run import Plan, plan_run

# phases whose passes are over rows of training, and over rows that are sampled
LEARNING, SAMPLING = {"learn", "measure", "reference"}, {"sample", "evaluate"}


def what_fits(program: str, options: Any, config: Any, device: Device, found: Plan) -> str:
    """Return the first option, of those that cost least time, with which the run fits."""
    too_large = {phase.name for phase in found.phases if phase.total > found.usable}
    nearest, least = "", found.peak.total
    for changes, touched in candidates(program, options, found):
        # it cannot help where another phase is too large as well
        if touched and not too_large <= touched:
            continue
        try:
            other = plan_run(program, replace(options, **changes), config, device)
        # options that do not go together
        except UserError:
            continue
        named = ", ".join(f"{name}: {str(value).lower()}" for name, value in changes.items())
        if other.fits:
            return f"It fits with {named} ({other.peak.total / 1e9:.1f} GB)."
        if other.peak.total < least:
            nearest, least = named, other.peak.total
    if not nearest:
        return "No single option makes it fit."
    return f"No single option makes it fit; nearest is {nearest}, with {least / 1e9:.1f} GB."


def candidates(
    program: str, options: Any, found: Plan
) -> Iterator[tuple[dict[str, Any], set[str]]]:
    """Yield changes of one option, and the phases that they make smaller; empty: all."""
    if not options.gradient_checkpointing:
        yield {"gradient_checkpointing": True}, {"learn"}
    yield from smaller_passes(program, options)
    for size in halves(getattr(options, "generation_batch_size", 1), 4):
        yield {"generation_batch_size": size}, SAMPLING
    is_whole = not options.use_peft
    if is_whole and options.optim == "adamw":
        yield {"optim": "adamw_8bit"}, set()
    is_packed = options.load_in_4bit or options.load_in_8bit
    if not is_whole and not is_packed and found.stage != 3:
        yield {"load_in_8bit": True}, set()
        yield {"load_in_4bit": True}, set()
    if found.stage is not None:
        names = ["zero2", "zero3"] if found.ranks > 1 else []
        for number, name in enumerate([*names, "zero3_offload"]):
            if found.stage < 2 + number or name == "zero3_offload":
                yield {"deepspeed": name}, set()
    if is_whole:
        yield {"use_peft": True}, set()


def smaller_passes(program: str, options: Any) -> Iterator[tuple[dict[str, Any], set[str]]]:
    """Yield changes that put less through one pass and learn from as many rows."""
    if program == "ppo":
        longest = options.max_prompt_length + options.max_response_length
        for tokens in halves(options.micro_batch_tokens or 16_384, longest):
            yield {"micro_batch_tokens": tokens}, LEARNING
        return
    for size in halves(options.per_device_train_batch_size, 1):
        passes = options.gradient_accumulation_steps * options.per_device_train_batch_size // size
        yield {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}, LEARNING


def halves(size: int, least: int) -> Iterator[int]:
    """Yield the half of a size, its half, ... down to `least`."""
    while size // 2 >= least:
        size //= 2
        yield size
