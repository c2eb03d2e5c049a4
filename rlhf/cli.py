"""`rlhf COMMAND`: find the command in rlhf/commands.py, read its options, run it; or print help.

The programs that train are in launch/.
"""

import pkgutil
import sys
from pathlib import Path
from typing import Any, get_type_hints

from rlhf import __version__, startup
from rlhf.commands import COMMANDS
from rlhf.config import parse
from rlhf.errors import UserError, did_you_mean
from rlhf.program import program
from rlhf.values import type_name

# words that are the file of a program's options
OF_PROGRAMS = ("run_config", "reward_config", "file")
RENAMED = {f"compare {name}": f"experiment {name}" for name in ("run", "report", "measure")}


@program
def main(argv: list[str] | None = None) -> None:
    """Run the command that `argv` names, or print help."""
    argv = sys.argv[1:] if argv is None else argv
    words = " ".join(argv[:2])
    # a run may have one of these names: `rlhf compare run other`
    if words in RENAMED and not Path(argv[1]).is_dir():
        raise UserError(f"'rlhf {words}' is now: rlhf {' '.join([RENAMED[words], *argv[2:]])}")
    if words.startswith("compare ") and words.endswith((".yaml", ".yml")):
        raise UserError(
            f"{argv[1]} is a file, not a run. To run an experiment: rlhf experiment run {argv[1]}"
        )
    if words == "--version":
        print(f"rlhf {__version__}")
        return

    name = words if words in COMMANDS else words.partition(" ")[0]
    if name in COMMANDS:
        run_command(name, argv[len(name.split()) :])
        return

    wants_help = {*argv} <= {"-h", "--help"} or {*argv[1:]} <= {"-h", "--help"}
    group = "" if name in ("", "-h", "--help") else f"{name} "
    width = max(map(len, COMMANDS))
    listed = []
    for known, command in COMMANDS.items():
        if known.startswith(group):
            listed.append(f"  {known:<{width}}  {command.help}")
    if not listed or not wants_help:
        # `rlhf bogus --help`: the flag is no part of the name
        named = words.partition(" -")[0]
        raise UserError(
            f"unknown command '{named}'.{did_you_mean(named, COMMANDS)} All commands: rlhf --help"
        )
    usage = f"usage: rlhf {group}COMMAND [--option VALUE ...]      rlhf {group}COMMAND --help"
    training = "Training: deepspeed --module launch.{sft,reward,dpo,ppo} --help"
    print("\n".join([usage, "", *listed, "", training]))


def run_command(name: str, argv: list[str]) -> None:
    """Parse the options of a command and run it."""
    command = COMMANDS[name]
    options = pkgutil.resolve_name(command.options)
    # words before the first flag: `rlhf compare a b --seed 1` -> --runs a,b --seed 1
    # a lone dash is standard input, and what has blanks is a text
    flags = [
        i for i, word in enumerate(argv) if word.startswith("-") and word != "-" and " " not in word
    ]
    first_flag = flags[0] if flags else len(argv)
    words, argv = argv[:first_flag], argv[first_flag:]
    hint = get_type_hints(options).get(command.words, str)
    takes_several = command.joiner == " " or "list of" in type_name(hint)
    shown = (command.words or "").upper() + (" ..." if takes_several else "")
    if not command.needs_words:
        shown = f"[{shown}]"
    if len(words) > 1 and command.words and not takes_several:
        raise UserError(
            f"'rlhf {name}' takes one '{command.words}', found {len(words)}: {', '.join(words)}"
        )
    if command.words and command.needs_words and not words and not argv:
        raise UserError(
            f"'rlhf {name}' needs its '{command.words}': rlhf {name} {shown} (all options: rlhf {name} --help)"
        )
    if command.words and words:
        words = [f"--{command.words}", command.joiner.join(words)]

    try:
        config = parse(options, [*words, *argv], f"rlhf {name}", shown)
    except UserError as error:
        # the programs take their files by this flag
        if command.words in OF_PROGRAMS and "--config" in argv:
            raise UserError(f"{error}. For a program's file: rlhf {name} FILE") from None
        raise
    if command.loads_models:
        startup.silence_libraries()
        check_models(config, command.models)
    command.run(config)


def check_models(config: Any, names: tuple[str, ...]) -> None:
    """Raise UserError where a model that one of these options names cannot be loaded, before torch is
    imported for it.
    """
    from rlhf.data.sources import FILES
    from rlhf.model.files import check_model

    for name in names:
        given = getattr(config, name)
        for path in given if isinstance(given, list) else [given]:
            # answers may come from a file instead
            if path and not path.lower().endswith(FILES):
                check_model(path)


if __name__ == "__main__":
    main()
