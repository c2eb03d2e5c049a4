"""Check the mappings inside options (scorers, guards, experiments, voices) against typed models.

    class RuleSpec(Spec):
        rule: Literal["length", "pattern"]
        weight: Number = 1.0

    spec = validate(RuleSpec, {"rule": "lenght"}, "reward, item 1") # UserError: reward, item
    1.rule: found 'lenght', expected 'length' or 'pattern'. Did you mean 'length'?

Import it where options are read and nowhere else: pydantic takes as long to load as `rlhf --help`
takes in all.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from rlhf.errors import UserError, did_you_mean


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
    **dict.fromkeys(("string_type", "string_too_short"), "text"),
    "dict_type": "a mapping",
}

Number = Annotated[float, BeforeValidator(_refuse_bool)]
Count = Annotated[int, BeforeValidator(_refuse_bool)]


class Spec(BaseModel):
    """A mapping that a person writes. Unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, frozen=True, populate_by_name=True
    )

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: Any) -> Any:
        """Raise ValueError where a value is not a mapping, or has a key that the model lacks,
        naming those it has.
        """
        known = [field.alias or name for name, field in cls.model_fields.items()]
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise ValueError(
                f"found {value!r}, expected a mapping with the keys {', '.join(known)}"
            )
        if cls.model_config["extra"] != "forbid":
            return value

        allowed: set[Any] = set(cls.model_fields)
        for field in cls.model_fields.values():
            # one name, or AliasChoices of which some are from before a renaming
            alias = field.validation_alias
            allowed.update(getattr(alias, "choices", [alias]))
        for key in value:
            if key not in allowed:
                hint = did_you_mean(str(key), known)
                raise ValueError(f"unknown key '{key}'.{hint} Known keys: {', '.join(known)}")
        return value


S = TypeVar("S", bound=Spec)


def validate(model: type[S], value: Any, where: str, context: dict[str, Any] | None = None) -> S:
    """Return `value` as a `model`; its validators are given the `context`.

    Raises UserError for the first thing that is wrong: its place below `where`, what was found,
    what was expected, and the nearest known name.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {value!r}, expected a mapping such as {{name: value}}")
    try:
        return model.model_validate(value, context=context)
    except ValidationError as error:
        raise UserError(_message(error.errors()[0], where)) from None


def _message(problem: Any, where: str) -> str:
    kind, found, location = problem["type"], problem["input"], problem["loc"]
    context = problem.get("ctx", {})
    if kind == "missing":
        return f"{_place(where, location[:-1])}: '{location[-1]}' is missing"

    place = _place(where, location)
    if kind == "value_error":
        return f"{place}: {context['error']}"
    expected = EXPECTED.get(kind, problem["msg"].removeprefix("Input should be "))
    hint = ""
    if kind == "literal_error":
        # pydantic lists the choices as 'a', 'b' or 'c'
        choices = re.findall(r"'(.*?)'", context["expected"])
        hint = "." + did_you_mean(str(found), choices)
    return f"{place}: found {found!r}, expected {expected}{hint}"


def _place(where: str, location: Iterable[str | int]) -> str:
    """Return `where` followed by the keys and positions of `location`; positions count from 1."""
    for part in location:
        where += f", item {part + 1}" if isinstance(part, int) else f".{part}"
    return where
