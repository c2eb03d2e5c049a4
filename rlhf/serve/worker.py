"""The one thread that samples: requests wait in line, those of one policy share a batch, and the text of
an answer is told while its tokens are drawn.
"""

import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf.engines.sampling import Sampling
from rlhf.serve.policies import Policy

# what a decoder writes for bytes that are not yet a character
INCOMPLETE = "\ufffd"


class StreamedText:
    """Text that grows by tokens; it ends before the first of the texts in `stops`.

    What is handed out is never taken back: white space at the end, half a character, and the
    beginning of a stop text wait for what follows. All that is handed out, and `text`, is what
    `rlhf.data.encode.decode_response` gives for the same tokens, as far as the stop text.
    """

    def __init__(self, tokenizer: Any, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.text = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Return the text that is certain with one more token."""
        self.ids.append(token)
        return self._advance(is_last=False)

    def end(self) -> str:
        """Return the rest, when no more tokens come."""
        return self._advance(is_last=True)

    def _advance(self, *, is_last: bool) -> str:
        whole = self.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()
        found = [stop for stop in self.stops if stop in whole]
        self.is_stopped = bool(found)
        if found:
            # before the first of them
            whole = whole[: min(map(whole.find, found))]
        elif not is_last:
            whole = whole[: len(whole) - self._open_end(whole)]
        whole = whole.rstrip()
        # the decoders of a few tokenizers change what they wrote before
        if not whole.startswith(self.text):
            return ""
        new, self.text = whole[len(self.text) :], whole
        return new

    def _open_end(self, text: str) -> int:
        """Return how many characters at the end of `text` may become others, or a stop text."""
        longest = len(text) - len(text.rstrip(INCOMPLETE))
        for stop in self.stops:
            for length in range(longest + 1, min(len(stop), len(text) + 1)):
                if text.endswith(stop[:length]):
                    longest = length
        return longest


@dataclass(frozen=True)
class Event:
    """News of one answer of a job.

    text: what is new. tokens: (id, log-probability in nats, text) of each new one. finish: why the
    answer ended, "stop" or "length", None while it goes on. error: why there is none.
    """

    answer: int = 0
    text: str = ""
    tokens: tuple[tuple[int, float, str], ...] = ()
    finish: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Job:
    """What one request asks of one policy: a row for each answer.

    prompts, keys: of each answer. sampling: its `max_new_tokens` is the limit of each answer. stops:
    texts that end one. streams: events come with each piece of text, otherwise one an answer. notify:
    receives the events, from the worker's thread.
    """

    policy: Policy
    prompts: list[list[int]]
    keys: list[int]
    sampling: Sampling
    notify: Callable[[Event], None]
    stops: list[str] = field(default_factory=list)
    streams: bool = False
    is_cancelled: bool = False


class _Answer:
    """One answer of a job while it is sampled."""

    def __init__(self, job: Job, number: int):
        self.job, self.number = job, number
        self.text = StreamedText(job.policy.decoder, job.stops)
        self.tokens: list[tuple[int, float, str]] = []
        self.count = 0

    def add(self, token: int, logprob: float) -> bool:
        """Take a token, and return whether the answer ends with it."""
        job = self.job
        if job.is_cancelled:
            return True
        self.count += 1
        self.tokens.append((token, logprob, job.policy.decoder.decode([token])))
        # the text is needed as it grows for streams and stop texts alone
        if job.streams or job.stops:
            new = self.text.add(token)
        else:
            self.text.ids.append(token)
            new = ""
        is_ended = token in job.policy.stop_ids or self.text.is_stopped
        is_last = is_ended or self.count == job.sampling.max_new_tokens
        if is_last:
            finish = "stop" if is_ended else "length"
            # what came before was not handed out where the job does not stream
            rest = new + self.text.end()
            self._tell(rest if job.streams else self.text.text, finish)
        elif job.streams and new:
            self._tell(new, None)
        return is_last

    def _tell(self, text: str, finish: str | None) -> None:
        self.job.notify(Event(self.number, text, tuple(self.tokens), finish))
        self.tokens = []


class Worker:
    """Samples jobs in the order in which they came; jobs of the same policy and sampling that wait
    together share a batch. An answer does not depend on what it shares the batch with.
    """

    def __init__(self, batch_size: int = 64):
        self.batch_size = batch_size
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.is_closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="sampling", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Put a job in line."""
        with self.changed:
            if not self.is_closed:
                self.waiting.append(job)
                self.changed.notify()
                return
        job.notify(Event(error="the server is shutting down"))

    def stop(self) -> None:
        """End all jobs at their next token; what comes later is refused."""
        with self.changed:
            self.is_closed = True
            left = [*self.running, *self.waiting]
            self.waiting.clear()
            self.changed.notify()
        for job in left:
            job.is_cancelled = True
            job.notify(Event(error="the server is shutting down"))

    def close(self) -> None:
        """End all jobs, and wait for the thread."""
        self.stop()
        self.thread.join()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.is_closed)
                if self.is_closed:
                    return
                self.running = self._next_batch()
            try:
                self._sample(self.running)
            except Exception:
                # the next requests may well succeed
                traceback.print_exc()
                for job in self.running:
                    job.notify(Event(error="sampling failed, see the server's standard error"))
            self.running = []

    def _next_batch(self) -> list[Job]:
        """Take the first job and, as long as they fit in a batch, the waiting ones like it."""
        batch: list[Job] = []
        staying: deque[Job] = deque()
        rows = 0
        while self.waiting:
            job = self.waiting.popleft()
            if job.is_cancelled:
                continue
            # the first job may be larger than a batch; the sampler then takes it in parts
            is_first = not batch
            fits = is_first or rows + len(job.keys) <= self.batch_size
            if fits and (is_first or _may_share_batch(job, batch[0])):
                batch.append(job)
                rows += len(job.keys)
            else:
                staying.append(job)
        self.waiting = staying
        return batch

    def _sample(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        # one row an answer, in the order of the jobs
        prompts: list[list[int]] = []
        keys: list[int] = []
        answers: list[_Answer] = []
        for job in jobs:
            prompts += job.prompts
            keys += job.keys
            answers += [_Answer(job, number) for number in range(len(job.keys))]
        # shorter limits are kept by each answer itself
        longest = max(job.sampling.max_new_tokens for job in jobs)
        sampling = replace(jobs[0].sampling, max_new_tokens=longest)

        def on_token(row: int, token: int, logprob: float) -> bool:
            return answers[row].add(token, logprob)

        jobs[0].policy.generate(prompts, keys, sampling, on_token, self.batch_size)


def _may_share_batch(job: Job, other: Job) -> bool:
    """Return whether the rows of two jobs may share a batch: limits alone may differ."""
    sampling = replace(job.sampling, max_new_tokens=other.sampling.max_new_tokens)
    return job.policy is other.policy and sampling == other.sampling
