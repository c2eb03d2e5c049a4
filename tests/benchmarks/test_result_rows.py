import json

import pytest

from benchmarks.result_rows import add_rows, holds


@pytest.mark.parametrize(
    "value, bound, kept",
    [
        (0.9, ">= 0.9", True),
        (0.9, "> 0.9", False),
        (1.2, "<= 1.1", False),
        (True, "== true", True),
        (False, "== true", False),
    ],
)
def test_a_bound_is_a_comparison_and_a_number(value, bound, kept):
    assert holds(value, bound) is kept


def test_a_row_takes_the_place_of_the_one_with_its_id(tmp_path):
    path = tmp_path / "rows.json"
    row = {"id": "a", "what": "share", "value": 0.5, "bound": ">= 0.9", "command": "make a"}
    add_rows(path, [row, {**row, "id": "b", "value": 1.0}])
    add_rows(path, [{**row, "value": 0.95}])
    first, second = json.loads(path.read_text())["rows"]
    assert (first["id"], first["value"], first["holds"]) == ("a", 0.95, True)
    assert (second["id"], second["value"], second["holds"]) == ("b", 1.0, True)
    assert first["commit"] == second["commit"]
