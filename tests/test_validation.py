"""Mappings inside options, against typed models: place, what was found, what was expected."""

from typing import Literal

import pytest
from pydantic import Field, field_validator

from rlhf.errors import UserError
from rlhf.validation import Count, Number, Spec, validate


class Inner(Spec):
    size: Count = Field(ge=2)


class Outer(Spec):
    kind: Literal["length", "pattern"]
    weight: Number = 1.0
    inner: Inner | None = None
    several: tuple[Inner, ...] = ()

    @field_validator("weight")
    @classmethod
    def _not_two(cls, value):
        if value == 2:
            raise ValueError("2 is never right")
        return value


def test_what_is_right_comes_back_typed():
    spec = validate(Outer, {"kind": "length", "weight": "3e-2", "several": [{"size": 2}]}, "x")
    assert (spec.kind, spec.weight, spec.several[0].size) == ("length", 0.03, 2)


@pytest.mark.parametrize(
    "value, message",
    [
        (3, "reward: found 3, expected a mapping such as {name: value}"),
        ({}, "reward: 'kind' is missing"),
        (
            {"kind": "lenght"},
            "reward.kind: found 'lenght', expected 'length' or 'pattern'. Did you mean 'length'?",
        ),
        (
            {"kind": "length", "wieght": 1},
            "reward: unknown key 'wieght'. Did you mean 'weight'? Known keys: kind, weight, inner, several",
        ),
        ({"kind": "length", "weight": True}, "reward.weight: found True, expected a number"),
        (
            {"kind": "length", "weight": float("nan")},
            "reward.weight: found nan, expected a finite number",
        ),
        ({"kind": "length", "weight": 2}, "reward.weight: 2 is never right"),
        ({"kind": "length", "weight": "much"}, "reward.weight: found 'much', expected a number"),
        (
            {"kind": "length", "inner": {"size": 1}},
            "reward.inner.size: found 1, expected greater than or equal to 2",
        ),
        (
            {"kind": "length", "several": [{"size": 2}, {"siez": 2, "size": 2}]},
            "reward.several, item 2: unknown key 'siez'. Did you mean 'size'? Known keys: size",
        ),
    ],
)
def test_what_is_wrong_is_named_with_place_and_remedy(value, message):
    with pytest.raises(UserError) as error:
        validate(Outer, value, "reward")
    assert str(error.value).startswith(message)
