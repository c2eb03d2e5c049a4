"""The command `rlhf plan`."""

import contextlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlhf.config import option, parse
from rlhf.errors import UserError, near_file
from rlhf.options.programs import PROGRAMS, command_of, programs_of


@dataclass(kw_only=True)
class PlanConfig:
    """What a run will take, before it starts: memory by rank and phase, FLOPs, time and cost.

    No weights are loaded and no GPU is needed: config.json is read, and the passes are made on
    tensors without memory.
    """

    file: str = option(help="the options of a program, as for launch/: configs/sft.yaml")
    program: Literal["auto", "sft", "reward", "dpo", "ppo"] = option(
        "auto",
        "the program that the options are for; auto: the one that knows them, or that the file is named after",
    )
    options: dict = option(
        {}, "options to plan with instead, e.g. {lora_r: 64, load_in_4bit: true}"
    )
    model: str | None = option(
        None,
        "a folder with the base's config.json, or a Hub name; default: model_name_or_path. Where that is a run "
        "that is not there yet, the plan takes it for an adapter on this model",
    )
    gpus: int = option(1, "ranks, each with a device of its own", low=1)
    gpu: str = option("H100", "the devices, e.g. A100, H200 or RTX-4090, or cpu: this machine")
    gpu_memory: str | None = option(None, "memory of each, e.g. 80GB; default: that of the GPU")
    price: float | None = option(None, "price of a GPU for an hour, for the cost", low=0)
    launched: bool = option(
        True, "started by deepspeed or torchrun; false: by plain python, where ZeRO is off"
    )
    rows: int | None = option(
        None, "rows of the training data; default: those of its files, where they are here", low=1
    )
    prompt_tokens: int | None = option(
        None, "mean tokens of a prompt, for the time; default: max_prompt_length", low=1
    )
    response_tokens: int | None = option(
        None, "mean tokens of a response, for the time; default: max_response_length", low=1
    )
    json: bool = option(False, "print JSON instead of tables")

    def validate(self) -> None:
        if not Path(self.file).is_file():
            raise UserError(f"{self.file}: no such file{near_file(self.file)}")
        if self.gpus > 1 and not self.launched:
            raise UserError("several ranks need a launcher: leave --launched out, or take --gpus 1")


def read_program(config: PlanConfig) -> tuple[str, Any]:
    """Return the program and its options. Raises UserError where the file does not tell the program."""
    program = config.program
    if program == "auto":
        program, *others = programs_of(config.file)
        if others:
            choices = " or ".join([program, *others])
            raise UserError(f"{config.file}: which program is it for? --program {choices}")
    flags = [f"--{name}={json.dumps(value)}" for name, value in config.options.items()]
    given = ["--config", config.file, *flags]
    return program, parse(PROGRAMS[program], given, command_of(program))


def plan(config: PlanConfig) -> None:
    """Print what a run will take."""
    program, options = read_program(config)

    # torch takes seconds to import: not before the options are checked
    from rlhf.plan.devices import find_gpu, read_bytes, this_cpu
    from rlhf.plan.page import show
    from rlhf.plan.remedies import what_fits
    from rlhf.plan.run import plan_run

    # libraries print when they are imported, and JSON is to be read by programs
    with contextlib.redirect_stdout(sys.stderr):
        if config.gpu == "cpu":
            dtype = "float32" if options.dtype == "auto" else options.dtype
            device = this_cpu(dtype, config.gpus)
        else:
            device = find_gpu(config.gpu)
        if config.gpu_memory:
            device = replace(device, memory=read_bytes(config.gpu_memory))
        found = plan_run(program, options, config, device)
        remedy = "" if found.fits else what_fits(program, options, config, device, found)
    if config.json:
        print(json.dumps(asdict(found) | {"remedy": remedy}, indent=2))
    else:
        show(found, remedy)
