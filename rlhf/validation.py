"""Check the mappings inside options (scorers, guards, experiments, voices) against typed models.

    class RuleSpec(Spec):
        rule: Literal["length", "pattern"]
        weight: Number = 1.0

    spec = validate(RuleSpec, {"rule": "lenght"}, "reward, item 1")
    # UserError: reward, item 1.rule: found 'lenght', expected 'length' or 'pattern'. Did you mean 'length'?

Import it where options are read and nowhere else: pydantic takes as long to load as `rlhf --help` takes in all.
"""

from __future__ import annotations

import re
import typing
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from rlhf.config import UserError, did_you_mean


def _refuse_bool(value: Any) -> Any:
    # YAML reads a bare `on` or `yes` as true, and pydantic would take that for the number 1
    if isinstance(value, bool):
        raise ValueError(f"found {value!r}, expected a number")
    return value


# What is expected, by the type of pydantic's error; for the others its own words are used.
EXPECTED = {
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    "string_type": "text",
    "dict_type": "a mapping",
}

Number = Annotated[float, BeforeValidator(_refuse_bool)]
Count = Annotated[int, BeforeValidator(_refuse_bool)]


class Spec(BaseModel):
    """A mapping that a person writes. Unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, populate_by_name=True)


S = TypeVar("S", bound=Spec)


def validate(model: type[S], value: Any, where: str) -> S:
    """Return `value` as a `model`.

    Raises UserError for the first thing that is wrong: its place below `where`, what was found, what was expected,
    and the nearest known name.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {value!r}, expected a mapping such as {{name: value}}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        # a misspelt key first: it explains the one that is missing
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        raise UserError(_message(problems[0], model, where)) from None


def _message(problem: Any, model: type[BaseModel], where: str) -> str:
    *parents, name = problem["loc"] or ("",)
    kind, found = problem["type"], problem["input"]
    context = problem.get("ctx", {})

    if kind == "extra_forbidden":
        known = _keys(_model_at(model, parents))
        hint = did_you_mean(str(name), known)
        return f"{_place(where, parents)}: unknown key '{name}'.{hint} Known keys: {', '.join(known)}"
    if kind == "missing":
        return f"{_place(where, parents)}: '{name}' is missing"

    place = _place(where, problem["loc"])
    if kind == "value_error":
        return f"{place}: {context['error']}"
    expected = EXPECTED.get(kind, problem["msg"].removeprefix("Input should be "))
    hint = ""
    if kind == "model_type":
        expected = f"a mapping with the keys {', '.join(_keys(_model_at(model, problem['loc'])))}"
    if kind == "literal_error":
        # pydantic lists the choices as 'a', 'b' or 'c'
        choices = re.findall(r"'(.*?)'", context["expected"])
        hint = "." + did_you_mean(str(found), choices)
    return f"{place}: found {found!r}, expected {expected}{hint}"


def _place(where: str, location: typing.Iterable[str | int]) -> str:
    """Return `where` followed by the keys and positions of `location`; positions count from 1."""
    for part in location:
        where += f", item {part + 1}" if isinstance(part, int) else f".{part}"
    return where


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_at(model: type[BaseModel], location: typing.Iterable[str | int]) -> type[BaseModel]:
    """Return the model that stands at `location` below `model`, looking through lists, dicts and optional values."""
    for part in location:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            model = _inner_model(field.annotation) or model
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        found = _inner_model(inner)
        if found is not None:
            return found
    return None
