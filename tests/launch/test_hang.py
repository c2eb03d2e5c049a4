"""A rank that really hangs is named, and all ranks end with an exit code of their own."""

import subprocess
import sys

import pytest

from rlhf.errors import EXIT_HANG
from rlhf.startup import free_port
from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how", "said"),
    [
        (1, "sleeps", "rank 1 hangs in step 2"),
        # it moves, and is asked by the one that waits for it
        (0, "loops", "rank 0 hangs in step 2"),
        (0, "freezes", "rank 0 hangs: it does not answer"),
    ],
)
def test_a_rank_that_hangs_is_named_and_all_end(rank, how, said):
    port = str(free_port())
    script = str(ROOT / "tests" / "launch" / "hanging.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(number), port, str(rank), how],
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    waiting, stuck = processes[1 - rank], processes[rank]
    try:
        text = waiting.communicate(timeout=600)[1]
        if how != "freezes":
            text += stuck.communicate(timeout=60)[1]
            assert stuck.returncode == EXIT_HANG, text
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert waiting.returncode == EXIT_HANG, text
    assert text.count("hangs") == 1 and said in text
    assert f"rank {1 - rank} waits in step 2" in text and "distributed.py" in text
    if how != "freezes":
        # its line, and the stack of all its threads
        assert "hanging.py:" in text and " in score" in text
        assert 'hanging.py", line' in text
    assert "has failed" not in text
