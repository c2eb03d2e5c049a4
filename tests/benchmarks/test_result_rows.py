import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.result_rows import add_rows, holds, row_of, write_page


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
    # what was measured at another commit says so; the rows of other ids stay
    add_rows(path, [{**row, "commit": "abc1234"}])
    first, other = json.loads(path.read_text())["rows"]
    assert first["commit"] == "abc1234" and other == second


@pytest.mark.parametrize(
    "value, bound, kept",
    [
        (0.123456, "> 0", 0.1235),
        (-4.56789e-7, "<= 1e-4", -4.568e-7),
        # 1.0 would hold, 0.2 would not
        (0.99996, "== 1", 0.99996),
        (0.19999, "< 0.2", 0.19999),
        (123456, "> 0", 123456),
        (True, "== True", True),
    ],
)
def test_rounding_does_not_decide_whether_a_bound_holds(tmp_path, value, bound, kept):
    path = tmp_path / "rows.json"
    add_rows(path, [row_of("a", "share", value, bound, "make a")])
    (row,) = json.loads(path.read_text())["rows"]
    assert row["value"] == kept and type(row["value"]) is type(value)
    assert row["holds"] == holds(value, bound)


ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
ROWS = [path for path in RESULTS if "rows" in json.loads(path.read_text())]


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_rows_hold_what_they_say_at_a_commit_of_this_history(path):
    rows = json.loads(path.read_text())["rows"]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["holds"] == holds(row["value"], row["bound"]), row["id"]
        assert row["command"], row["id"]
    shallow = subprocess.check_output(
        ["git", "rev-parse", "--is-shallow-repository"], text=True, cwd=ROOT
    )
    if shallow.strip() == "true":
        pytest.skip("a shallow clone does not have the commits of earlier measurements")
    for commit in {row["commit"] for row in rows}:
        found = subprocess.run(["git", "merge-base", "--is-ancestor", commit, "HEAD"], cwd=ROOT)
        assert found.returncode == 0, f"{commit} is no commit of this history"


def test_a_page_keeps_what_was_written_by_hand(tmp_path):
    page = tmp_path / "page.md"
    write_page(page, ["# One"])
    assert page.read_text() == "# One\n"
    page.write_text("# One\n\n## What follows\n\nMuch.\n")
    write_page(page, ["# Two"])
    assert page.read_text() == "# Two\n\n## What follows\n\nMuch.\n"
