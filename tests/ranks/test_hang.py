"""What the watch for ranks that hang sees, decides and says; ranks that really hang are in
tests/launch/test_hang.py.
"""

import threading
import time

import pytest

from rlhf.errors import EXIT_HANG
from rlhf.ranks import hang
from rlhf.ranks.hang import HangWatch, describe, describe_place, hanging, position


class Store(dict):
    """What torch's store does, in one process."""

    def set(self, key, value):
        self[key] = value

    def check(self, keys):
        return all(key in self for key in keys)


def report(waits, step=7, seconds=30.0, place="mine.py:5 in score"):
    return {"waits": waits, "step": step, "seconds": seconds, "place": place}


@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        # by rank: in a collective operation, or not; None does not answer
        ([True, False], [1]),
        ([True, True, False, True], [2]),
        ([True, None], [1]),
        # one that does not answer is waited for, whatever else is
        ([False, None, True], [1]),
        ([True, True], []),
        ([False, False], []),
    ],
)
def test_the_rank_that_the_others_wait_for_hangs(waits, expected):
    reports = {rank: report(told) for rank, told in enumerate(waits) if told is not None}
    assert hanging(reports, len(waits)) == expected


def test_the_message_names_rank_step_and_places():
    reports = {0: report(True, place="rlhf/ranks/distributed.py:123 in sum"), 1: report(False)}
    said = describe(reports, [1], 2)
    assert "error: rank 1 hangs in step 7, for 30 s at mine.py:5 in score" in said
    assert "rank 0 waits in step 7, for 30 s at rlhf/ranks/distributed.py:123 in sum" in said
    assert "exit code 4" in said and "--hang_timeout" in said
    assert "rank 1 hangs: it does not answer" in describe({0: report(True)}, [1], 2)
    assert "which one hangs cannot be told" in describe(reports, [], 2)


def test_a_place_is_the_line_outside_of_libraries():
    entered, leave = threading.Event(), threading.Event()

    def score():
        entered.set()
        leave.wait()

    thread = threading.Thread(target=score)
    thread.start()
    entered.wait()
    place, end = "", time.monotonic() + 60
    # it needs a moment to come into the lock
    while "threading.py" not in place and time.monotonic() < end:
        frame = hang.sys._current_frames()[thread.ident]
        place, stack = describe_place(frame), position(frame)
    leave.set()
    thread.join()
    line = score.__code__.co_firstlineno + 2
    assert place.startswith(f"{__file__}:{line} in score, in ") and "threading.py" in place
    assert stack[0][0].co_name == "wait" and score.__code__ in [code for code, _ in stack]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(hang, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(hang, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(hang, "on_failure", [])
    # nothing of the test run's own is dumped, or switched off
    monkeypatch.setattr(hang.faulthandler, "dump_traceback", lambda *a, **k: None)
    monkeypatch.setattr(hang.faulthandler, "dump_traceback_later", lambda *a, **k: None)
    monkeypatch.setattr(hang.faulthandler, "cancel_dump_traceback_later", lambda: None)


def test_ranks_that_stand_still_end_together(quick, monkeypatch, capsys):
    store, ended, all_ended = Store(), {}, threading.Event()

    def end_of(rank):
        def end(code):
            ended[rank] = code
            if len(ended) == 2:
                all_ended.set()

        return end

    # rank 1 would wait for an hour: rank 0 asks it
    watches = [
        HangWatch(rank, 2, store, timeout, end=end_of(rank))
        for rank, timeout in ((0, 0.2), (1, 3600.0))
    ]
    watches[0].step = watches[1].step = 3
    assert all_ended.wait(20)
    assert ended == {0: EXIT_HANG, 1: EXIT_HANG}
    said = capsys.readouterr().err
    # both are this one thread, in no collective operation; one of them speaks
    assert said.count("all 2 ranks stand still") == 1 and "in step 3" in said


def test_a_rank_that_does_not_answer_is_named(quick, capsys):
    ended = threading.Event()
    HangWatch(0, 2, Store(), 0.2, end=lambda code: ended.set())
    assert ended.wait(20)
    assert "error: rank 1 hangs: it does not answer" in capsys.readouterr().err


def test_a_rank_that_moves_is_left_alone(quick):
    ended = []
    watch = HangWatch(0, 2, Store(), 1.5, end=ended.append)
    deadline = time.monotonic() + 3.0
    while time.monotonic() < deadline:
        # two places, in turn
        time.sleep(0.011)
        time.sleep(0.013)
    watch.stop()
    assert ended == []
