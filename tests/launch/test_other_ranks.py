"""A checkpoint of two ranks goes on with two to the last bit, and with one and four but for rounding."""

import pytest

from tests.launch.combinations import prepare, run_begun, run_resumed


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    prepare(folder)
    run_begun(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_checkpoint_of_two_ranks_goes_on(begun, ranks):
    for row in run_resumed(begun, ranks):
        # after one more step, of weights near 1: nothing else is rounded than sums over ranks
        assert row["largest"] == 0 if ranks == 2 else row["largest"] < 1e-5, row
