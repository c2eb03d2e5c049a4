"""The errors of all programs, and hints at the nearest known name."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

EXIT_USER_ERROR = 2
# A guard stopped the run; result.json says why.
EXIT_GUARD = 3
# A rank hung, and all have ended (rlhf/ranks/hang.py).
EXIT_HANG = 4
# Stopped by a signal and saved, to be started again (EX_TEMPFAIL of sysexits.h).
EXIT_INTERRUPTED = 75


class UserError(Exception):
    """An error that the user can fix: the message says where, what was found and what to do. Exit
    code 2.
    """


class EarlyExit(Exception):
    """The program ends here with everything saved; the message says why and how to continue."""

    def __init__(self, message: str, code: int = 0):
        super().__init__(message)
        self.code = code


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean 'x'?' for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def near_file(path: str | Path) -> str:
    """Return '. Did you mean FILE?' for the most similar name in the same folder, or nothing."""
    path = Path(path)
    if not path.parent.is_dir():
        return ""
    # a file that is there, but not what was expected, is no hint
    others = [name for name in os.listdir(path.parent) if name != path.name]
    near = difflib.get_close_matches(path.name, others, 1)
    return f". Did you mean {path.parent / near[0]}?" if near else ""
