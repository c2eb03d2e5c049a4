"""What can be known to be wrong before anything is started: every planned command, scorer and judge is looked at."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from rlhf.config import UserError, parse
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.plan import plan

ROOT = Path(__file__).resolve().parent.parent.parent
LONG = 10_000  # steps: a length that every program accepts, where the real one is not known yet


def check_programs(config: ExperimentConfig) -> None:
    """Read every planned command as its program will. Raises UserError naming the part of the file that it refuses."""
    classes: dict[str, type] = {}
    for job in plan(config, {name: LONG for name in config.trained}):
        program = Path(job.command[0]).stem
        if not job.command[0].startswith("launch/"):
            continue
        if program not in classes:
            classes[program] = options_class(program)
        method = job.trial[0] if job.trial else job.name.removeprefix("pilot/")
        part = f"methods: '{method}'" if method in config.methods else job.name
        try:
            parse(classes[program], job.command[1:], f"deepspeed launch/{program}.py")
        except UserError as error:
            raise UserError(f"{part}: {str(error).removeprefix('the command line: ')}") from None


def check_decisions(config: ExperimentConfig) -> None:
    """Raises UserError if what is to decide is what a method learns from, or cannot be asked, or nothing can start."""
    from rlhf.compare.run import identities

    learnt: dict[Any, str] = {}
    for name in config.trained:
        for spec in config.methods[name].get("options", {}).get("reward") or []:
            if spec.get("weight", 1.0):
                learnt |= {identity: name for identity in identities(spec)}
    for option in ("gold", "referee"):
        for spec in getattr(config, option):
            taken = [learnt[identity] for identity in identities(spec) if identity in learnt]
            if taken:
                raise UserError(
                    f"{option} {spec}: '{taken[0]}' learns from it, so it cannot decide; list it in 'others'"
                )
    if config.judge:
        from rlhf.compare.judge import load_judge

        load_judge(config.judge)
    first = shlex.split(config.launcher)[0]
    beside = Path(sys.executable).parent / first  # where a virtual environment that is not active keeps it
    if first != "python" and not beside.is_file() and shutil.which(first) is None:
        raise UserError(f"launcher: there is no program '{first}' here; for example: deepspeed --num_accelerators 1")


def options_class(program: str) -> type:
    """The options of a program in launch/, loaded without leaving its changes to sys.path behind."""
    if program == "ppo":
        from rlhf.ppo_config import PPOConfig

        return PPOConfig
    spec = importlib.util.spec_from_file_location(f"program_{program}", ROOT / "launch" / f"{program}.py")
    module, before = importlib.util.module_from_spec(spec), list(sys.path)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return next(c for n, c in vars(module).items() if n.endswith("RunConfig") and c.__module__ == spec.name)
