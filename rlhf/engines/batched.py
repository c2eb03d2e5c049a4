"""The engine that samples by default: continuous batching over merged weights.

A drop-in for `rlhf.engines.hf.generate`, which gives the same responses slowly and is the fallback
for models whose cache is more than keys and values at positions.

    merged weights        the active adapter is folded into copies (`rlhf.engines.merged`)
    continuous batching   a row that ended is replaced by a waiting prompt, and the batch shrinks
                          when none waits (`rlhf.engines.slots`)
    one prefix            samples of one prompt share the pass over it
    CUDA graphs           on a GPU the step of all slots, the drawing of tokens included, is recorded
                          once and replayed
"""

import functools
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rlhf.engines import hf
from rlhf.engines.merged import merged
from rlhf.engines.sampling import Completions, EachToken, Sampling, draw, draw_recorded
from rlhf.engines.slots import Slots
from rlhf.model.packing import smallest_window
from rlhf.text import say_once

# tokens of prompts in one pass: caches of a CPU are small, launches of a GPU take their time
CHUNK = {"cpu": 512, "cuda": 16384}


def generate(
    model: nn.Module,
    prompt_ids: list[list[int]],
    keys: list[int],
    sampling: Sampling,
    stop_ids: list[int],
    pad_id: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    each_token: EachToken | None = None,
) -> Completions:
    """Sample one response per prompt with the adapter that is active now.

    At most `batch_size` rows are computed together. `progress(n)` is called when n more are done,
    `each_token` for each token that is drawn.
    Peak memory beside the model: the adapted weights once more, and keys and values of `batch_size`
    rows of the longest prompt and max_new_tokens.
    """
    longest = max(map(len, prompt_ids), default=0) + sampling.max_new_tokens
    if not slots_are_exact(model) or not within_windows(model, longest):
        return hf.generate(
            model, prompt_ids, keys, sampling, stop_ids, pad_id, batch_size, progress, each_token
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), hf.router_logits_off(model):
            runner, reason = merged(model)
            if reason:
                say_once(f"sampling with the adapter beside the weights, which is slower: {reason}")
            run = _Run(runner, prompt_ids, keys, sampling, set(stop_ids), batch_size)
            run.progress, run.each_token = progress, each_token
            return run.finish()
    finally:
        model.train(was_training)


def try_cache(model: nn.Module) -> None:
    """Try what a model's cache allows, once for each model, by passes over a few tokens.

    `generate` does so by itself; who counts passes calls this beforehand.
    """
    if not slots_are_exact(model):
        hf.cache_is_exact(model)


class _Run:
    """The responses of one call: which wait, which row stands in which slot, and what they hold."""

    progress: Callable[[int], None] | None = None
    each_token: EachToken | None = None

    def __init__(self, model, prompt_ids, keys, sampling, stops, batch_size):
        self.prompt_ids, self.keys, self.sampling = prompt_ids, keys, sampling
        self.stops = stops
        self.responses: list[list[int]] = [[] for _ in prompt_ids]
        self.logprobs: list[list[float]] = [[] for _ in prompt_ids]
        # the longest first, so that prompts of one pass are alike; equal prompts stand together
        order = sorted(range(len(prompt_ids)), key=lambda i: (-len(prompt_ids[i]), prompt_ids[i]))
        self.waiting = deque(order if sampling.max_new_tokens > 0 else [])
        # the rows in the first slots
        self.alive: list[int] = []
        if not self.waiting:
            return
        count = min(batch_size, len(order))
        # the last token of a response is not read, but its place is where a slot stands that ended
        longest = len(prompt_ids[order[0]]) + sampling.max_new_tokens
        device = next(model.parameters()).device
        self.row_keys = torch.zeros(count, dtype=torch.long, device=device)
        self.steps = torch.zeros(count, dtype=torch.long, device=device)
        is_plain = sampling.top_k == 0 and sampling.top_p >= 1.0
        # no method of this object: in a circle the slots' memory would outlive the call
        drawing = functools.partial(
            draw_recorded, keys=self.row_keys, position=self.steps, sampling=sampling
        )
        self.slots = Slots(model, count, longest, *((drawing,) if is_plain else ()))
        # so many slots have to be free before prompts are read into them, since passes over few
        # tokens are slow
        self.portion = max(1, count // 16)

    def finish(self) -> Completions:
        """Sample all responses."""
        while self.waiting or self.alive:
            self._refill()
            tokens, logprobs = self._step(len(self.alive))
            self._record(tokens.tolist(), logprobs.tolist())
        ended = [bool(r) and r[-1] in self.stops for r in self.responses]
        return Completions(self.responses, ended, self.logprobs)

    def _refill(self) -> None:
        """Read waiting prompts into free slots."""
        free = self.slots.places.slots - len(self.alive)
        count = min(free, len(self.waiting))
        if not count or (count < self.portion and count < len(self.waiting)):
            return
        rows = [self.waiting.popleft() for _ in range(count)]
        slots = list(range(len(self.alive), len(self.alive) + count))
        chunk = CHUNK.get(self.slots.device.type, 512)
        self.slots.admit([self.prompt_ids[row] for row in rows], slots, chunk)
        part = slice(slots[0], slots[-1] + 1)
        self.row_keys[part] = torch.tensor([self.keys[row] for row in rows])
        self.steps[part] = 0
        self.alive += rows

    def _length(self, row: int) -> int:
        return len(self.prompt_ids[row]) + len(self.responses[row])

    def _step(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the next token of each of the first `count` slots, and its log-probability."""
        width = max(map(self._length, self.alive))
        logits, drawn = self.slots.step(count, width)
        tokens, logprobs = drawn or (None, None)
        # NaN: not certain, or of logits that are no numbers
        if tokens is None or bool(logprobs.isnan().any()):
            keys, steps = self.row_keys[:count], self.steps[:count]
            tokens, logprobs = draw(logits, keys, steps, self.sampling)
        self.slots.advance(tokens)
        self.steps[:count] += 1
        return tokens, logprobs

    def _record(self, tokens: list[int], logprobs: list[float]) -> None:
        """Append a token to each living row, and let the last ones take the places of those that
        ended.
        """
        done = []
        for slot, row in enumerate(self.alive):
            self.responses[row].append(tokens[slot])
            self.logprobs[row].append(logprobs[slot])
            is_last = len(self.responses[row]) == self.sampling.max_new_tokens
            if self.each_token is not None and self.each_token(row, tokens[slot], logprobs[slot]):
                is_last = True
            if is_last or tokens[slot] in self.stops:
                done.append(slot)
        if not done:
            return
        if self.progress is not None:
            self.progress(len(done))
        staying = len(self.alive) - len(done)
        gone = set(done)
        holes = [slot for slot in done if slot < staying]
        last = [slot for slot in range(staying, len(self.alive)) if slot not in gone]
        moves = list(zip(last, holes, strict=True))
        if moves:
            width = max(self._length(self.alive[slot]) for slot in last)
            self.slots.move(moves, width)
            self.row_keys[holes] = self.row_keys[last]
            self.steps[holes] = self.steps[last]
            for source, target in moves:
                self.alive[target] = self.alive[source]
        del self.alive[staying:]


_EXACT: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def slots_are_exact(model: nn.Module) -> bool:
    """Return whether passes over slots give the logits of whole passes; tried once for each model
    on a few tokens.

    It is false for models that keep more than keys and values, that attend to a window or that
    count positions in a way of their own.
    """
    return hf.tried_once(model, _EXACT, _slot_gap, "in plain batches")


def within_windows(model: nn.Module, length: int) -> bool:
    """Return whether every layer sees all of `length` tokens: slots know no sliding windows."""
    window = smallest_window(model)
    is_within = window is None or length <= window
    if not is_within:
        kind = model.config.model_type
        say_once(
            f"sampling from {kind} in plain batches, which is slower "
            f"(prompt and response of {length} tokens are longer than its window of {window})"
        )
    return is_within


def _slot_gap(model: nn.Module) -> float:
    """Return how far the log-probabilities of slots are from those of whole passes, over their
    spread.

    Three rows, of which one gives its slot to another and comes back later.
    """
    ids, whole = hf.trial(model)
    lengths = torch.tensor([6, 9, 7])
    rows = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    slots = Slots(model, 3, 16)
    slots.admit(rows, [0, 1, 2], 16)
    standing, gaps = torch.tensor([0, 1, 2]), []
    for step in range(6):
        if step == 2:
            slots.move([(2, 1)], 16)
            standing = torch.tensor([0, 2])
        if step == 4:
            slots.admit(rows[1:2], [2], 16)
            standing = torch.tensor([0, 2, 1])
            # it begins again, while the others are four steps on
            lengths[1] -= 4
        columns = lengths[standing] + step
        found = slots.logits(len(standing), int(columns.max())).float().log_softmax(-1)
        expected = whole[standing, columns - 1]
        gaps.append((found - expected).abs().mean() / expected.std().clamp(min=1e-6))
        slots.advance(ids[standing, columns])
    return float(torch.stack(gaps).max())
