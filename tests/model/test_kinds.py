"""The four programs on tiny models of every kind in tests/kinds.py."""

import pytest

from tests.kinds import KINDS, measure
from tests.launch.conftest import write_data


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_four_programs_run_or_say_why_not(kind, tmp_path):
    cells = measure(kind, tmp_path, write_data(tmp_path))
    assert cells["sft"] == "runs"
    assert cells["reward"] in (
        "runs",
        f"error: {kind}: transformers has no sequence classification for this model",
    )
    assert float(cells["dpo"]) == pytest.approx(0.693147, abs=2e-6)
    assert float(cells["ppo"]) == 0.0 and float(cells["gap"]) < 1e-5
