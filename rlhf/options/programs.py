"""The programs of launch/ by their options, and whose options a YAML file holds."""

import dataclasses
from pathlib import Path

from rlhf.config import current_names
from rlhf.errors import UserError
from rlhf.options.offline import DPORunConfig, RewardRunConfig, SFTRunConfig
from rlhf.options.ppo import PPOConfig
from rlhf.text import clip
from rlhf.values import read_yaml

PROGRAMS = {"sft": SFTRunConfig, "reward": RewardRunConfig, "dpo": DPORunConfig, "ppo": PPOConfig}
# files of other commands, by a name that each of them has
OTHERS = {
    "methods": "the file of an experiment (rlhf experiment run)",
    "guide": "the file of a voice (rlhf voice check)",
}


def programs_of(path: str) -> list[str]:
    """Return the programs whose options a YAML file holds: those that know most of its names, and of
    several the one that the file is named after. Raises UserError for a file of another kind.
    """
    given = read_yaml(path)
    # a file does not say whose it is
    unknown = {}
    for program, options in PROGRAMS.items():
        known = {field.name for field in dataclasses.fields(options)}
        unknown[program] = len(current_names(options, given, path).keys() - known)

    fewest = min(unknown.values())
    if 2 * fewest > len(given):
        kinds = [kind for name, kind in OTHERS.items() if name in given]
        found = kinds[0] if kinds else clip(", ".join(given), 80)
        raise UserError(
            f"{path}: expected the options of a program (launch/: {', '.join(PROGRAMS)}), found {found}"
        )
    nearest = [program for program in PROGRAMS if unknown[program] == fewest]
    named = [program for program in nearest if Path(path).stem.startswith(program)]
    return named or nearest


def command_of(program: str) -> str:
    """Return the command that starts a program, for messages."""
    return f"deepspeed launch/{program}.py"
