"""A rank that hangs: found because nothing moves, named with its step and place, and ended on all ranks."""

import atexit
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from rlhf.errors import EXIT_HANG
from rlhf.program import on_failure

POLL_SECONDS = 0.5
# for all ranks to say where they are, once one has asked
GRACE_SECONDS = 10.0
STDERR = 2
# frames of a collective operation, which waits for the other ranks
COLLECTIVES = tuple(
    os.path.join(*parts) for parts in (("torch", "distributed"), ("deepspeed", "comm"))
)
INNERMOST = 8  # frames in which a collective operation is looked for
OWN = str(Path(__file__).resolve().parent.parent)
LIBRARIES = ("site-packages", f"lib{os.sep}python")


class HangWatch:
    """Ends all ranks with EXIT_HANG when the main thread of one of them stays at one place too long.

    Ranks that wait for each other all stand still. The one that the others wait for is the one that is
    in no collective operation, or does not answer. A thread compares the main thread's place with that
    of half a second ago; a rank that loops for ever moves, but those that wait for it do not, and ask it.

    store: where ranks find each other's values (torch's; set, get and check). `step` is the step that
    this rank is in, for the message.
    """

    ASKED = "rlhf/hang/asked"

    def __init__(
        self,
        rank: int,
        size: int,
        store: Any,
        timeout: float,
        before_end: Callable[[], None] = lambda: None,
        end: Callable[[int], None] = os._exit,
    ):
        """`timeout` in seconds; `before_end` is called where the ranks are about to end."""
        self.rank, self.size, self.store, self.timeout = rank, size, store, timeout
        self.before_end, self.end = before_end, end
        self.step = 0
        self.since = time.monotonic()
        self.stopped = threading.Event()
        self._ends = threading.Lock()
        self._threads = [
            threading.Thread(target=task, daemon=True) for task in (self._watch, self._answer)
        ]
        atexit.register(self.stop)
        on_failure.insert(0, self.await_end)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Watch no more: this rank is done."""
        self.stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def await_end(self, exit_code: int) -> bool:
        """Let this rank fail no more where all are about to end, as the connection to one that has ended
        first makes it: all end with the same code.
        """
        if self._ends.locked():
            time.sleep(2 * GRACE_SECONDS)
        return False

    def _watch(self) -> None:
        before = None
        while not self.stopped.wait(POLL_SECONDS):
            # by a thread that needs no lock of Python's, for a call that never gives it back
            faulthandler.dump_traceback_later(self.timeout + GRACE_SECONDS / 2, file=STDERR)
            place = position(main_frame())
            if place != before:
                before, self.since = place, time.monotonic()
            elif time.monotonic() - self.since > self.timeout:
                self._report()

    def _answer(self) -> None:
        # apart from `_watch`: the store does not return where the rank that holds it is frozen
        while not self.stopped.wait(POLL_SECONDS):
            try:
                if self.store.check([self.ASKED]):
                    self._report()
            except Exception:
                # the store has ended with its rank, which the watch for failures reports
                return

    def _report(self) -> None:
        """Ask all ranks where they are, print which one hangs, and end this one."""
        if not self._ends.acquire(blocking=False):
            # the other thread does it
            self.stopped.wait()
            return
        self.before_end()
        reports = {self.rank: self._own_report()}
        gathering = threading.Thread(target=self._exchange, args=(reports,), daemon=True)
        gathering.start()
        gathering.join(GRACE_SECONDS)
        found = dict(reports)
        culprits = hanging(found, self.size)
        if self.rank == min(found):
            print(describe(found, culprits, self.size), file=sys.stderr, flush=True)
        if self.rank in (culprits or found):
            faulthandler.dump_traceback(STDERR)
        if self.rank == 0 and self.size > 1:
            # the store is here, and others may still be reading
            time.sleep(1.0)
        self.stop()
        self.end(EXIT_HANG)

    def _own_report(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": time.monotonic() - self.since,
            "waits": waits_for_others(),
            "place": describe_place(main_frame()),
        }

    def _exchange(self, reports: dict[int, dict[str, Any]]) -> None:
        """Write this rank's report to the store, and add those of the others to `reports`."""
        self.store.set(f"rlhf/hang/{self.rank}", json.dumps(reports[self.rank]))
        self.store.set(self.ASKED, str(self.rank))
        while len(reports) < self.size and not self.stopped.wait(POLL_SECONDS / 5):
            for rank in set(range(self.size)) - set(reports):
                key = f"rlhf/hang/{rank}"
                if self.store.check([key]):
                    reports[rank] = json.loads(self.store.get(key))


def main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident)


def position(frame: FrameType | None) -> list[tuple[CodeType, int]]:
    """Return where a thread is: code and instruction of each frame of its stack, innermost first."""
    places = []
    while frame is not None:
        places.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return places


def waits_for_others() -> bool:
    """Return whether a thread of this process is in a collective operation; backward passes make theirs
    in threads of their own.
    """
    for frame in sys._current_frames().values():
        names = [code.co_filename for code, _ in position(frame)[:INNERMOST]]
        if any(part in name for name in names for part in COLLECTIVES):
            return True
    return False


def describe_place(frame: FrameType | None) -> str:
    """Return "file:line in function" of the innermost frame outside of libraries, with the innermost of
    all where that is another.
    """
    frames = []
    while frame is not None:
        frames.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    if not frames:
        return "no Python code"
    own = [text for text in frames if is_own(text)]
    if not own or own[0] == frames[0]:
        return frames[0]
    return f"{own[0]}, in {frames[0]}"


def is_own(file: str) -> bool:
    """Return whether a file is this package's or the user's, not a library's."""
    return file.startswith(OWN) or not any(part in file for part in LIBRARIES)


def hanging(reports: dict[int, dict[str, Any]], size: int) -> list[int]:
    """Return the ranks that the others wait for; none where that cannot be told.

    They are those that do not answer, else those in no collective operation.
    """
    silent = [rank for rank in range(size) if rank not in reports]
    apart = [rank for rank, report in sorted(reports.items()) if not report["waits"]]
    if silent:
        return silent
    return apart if len(apart) < size else []


def describe(reports: dict[int, dict[str, Any]], culprits: list[int], size: int) -> str:
    """Return the message with which the ranks end."""
    lines = []
    for rank in culprits:
        if rank in reports:
            report = reports[rank]
            lines.append(
                f"error: rank {rank} hangs in step {report['step']}, for {report['seconds']:.0f} s at "
                f"{report['place']}"
            )
        else:
            lines.append(
                f"error: rank {rank} hangs: it does not answer. Its process is frozen, or in a call that holds "
                "Python's lock; its stack follows on its own standard error in that case"
            )
    if not lines:
        lines.append(f"error: all {size} ranks stand still, and which one hangs cannot be told")
    for rank in sorted(set(reports) - set(culprits)):
        report = reports[rank]
        lines.append(
            f"rank {rank} waits in step {report['step']}, for {report['seconds']:.0f} s at {report['place']}"
        )
    lines.append(
        f"All ranks end with exit code {EXIT_HANG}. The same command continues from the last checkpoint; "
        "--hang_timeout sets after how many seconds (0: never)"
    )
    return "\n".join(lines)
