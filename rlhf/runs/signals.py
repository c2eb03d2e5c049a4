"""SIGTERM and SIGINT as a request to stop after the current step."""

import os
import signal
import time
from typing import Any

# launchers pass Ctrl-C on to processes that the terminal has signalled already
REPEAT_SECONDS = 1.0


class StopSignals:
    """Note the first SIGTERM or SIGINT instead of dying of it.

    `received` is the name of the first signal, None before. A second SIGINT ends the process at
    once, unless it comes within `REPEAT_SECONDS` of the one before.
    """

    def __init__(self, program: str, *, announce: bool):
        self.received: str | None = None
        self._message = f"{program}: %s: ending after this step, with a checkpoint\n"
        self._announce = announce
        self._last_time = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous_handlers[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put back the handlers that were in place before `install`."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _handle(self, number: int, frame: Any) -> None:
        # one Ctrl-C may arrive twice: from the terminal and from the launcher
        elapsed = time.monotonic() - self._last_time
        self._last_time = time.monotonic()

        if self.received is None:
            self.received = signal.Signals(number).name
            if self._announce:
                # not print: the signal may have interrupted one
                os.write(1, (self._message % self.received).encode())
        elif number == signal.SIGINT and elapsed > REPEAT_SECONDS:
            raise KeyboardInterrupt
