"""Columns that describe a row (group, split, weight, annotator, ...) as fields of a record."""

from __future__ import annotations

from typing import Any

from rlhf.data.records import Preference, Record, RecordError, is_number, one_name

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
TRUTH = {"true": True, "1": True, "false": False, "0": False}


def other_fields(row: dict[str, Any], source: str | None, kind: type[Record]) -> dict[str, Any]:
    """Return the fields that describe a row; empty text (as CSV has it) counts as not given."""
    fields: dict[str, Any] = {"source": source}
    for name, read in FIELDS.items():
        value = row.get(name)
        # a pair that is read as prompts or instructions has no margin
        applies = kind is Preference or name not in PREFERENCE_FIELDS
        if applies and value is not None and value != "":
            fields[name.removeprefix("default_")] = read(name, value)
    return fields


def _name(name: str, value: Any) -> str:
    return one_name(str(value))


def _split(name: str, value: Any) -> str:
    split = SPLIT_NAMES.get(str(value).lower())
    if split is None:
        raise RecordError(name, f"found {value!r}, expected one of train, validation, test")
    return split


def _number(name: str, value: Any) -> float:
    try:
        # CSV has text alone
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not is_number(number):
        raise RecordError(name, f"found {value!r}, expected a number")
    return number


def boolean(name: str, value: Any) -> bool:
    truth = TRUTH.get(lowered(value))
    if truth is None:
        raise RecordError(name, f"found {value!r}, expected true or false")
    return truth


def lowered(value: Any) -> str:
    return str(value).strip().lower()


# How each column that describes a row becomes a field; a group that the data names wins over a
# default
FIELDS = {
    "source": _name,
    "annotator": _name,
    "voice": _name,
    "default_group": _name,
    "group": _name,
    "split": _split,
    "weight": _number,
    "margin": _number,
    "label_prob": _number,
    "chosen_ended": boolean,
    "rejected_ended": boolean,
}
PREFERENCE_FIELDS = {"margin", "label_prob", "chosen_ended", "rejected_ended"}
