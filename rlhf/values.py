"""Values of options: YAML files, conversion to the declared type, allowed ranges."""

import dataclasses
import json
import operator
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf.errors import UserError, did_you_mean, near_file

# brackets one in another
NESTED_TOO_DEEPLY = re.compile(r"(?:[\[{]\s*){100}")


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice; of two, the first would be ignored silently."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen and key not in (None, "<<"):
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str | typing.TextIO, where: str) -> Any:
    """Return what a YAML text holds. Raises UserError, naming `where` and the line, on bad YAML or
    a repeated key.
    """
    text = text if isinstance(text, str) else text.read()
    # yaml reads them in a time that grows with the square of their number
    if NESTED_TOO_DEEPLY.search(text):
        raise UserError(f"{where}: not usable YAML: nested too deeply")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: not usable YAML: nested too deeply") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the options of a YAML file as a flat dict; raise UserError if it cannot be read as
    one.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = parse_yaml(file, str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{near_file(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'option: value' lines, found {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def coerce(value: Any, hint: Any, where: str, *, from_text: bool = False) -> Any:
    """Return `value` as the type `hint`, or raise UserError naming `where`.

    YAML reads '3e-6' as text; it counts as a number here. `from_text` is for a value from the
    command line, where lists may be written as a,b and mappings in YAML.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in SCALARS:
        return _coerce_scalar(value, hint, where)
    if origin is Literal:
        by_text = {str(choice): choice for choice in args}
        if str(value) not in by_text:
            near = did_you_mean(str(value), by_text)
            raise UserError(
                f"{where}: found {value!r}, expected one of {', '.join(by_text)}.{near}"
            )
        return by_text[str(value)]
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, args, where, from_text=from_text)

    # what is left is YAML: lists, mappings and anything
    is_list = origin is list
    if from_text and is_list and not value.strip().startswith("["):
        value = [item.strip() for item in value.split(",")]
    elif from_text:
        value = parse_yaml(value, where)
    if hint is Any:
        return value
    if is_list:
        items = value if isinstance(value, list) else [value]
        return [coerce(item, args[0], f"{where}, item {i}") for i, item in enumerate(items, 1)]
    if hint is not dict and origin is not dict:
        raise TypeError(f"options of type {hint} are not supported")
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a mapping such as {{name: value}}, found {value!r}")
    item_type = args[1] if args else Any
    return {
        str(key): coerce(item, item_type, f"{where}, key '{key}'") for key, item in value.items()
    }


def _coerce_union(value: Any, kinds: tuple[Any, ...], where: str, *, from_text: bool) -> Any:
    """Return `value` as the first of `kinds` that accepts it; the error is that of the last one."""
    if type(None) in kinds and str(value).lower() in ("none", "null", "~"):
        return None
    *first, last = [kind for kind in kinds if kind is not type(None)]
    for kind in first:
        try:
            return coerce(value, kind, where, from_text=from_text)
        except UserError:
            continue
    return coerce(value, last, where, from_text=from_text)


def _coerce_scalar(value: Any, hint: type, where: str) -> Any:
    read, expected = SCALARS[hint]
    try:
        # YAML reads a bare `on` as true, which Python would take for the number 1
        if isinstance(value, bool) and hint is not bool:
            raise TypeError(value)
        return read(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: expected {expected}, found {value!r}") from None


BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _read_bool(value: Any) -> bool:
    return BOOLEANS[str(value).lower()]


def _read_int(value: Any) -> int:
    number = float(value)
    if not number.is_integer():
        raise ValueError(value)
    # not through the float where it can be avoided: it would round a large number
    return int(value) if str(value).lstrip("+-").isdigit() else int(number)


def _read_text(value: Any) -> str:
    if not isinstance(value, (str, int, float)):
        raise TypeError(value)
    return str(value)


SCALARS = {
    bool: (_read_bool, "true or false"),
    int: (_read_int, "a whole number"),
    float: (float, "a number"),
    str: (_read_text, "text"),
}


def type_name(hint: Any) -> str:
    """Return a type in words, for the help: 'a number or none', 'list of text'."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in SCALARS:
        return SCALARS[hint][1]
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if kind is type(None) else type_name(kind) for kind in args)
    if args:
        return f"{origin.__name__} of {type_name(args[-1])}"
    return getattr(hint, "__name__", str(hint))


BOUNDS = {
    "low": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "high": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


def check_ranges(config: Any) -> None:
    """Raise UserError for the first value that its option does not allow.

    These are numbers out of range, numbers that are not finite at any depth, empty texts and
    required lists that are empty.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == [] and is_required(field):
            raise UserError(f"'{field.name}' is empty")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, (int, float)) and not isinstance(item, bool):
                _check_bounds(field, item)
            if isinstance(item, str) and not item.strip() and value != field.default:
                raise UserError(f"'{field.name}' is {value!r}, expected text that is not empty")
        try:
            # the only ValueError of the encoder is NaN or infinity, at any depth
            json.dumps(value, allow_nan=False, default=str)
        except ValueError:
            raise UserError(f"'{field.name}' is {value}, expected finite numbers") from None


def _check_bounds(field: dataclasses.Field, value: float) -> None:
    bounds = field.metadata.get("bounds", {})
    given = [(*BOUNDS[name], bound) for name, bound in bounds.items() if bound is not None]
    # NaN satisfies no comparison
    if not all(holds(value, bound) for _, holds, bound in given):
        expected = " and ".join(f"{words} {bound}" for words, _, bound in given)
        raise UserError(f"'{field.name}' is {value}, expected {expected}")


def is_required(field: dataclasses.Field) -> bool:
    """Return whether an option has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
