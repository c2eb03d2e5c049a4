"""The columns that a preference pair may have beside its ids: those of its record, and what its
length alone says.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.data.records import Preference

# of a row without a value of its own
DEFAULTS = {
    "margin": 0.0,
    "label_prob": math.nan,
    "tie_prob": 0.0,
    "weight": 1.0,
    # added to the score gap in training alone (reward/length.py)
    "offset": 0.0,
}
# those that a record has
OF_RECORDS = ("margin", "label_prob", "tie_prob", "weight")


def add_columns(
    rows: Sequence[dict[str, Any]], records: Sequence[Preference], names: Iterable[str]
) -> None:
    """Add to the rows the columns that any of the records has a value for.

    Weights are divided by their mean, so that they do not change the step size; where all are equal
    they say nothing.
    """
    values = {}
    for name in names:
        values[name] = [getattr(record, name) for record in records]
    weights = values.pop("weight")
    total = sum(weights)
    if total > 0 and len(set(weights)) > 1:
        values["weight"] = [weight * len(weights) / total for weight in weights]
    for name, column in values.items():
        # where no record has one, the rows have no such column
        if column.count(None) == len(column):
            continue
        for row, value in zip(rows, column, strict=True):
            row[name] = DEFAULTS[name] if value is None else float(value)


def column_tensors(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the (B,) columns that the rows have, in float32."""
    tensors = {}
    for name in DEFAULTS.keys() & rows[0].keys():
        values = []
        for row in rows:
            # Arrow may return NaN as None
            values.append(DEFAULTS[name] if row[name] is None else row[name])
        tensors[name] = torch.tensor(values, dtype=torch.float32)
    return tensors
