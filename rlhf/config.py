"""Options: one dataclass field each, read from YAML and the command line.

    @dataclass
    class PPOConfig:
        kl_coef: float = option(0.05, "weight of the KL to the reference in each token's reward")

    config = parse(PPOConfig)          # --config configs/ppo.yaml --kl_coef 0.1

A YAML file is flags written down before the command line: both give the same names, and the later one wins.
Whatever is wrong stops the program before anything is loaded, as a `UserError` (exit code 2).
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import functools
import importlib
import math
import os
import re
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")
_output: str | None = None  # where this process writes, for what is said when it cannot

SEED = {"low": 0, "high": 2**32 - 1}  # the seeds that every random generator in use takes
EXIT_USER_ERROR = 2
EXIT_GUARD = 3  # a guard stopped the run; result.json says why
EXIT_INTERRUPTED = 75  # stopped by a signal, saved, to be started again (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """Something a person can mend: the message says where, what was found and what to do. Exit code 2."""


class Halt(Exception):
    """The program ends here with everything saved; the message says why and how to go on."""

    def __init__(self, message: str, code: int = 0):
        super().__init__(message)
        self.code = code


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
) -> Any:
    """A dataclass field with its help text; `resume` says whether a resumed run may change it.

    `old_name` is the option's name in files written before it was renamed; it is still read, also as a flag.

    Without a default the option is required. Lists and dicts are copied for each instance. A number, also one in a
    list, must be at least `low`, more than `above`, at most `high`, less than `below`, and finite in any case.
    """
    metadata = {"help": help, "resume": resume, "old_name": old_name}
    metadata |= {"low": low, "above": above, "high": high, "below": below}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(cls: type[T], argv: list[str] | None = None, prog: str | None = None) -> T:
    """Build `cls` from `--config FILE` and `--option value` flags; flags win wherever they stand.

    Raises UserError with the place, the option and the nearest right name; `--help` prints every option and exits.
    A dataclass may define `validate()`, which raises UserError on combinations that cannot work.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = prog or _prog()
    if any(a in ("-h", "--help") for a in argv):
        print(help_text(cls, prog))
        raise SystemExit(0)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    flags, files = _split_flags(argv, cls, fields, hints, prog)
    for path in files:
        for name, value in current_names(cls, read_yaml(path)).items():
            _known(name, fields, path, prog)
            values[name], origin[name] = coerce(value, hints[name], f"{path}: option '{name}'"), path
    for name, text in flags.items():
        values[name], origin[name] = coerce(text, hints[name], f"option '--{name}'", from_text=True), f"--{name}"
    missing = [n for n, f in fields.items() if n not in values and _required(f)]
    if missing:
        where = ", ".join(files) or "the command line"
        names = ", ".join(f"'{n}'" for n in missing)
        raise UserError(f"{where}: {names} not given, and there is no default. All options: {prog} --help")
    config = cls(**values)
    global _output
    _output = _output or getattr(config, "output_dir", None) or getattr(config, "output", None)
    try:
        check_ranges(config)
        getattr(config, "validate", lambda: None)()
    except UserError as error:
        # the message begins with the option that is wrong: say where it was given
        named = re.match(r"'(\w+)'", str(error))
        place = origin.get(named[1]) if named else None
        raise UserError(f"{place or ', '.join(files) or prog}: {error}") from None
    return config


def current_names(cls: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return `options` under the names that the dataclass `cls` (or an instance of it) gives them today."""
    renamed = {field.metadata.get("old_name"): field.name for field in dataclasses.fields(cls)}
    return {renamed.get(name, name): value for name, value in options.items()}


def check_ranges(config: Any) -> None:
    """Raise UserError for the first value that its option does not allow.

    These are numbers out of range, numbers that are not finite wherever they stand (in a scorer's options, under
    `trl:`), and texts and required lists that are empty.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        items = value if isinstance(value, list) else [value]
        for item in items:
            _check_range(field, item)
        if value == [] and _required(field):
            raise UserError(f"'{field.name}' is empty")
        if any(isinstance(item, str) and not item.strip() for item in items) and value != field.default:
            raise UserError(f"'{field.name}' is {value!r}: an empty text is no value")
        _check_finite(value, f"'{field.name}'")


def _check_range(field: dataclasses.Field, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low, above, high, below = (field.metadata.get(name) for name in ("low", "above", "high", "below"))
    rules = [
        (low, "at least", lambda bound: value >= bound),
        (above, "more than", lambda bound: value > bound),
        (high, "at most", lambda bound: value <= bound),
        (below, "less than", lambda bound: value < bound),
    ]
    rules = [rule for rule in rules if rule[0] is not None]
    if not all(fits(bound) for bound, _, fits in rules):  # NaN fits nothing
        wanted = " and ".join(f"{words} {bound}" for bound, words, _ in rules)
        raise UserError(f"'{field.name}' is {value}, expected {wanted}")


def _check_finite(value: Any, where: str) -> None:
    """Raise UserError for a number in `value`, at any depth, that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}, expected a finite number")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_finite(item, f"{where}, key '{key}'")
    if isinstance(value, list):
        for number, item in enumerate(value, 1):
            _check_finite(item, f"{where}, item {number}")


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once: of two, one would be overruled without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key != "<<" and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str | typing.TextIO, where: str) -> Any:
    """What a YAML text says. Raises UserError, naming `where` and the line, if it is not valid or has a key twice."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise UserError(f"{where}: not usable YAML: nested too deeply") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file as a flat dict; raises UserError if it cannot be read as one."""
    try:
        with open(path, encoding="utf-8") as file:
            content = parse_yaml(file, str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{near_file(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'option: value' lines, found {type(content).__name__}")
    return {str(k): v for k, v in content.items()}


def save(config: Any, path: str | Path) -> None:
    """Write the resolved options as YAML that `--config` reads back."""
    text = "# The resolved options of this run; itself a valid --config.\n"
    text += yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def help_text(cls: type, prog: str) -> str:
    """Every option with its type, default, help and whether a resumed run may change it."""
    hints = typing.get_type_hints(cls)
    doc = (cls.__doc__ or "").strip()
    lines = [f"usage: {prog} [--config FILE] [--option value ...]", "", doc, "", "options:"]
    for field in dataclasses.fields(cls):
        default = "required" if _required(field) else repr(_default(field))
        head = f"  --{field.name}  {_type_name(hints[field.name])} = {default}"
        tail = " A resumed run may change it." if field.metadata.get("resume") == "free" else ""
        lines.append(head)
        lines += textwrap.wrap(
            field.metadata.get("help", "") + tail, 96, initial_indent=" " * 8, subsequent_indent=" " * 8
        )
    return "\n".join(lines)


def coerce(value: Any, hint: Any, where: str, from_text: bool = False) -> Any:
    """`value` as the type `hint`, or UserError naming `where`. YAML's '3e-6' (a string) counts as a number."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return parse_yaml(value, where) if from_text else value
    if origin in (typing.Union, types.UnionType):
        nothing = value is None or (isinstance(value, str) and value.lower() in ("none", "null", "~"))
        if nothing and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        for candidate in rest[:-1]:
            try:
                return coerce(value, candidate, where, from_text)
            except UserError:
                continue
        return coerce(value, rest[-1], where, from_text)
    if origin is Literal:
        for choice in args:
            if value == choice or str(value) == str(choice):
                return choice
        near = difflib.get_close_matches(str(value), [str(a) for a in args], 1)
        hint_near = f" Did you mean '{near[0]}'?" if near else ""
        raise UserError(f"{where}: found {value!r}, expected one of {', '.join(map(str, args))}.{hint_near}")
    if origin is list:
        if from_text:
            if value.strip().startswith("["):
                value = parse_yaml(value, where)
            else:
                value = [item.strip() for item in value.split(",")]
        if not isinstance(value, list):
            value = [value]
        return [coerce(v, args[0] if args else Any, f"{where}, item {i}", False) for i, v in enumerate(value)]
    if origin is dict or hint is dict:
        if from_text:
            value = parse_yaml(value, where)
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a mapping such as {{name: value}}, found {value!r}")
        return {str(k): coerce(v, args[1] if args else Any, f"{where}, key '{k}'", False) for k, v in value.items()}
    return _scalar(value, hint, where)


def _scalar(value: Any, hint: type, where: str) -> Any:
    wrong = UserError(f"{where}: expected {_type_name(hint)}, found {value!r}")
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "on", "off"):
            return value.lower() in ("true", "yes", "on")
        raise wrong
    if isinstance(value, bool) and hint in (int, float):
        raise wrong
    if hint is int:
        try:
            number = float(value)
            if number != int(number):
                raise wrong
            return int(value) if isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit() else int(number)
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
    if hint is float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise wrong from None
    if hint is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise wrong
    raise TypeError(f"options of type {hint} are not supported")


def _split_flags(argv, cls, fields, hints, prog) -> tuple[dict[str, str], list[str]]:
    flags: dict[str, str] = {}
    files: list[str] = []
    i = 0
    while i < len(argv):
        word = argv[i]
        i += 1
        if not word.startswith("--"):
            raise UserError(f"'{word}' stands where an option was expected. All options: {prog} --help")
        name, equals, value = word[2:].partition("=")
        name = next(iter(current_names(cls, {name.replace("-", "_"): None})))
        if name == "local_rank":  # the deepspeed launcher puts it first; ranks are read from the environment
            i += 0 if equals else 1
            continue
        if name != "config":
            _known(name, fields, "the command line", prog)
        if not equals:
            following = argv[i] if i < len(argv) else None
            if following is None or following.startswith("--"):
                if name != "config" and hints[name] is bool:
                    value = "true"
                else:
                    raise UserError(f"option '--{name}' needs a value. All options: {prog} --help")
            else:
                value, i = following, i + 1
        if name == "config":
            files.append(value)
        else:
            flags[name] = value
    return flags, files


def _known(name: str, fields: dict, where: str, prog: str) -> None:
    if name in fields:
        return
    raise UserError(f"{where}: unknown option '{name}'.{did_you_mean(name, fields)} All options: {prog} --help")


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """' Did you mean 'x'?' for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def import_function(module_name: str, function_name: str, where: str) -> typing.Callable[..., Any]:
    """A function of the user's own, also from a module in the working directory; UserError names what is not there."""
    module = import_module(module_name, where)
    function = getattr(module, function_name, None)
    if not callable(function):
        near = did_you_mean(function_name, [n for n in vars(module) if not n.startswith("_")])
        raise UserError(f"{where}: module '{module_name}' has no function '{function_name}'.{near}")
    return function


def import_module(name: str, where: str) -> types.ModuleType:
    """A module of the user's own, also from the working directory; UserError if it is not there."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise  # the module is there, but something it imports is not
        raise UserError(f"{where}: there is no module '{name}' (searched {here} and the packages)") from None


def near_file(path: str | Path) -> str:
    path = Path(path)
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.exists()], 1)
    return f". Did you mean {path.parent / near[0]}?" if near else ""


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _type_name(a) for a in args)
    if origin is not None:
        return f"{origin.__name__} of {_type_name(args[-1])}" if args else origin.__name__
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def _prog() -> str:
    name = sys.argv[0]
    if name.endswith(".py"):
        return f"deepspeed {os.path.join('launch', os.path.basename(name))}"
    return os.path.basename(name)


def program(main: typing.Callable[..., T]) -> typing.Callable[..., T]:
    """Decorates a program's `main`: a UserError, or what `mendable` makes one of, becomes one message on stderr and
    exit code 2, a Halt one on stdout and its own code; of several ranks the first to fail speaks."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        global _output
        _output = None  # the first options that are read are the program's own
        try:
            return main(*args, **kwargs)
        except Halt as halt:
            if os.environ.get("RANK", "0") == "0":
                print(halt, flush=True)
            sys.exit(halt.code)
        except BrokenPipeError:  # the reader (`| head`) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except Exception as error:
            problem = error if isinstance(error, UserError) else mendable(error)
            code = EXIT_USER_ERROR if problem else 1
            another_failed_first = told(code)
            if problem is None and not another_failed_first:
                raise
            if problem and not another_failed_first:
                rank = os.environ.get("RANK", "0")
                print(f"error{'' if rank == '0' else f' on rank {rank}'}: {problem}", file=sys.stderr, flush=True)
            sys.exit(code)

    return wrapped


FULL = "Free some space and give the same command again; what was saved before is whole"
IN_THE_WAY = "A file stands where a folder has to be, or the other way round: choose another place"
CLOSED = "Choose a place that can be written, or change its rights"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), FULL),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), IN_THE_WAY),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), CLOSED),
}


def mendable(error: BaseException) -> UserError | None:
    """A message for a disk that is full or closed, whichever library found it; None for any other error.

    torch and safetensors raise errors of their own in the place of OSError, the first without saying why.
    """
    link: BaseException | None = error
    while link is not None:
        in_rust = re.search(r"\(os error (\d+)\)", str(link))
        number = link.errno if isinstance(link, OSError) else int(in_rust.group(1)) if in_rust else None
        if number in REMEDIES:
            place = getattr(link, "filename", None) or _output or "a file"
            return UserError(f"{place}: {os.strerror(number)}. {REMEDIES[number]}")
        if re.search("PytorchStreamWriter failed|iostream error", str(link)):
            return UserError(f"{_output or 'a file'}: could not be written to its end. {FULL}")
        link = link.__cause__ or link.__context__
    return None


# Called with the exit code when a program fails; true when another process of the same run has failed before, and this
# one's error is but its consequence. Set by whoever starts several processes (distributed.start).
on_failure: list[typing.Callable[[int], bool]] = []


def told(code: int) -> bool:
    return any([ask(code) for ask in on_failure])
