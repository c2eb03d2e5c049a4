"""A rank that really hangs is named, and the run ends with an exit code of its own."""

import pytest

from rlhf.errors import EXIT_HANG
from tests.conftest import ROOT
from tests.launch.conftest import flags_of, ppo_flags
from tests.launch.test_ranks import launch

# evaluation at step 0, the first rollout, then this in the second
SCORER = """
import os, signal, time
calls = []
def score(samples):
    calls.append(1)
    if os.environ['RANK'] == '{rank}' and len(calls) == 3:
        {hangs}
    return [float(len(t)) for t in samples.responses]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "hangs", "said"),
    [
        (1, "time.sleep(3600)", "rank 1 hangs in step 2"),
        # it moves, and is asked by the one that waits for it
        (0, "while True: len(calls)", "rank 0 hangs in step 2"),
        # with it the store stands still through which ranks find each other
        (0, "os.kill(os.getpid(), signal.SIGSTOP)", "rank 0 hangs: it does not answer"),
    ],
)
def test_a_rank_that_hangs_is_named_and_ends_the_run(rank, hangs, said, runs, files, tmp_path):
    (tmp_path / "mine.py").write_text(SCORER.format(rank=rank, hangs=hangs))
    flags = [*flags_of("ppo", runs / "sft", files["pairs"], tmp_path / "run"), *ppo_flags(runs)]
    more = ["--reward", "[{function: 'mine:score'}]", "--hang_timeout", "15"]
    done = launch(ROOT / "launch" / "ppo.py", [*flags, *more], cwd=str(tmp_path))
    text = done.stderr + done.stdout
    assert done.returncode == EXIT_HANG, text[-6000:]
    assert said in text
    assert f"rank {1 - rank} waits in step 2" in text
    if "answer" not in said:
        assert "mine.py:7 in score" in text
        # the stack of all its threads
        assert 'mine.py", line 7 in score' in text
    assert "has failed" not in text
