"""Options: one dataclass field each, read from YAML files and the command line.

    @dataclass
    class PPOConfig:
        kl_coef: float = option(0.05, "weight of the KL to the reference in each token's reward")

    config = parse(PPOConfig)          # --config configs/ppo.yaml --kl_coef 0.1

A YAML file holds the options by the names that the flags have. Of two files the later one wins, and
flags win over files. Whatever is wrong raises `UserError` (exit code 2) before anything is loaded.
"""

import argparse
import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from rlhf.errors import UserError, did_you_mean
from rlhf.values import check_ranges, coerce, is_required, read_yaml, type_name

T = TypeVar("T")

# The seeds that every random generator in use accepts.
SEED = {"low": 0, "high": 2**32 - 1}

# Where this process writes, by each of the options that it has parsed; for errors that name no
# file.
output_places: list[str] = []


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    resume: Literal["fixed", "free"] = "fixed",
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    old_name: str | None = None,
    before: Any = None,
) -> Any:
    """Return a dataclass field with its help text; `resume` says whether a resumed run may change
    it.

    Without a default the option is required. Lists and dicts are copied for each instance. A
    number, also one in a list, must be at least `low`, more than `above`, at most `high`, less than
    `below`, and finite in any case. `old_name` is the option's name in files written before it was
    renamed; it is still read, also as a flag. `before` is what runs did that began before the option
    existed, where that is not the default.
    """
    bounds = {"low": low, "above": above, "high": high, "below": below}
    metadata = {"help": help, "resume": resume, "old_name": old_name, "bounds": bounds}
    metadata["before"] = before
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def current_names(cls: Any, options: dict[str, Any], where: str = "options") -> dict[str, Any]:
    """Return `options` under the names that the dataclass `cls` (or an instance of it) gives them
    today.

    Raises UserError, naming `where`, if an option is given under both its names.
    """
    renamed = {field.metadata.get("old_name"): field.name for field in dataclasses.fields(cls)}
    for old in options:
        if old in renamed and renamed[old] in options:
            raise UserError(
                f"{where}: '{old}' is the old name of '{renamed[old]}': give one of them"
            )
    return {renamed.get(name, name): value for name, value in options.items()}


def read_file(cls: type, path: str, prog: str) -> dict[str, Any]:
    """Return the options of `cls` that a YAML file gives, each as its type. Raises UserError for other
    names and values.
    """
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in current_names(cls, read_yaml(path), path).items():
        _check_known(name, cls, path, prog)
        values[name] = coerce(value, hints[name], f"{path}: option '{name}'")
    return values


def parse(
    cls: type[T], argv: list[str] | None = None, prog: str | None = None, before: str = ""
) -> T:
    """Build `cls` from `--config FILE` and `--option value` flags; flags win wherever they stand.

    Raises UserError with the place, the option and the nearest known name; `--help` prints every
    option and exits; its usage shows `before` in front of the flags. A dataclass may define
    `validate()`, which raises UserError on combinations that cannot work.
    """
    prog = prog or _program_name()
    hints = typing.get_type_hints(cls)
    flags, files = _read_flags(cls, sys.argv[1:] if argv is None else argv, prog, before)

    values: dict[str, Any] = {}
    # the file or flag that gave each option, for the message where its value is refused
    places: dict[str, str] = {}
    for path in files:
        given = read_file(cls, path, prog)
        values |= given
        places |= dict.fromkeys(given, path)
    for name, text in flags.items():
        values[name] = coerce(text, hints[name], f"option '--{name}'", from_text=True)
        places[name] = f"--{name}"

    required = [field.name for field in dataclasses.fields(cls) if is_required(field)]
    missing = [f"'{name}'" for name in required if name not in values]
    source = ", ".join(files)
    if missing:
        where = source or "the command line"
        raise UserError(
            f"{where}: {', '.join(missing)} not given, and there is no default. All options: {prog} --help"
        )

    config = cls(**values)
    output = getattr(config, "output_dir", None) or getattr(config, "output", None)
    if output:
        output_places.append(output)
    try:
        check_ranges(config)
        if hasattr(config, "validate"):
            config.validate()
    except UserError as error:
        # the message begins with the option that is wrong
        named = re.match(r"'?(\w+)", str(error))
        place = places.get(named[1]) if named else None
        raise UserError(f"{place or source or prog}: {error}") from None
    return config


def save_options(config: Any, path: str | Path) -> None:
    """Write the resolved options as YAML that `--config` reads back."""
    text = "# The resolved options of this run; itself a valid --config.\n"
    text += yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def _parser(cls: type, prog: str, before: str) -> argparse.ArgumentParser:
    """Return the parser of the flags of `cls`, as text; its help has a section for each class that
    declares options.
    """
    parser = argparse.ArgumentParser(
        prog,
        exit_on_error=False,
        # the word in front of the flags may be the file itself
        usage=f"%(prog)s {before or '[--config FILE]'} [--option VALUE ...]",
        description=inspect.cleandoc(cls.__doc__ or ""),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=8, width=104
        ),
    )
    parser.add_argument(
        "--config", action="append", metavar="FILE", help="YAML file of options; a later one wins"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    # read by rlhf.program
    parser.add_argument(
        "--debug", action="store_true", help="print the traceback of an error beside its message"
    )

    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for section, names in _sections(cls):
        heading = inspect.cleandoc(section.__doc__ or "").partition("\n")[0].rstrip(".")
        group = parser.add_argument_group("options of this command" if section is cls else heading)
        for name in names:
            is_switch = {"nargs": "?", "const": "true"} if hints[name] is bool else {}
            group.add_argument(
                f"--{name}",
                metavar=f"<{type_name(hints[name])}>",
                help=_help(fields[name]),
                **is_switch,
            )
    return parser


def _sections(cls: type) -> list[tuple[type, list[str]]]:
    """Return each class that declares options first, and their names; the most specific class comes
    first.
    """
    declared: set[str] = set()
    sections = []
    for base in reversed(cls.__mro__):
        names = [name for name in inspect.get_annotations(base) if name not in declared]
        declared.update(names)
        if names:
            sections.append((base, names))
    return sections[::-1]


def _help(field: dataclasses.Field) -> str:
    default = (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )
    text = field.metadata.get("help", "")
    if is_required(field):
        text += " (required)"
    elif default is not None:
        text += f" (default: {default!r})"
    text += "."
    if field.metadata.get("resume") == "free":
        text += " A resumed run may change it."
    return text.replace("%", "%%")


def _read_flags(
    cls: type, argv: list[str], prog: str, before: str
) -> tuple[dict[str, str], list[str]]:
    """Return the text of each flag, and the files given as `--config`."""
    words = []
    for word in argv:
        flag, equals, text = word.partition("=")
        if flag.startswith("--"):
            (name,) = current_names(cls, {flag[2:].replace("-", "_"): None})
            word = f"--{name}{equals}{text}"
        words.append(word)

    try:
        found, rest = _parser(cls, prog, before).parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(
            f"option '{error.argument_name}' needs a value. All options: {prog} --help"
        ) from None
    if rest and rest[0].startswith("--"):
        _check_known(rest[0][2:].partition("=")[0], cls, "the command line", prog)
    if rest:
        raise UserError(
            f"found '{rest[0]}' where an option was expected. All options: {prog} --help"
        )
    # the launcher passes --local_rank; ranks are read from the environment
    flags = {
        name: text
        for name, text in vars(found).items()
        if name not in ("config", "local_rank", "debug")
    }
    return flags, getattr(found, "config", [])


def _check_known(name: str, cls: type, where: str, prog: str) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    if name not in known:
        raise UserError(
            f"{where}: unknown option '{name}'.{did_you_mean(name, known)} All options: {prog} --help"
        )


def _program_name() -> str:
    """Return the command that started this process, for messages."""
    script = Path(sys.argv[0])
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module and module.name.startswith("launch."):
        return f"deepspeed --module {module.name}"
    return f"deepspeed launch/{script.name}" if script.suffix == ".py" else script.name
