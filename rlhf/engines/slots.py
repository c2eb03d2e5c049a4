"""Keys and values of several responses that grow at their own pace, in memory that is taken once.

A slot is a row of the cache. Each slot is filled up to its own position: no padding on the left, no
concatenation, and a response that ended leaves its slot to another.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from rlhf.model.files import first_line
from rlhf.model.packing import decoder_and_head
from rlhf.ranks.divided import is_streamed
from rlhf.text import say_once

# a recorded pass reads so many positions, or twice, four times, ... as many
SHORTEST_RECORDED = 256


class Places:
    """Where the next pass writes its keys and values, and how many it reads.

    rows, columns: (B,) slots and the positions in them, for a pass over one token of each of B
    slots, which reads `width` positions of the first B slots. columns None: a pass over the first
    positions of the slots `rows`, which reads only what it brings itself.
    """

    def __init__(self, slots: int, length: int):
        self.slots = slots
        self.length = length
        self.rows: Tensor
        self.columns: Tensor | None = None
        self.width = 0


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, each (slots, heads, length, width of a head)."""

    is_sliding = False

    def __init__(self, places: Places):
        super().__init__()
        self.places = places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(states: Tensor) -> Tensor:
            # zeros: what is masked counts nothing, unless it is not a number
            heads, width = states.shape[1], states.shape[3]
            return states.new_zeros(self.places.slots, heads, self.places.length, width)

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Store the states (B, heads, tokens, width) of this pass; return those it attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns = self.places.rows, self.places.columns
        if columns is None:
            self.keys[rows, :, : key_states.shape[2]] = key_states
            self.values[rows, :, : key_states.shape[2]] = value_states
            return key_states, value_states
        self.keys[rows, :, columns] = key_states[:, :, 0]
        self.values[rows, :, columns] = value_states[:, :, 0]
        count, width = len(key_states), self.places.width
        return self.keys[:count, :, :width], self.values[:count, :, :width]

    def copy(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """Copy the first `width` positions of some slots to others, as if at the same moment."""
        self.keys[targets, :, :width] = self.keys[sources, :, :width]
        self.values[targets, :, :width] = self.values[sources, :, :width]

    # what models ask a cache for; positions and masks are given to them with each pass

    def get_seq_length(self) -> int:
        return 0 if self.places.columns is None else self.places.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.places.columns is None else self.places.width), 0

    def get_max_length(self) -> int:
        return self.places.length


@contextlib.contextmanager
def hooked_passes(model: nn.Module) -> Iterator[list[tuple]]:
    """Yield a list that receives (module, args, kwargs, output) of each pass through the decoder
    and the head that is made inside.
    """
    decoder, head = decoder_and_head(model)
    passes: list[tuple] = []
    handles = [
        # OPT's causal model calls a decoder within its base model
        module.register_forward_hook(lambda *made: passes.append(made), with_kwargs=True)
        for module in (decoder.get_decoder(), head)
    ]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def call_hooks(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Call a module's forward hooks, which count FLOPs, for a pass that calls no Python."""
    for key, hook in module._forward_hooks.items():
        if key in module._forward_hooks_with_kwargs:
            hook(module, args, kwargs, output)
        else:
            hook(module, args, output)


class RecordedPass:
    """The pass over all slots, which reads their first `width` positions, and what is drawn from its
    logits, as a CUDA graph, which spares the launch of each kernel.

    Its inputs are the tensors of `Slots`, which are changed in place. Slots without a row are
    computed too: what they write is at their own last position, which nobody reads.
    """

    def __init__(self, slots: Slots, width: int):
        shape = (slots.places.slots, width)
        device = slots.device
        if slots.graph_memory is None:
            slots.graph_memory = torch.cuda.graph_pool_handle()
        # kernels choose their workspaces in the first passes, which a graph cannot record
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                slots.draw(slots.plain_pass(*shape))
        torch.cuda.current_stream(device).wait_stream(side)

        self.graph = torch.cuda.CUDAGraph()
        # passes of all widths share their memory: what one leaves there is read before another runs.
        # What other threads do on the GPU meanwhile is no fault of the pass
        recording = torch.cuda.graph(
            self.graph, pool=slots.graph_memory, capture_error_mode="thread_local"
        )
        with hooked_passes(slots.model) as self.passes, recording:
            self.logits = slots.plain_pass(*shape)
            self.drawn = slots.draw(self.logits)

    @classmethod
    def of(cls, slots: Slots, width: int) -> RecordedPass | None:
        """Return the recorded pass, or None, which is said once, for a model that cannot be
        recorded.
        """
        try:
            return cls(slots, width)
        # whatever a model's own code raises when it may not wait for the GPU
        except Exception as error:
            say_once(f"sampling without CUDA graphs, which is slower ({first_line(error)})")
            return None

    def replay(self) -> None:
        """Compute the logits (slots, V) that follow on what the slots hold now, and what is drawn."""
        self.graph.replay()
        for made in self.passes:
            call_hooks(*made)


class Slots:
    """A model, the cache of its slots, and what each slot reads next.

    tokens, positions: (slots,) the token that a slot reads next and its position, on the model's
    device. draw: what is made of the logits (slots, V) of a recorded pass, in the same graph.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int,
        length: int,
        draw: Callable[[Tensor], tuple[Tensor, ...]] = lambda logits: (),
    ):
        self.draw = draw
        parameter = next(model.parameters())
        self.model = model
        self.decoder = decoder_and_head(model)[0]
        self.is_streamed = is_streamed(model)
        self.device = parameter.device
        self.nothing = torch.zeros((), dtype=parameter.dtype, device=self.device)
        self.lowest = torch.full_like(self.nothing, torch.finfo(parameter.dtype).min)
        self.places = Places(slots, length)
        self.cache = Cache(layer_class_to_replicate=functools.partial(SlotLayer, self.places))
        self.all_slots = torch.arange(slots, device=self.device)
        self.columns = torch.arange(length, device=self.device)
        self.tokens = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.positions = torch.zeros(slots, dtype=torch.long, device=self.device)
        # the pass over all slots as a CUDA graph, by the positions that it reads; None where it
        # cannot be recorded
        self.recorded: dict[int, RecordedPass | None] = {}
        self.graph_memory: Any = None
        # the prompt whose keys and values stand in each slot
        self.resident: list[tuple[int, ...]] = [()] * slots

    def _mask(self, allowed: Tensor) -> Tensor:
        """Return a mask to add to scores: right for every attention, and made once, where sdpa makes
        one of a boolean mask in each layer.
        """
        return torch.where(allowed, self.nothing, self.lowest)

    def admit(self, prompts: list[list[int]], slots: list[int], chunk: int) -> None:
        """Fill these slots with these prompts, `chunk` tokens of them in one pass.

        The last token of a prompt is left to the next pass over all slots. A prompt that stands in
        a slot already, or comes twice, is copied.
        """
        filled = {prompt: slot for slot, prompt in enumerate(self.resident)}
        before, fresh, after = [], {}, []
        for ids, slot in zip(prompts, slots, strict=True):
            prompt = tuple(ids[:-1])
            if not prompt:
                continue
            if prompt in filled:
                before.append((filled[prompt], slot))
            elif prompt in fresh:
                after.append((fresh[prompt], slot))
            else:
                fresh[prompt] = slot
        longest = max(map(len, prompts))
        self._copy(before, longest)
        self._prefill(fresh, chunk)
        self._copy(after, longest)

        for ids, slot in zip(prompts, slots, strict=True):
            self.resident[slot] = tuple(ids[:-1])
        places = torch.tensor(slots, device=self.device)
        self.tokens[places] = torch.tensor([ids[-1] for ids in prompts], device=self.device)
        self.positions[places] = torch.tensor([len(ids) - 1 for ids in prompts], device=self.device)

    def _prefill(self, prompts: dict[tuple[int, ...], int], chunk: int) -> None:
        """Compute the keys and values of prompts -> slots, those of similar length together."""
        waiting = sorted(prompts, key=len)
        while waiting:
            width = len(waiting[-1])
            count = min(len(waiting), max(1, chunk // width))
            part, waiting = waiting[-count:], waiting[:-count]
            # padding on the right: no token sees what comes after it
            ids = torch.tensor(
                [[*prompt, *([0] * (width - len(prompt)))] for prompt in part], device=self.device
            )
            self.places.rows = torch.tensor([prompts[p] for p in part], device=self.device)
            self.places.columns = None
            causal = self.columns[:width] <= self.columns[:width, None]
            self.decoder(
                input_ids=ids,
                attention_mask=self._mask(causal).expand(count, 1, -1, -1),
                position_ids=self.columns[None, :width].expand(count, -1),
                past_key_values=self.cache,
                use_cache=True,
            )

    def move(self, pairs: list[tuple[int, int]], width: int) -> None:
        """Let what stands in the first slot of each pair go on in the second."""
        if not pairs:
            return
        self._copy(pairs, width)
        sources, targets = self._pairs(pairs)
        self.tokens[targets] = self.tokens[sources]
        self.positions[targets] = self.positions[sources]
        for source, target in pairs:
            self.resident[target] = self.resident[source]

    def _copy(self, pairs: list[tuple[int, int]], width: int) -> None:
        pairs = [(source, target) for source, target in pairs if source != target]
        if not pairs:
            return
        sources, targets = self._pairs(pairs)
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.copy(sources, targets, width)

    def _pairs(self, pairs: list[tuple[int, int]]) -> Tensor:
        return torch.tensor(pairs, device=self.device).T

    def logits(self, count: int, width: int) -> Tensor:
        """Return (count, V) of what comes next in the first `count` slots, none of them longer than
        `width`.

        On a GPU they hold until the next call.
        """
        return self.step(count, width)[0]

    def step(self, count: int, width: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return `logits`, and what was drawn from them where the pass is recorded, else ()."""
        if self.records:
            longer = self.recorded_width(width)
            if longer not in self.recorded:
                self.recorded[longer] = RecordedPass.of(self, longer)
            recorded = self.recorded[longer]
            if recorded is not None:
                recorded.replay()
                return recorded.logits[:count], tuple(found[:count] for found in recorded.drawn)
        return self.plain_pass(count, width), ()

    @property
    def records(self) -> bool:
        """Return whether passes are recorded as CUDA graphs."""
        return self.device.type == "cuda" and not self.is_streamed

    def recorded_width(self, width: int) -> int:
        """Return how many positions a recorded pass reads that has to read `width`: attention takes
        time for each of them, and each recording takes as long as a few passes.
        """
        power_of_two = 1 << (width - 1).bit_length()
        return min(self.places.length, max(SHORTEST_RECORDED, power_of_two))

    def plain_pass(self, count: int, width: int) -> Tensor:
        """Compute `logits`. Passes may be repeated: each slot writes the same at its position."""
        positions = self.positions[:count]
        self.places.rows, self.places.columns = self.all_slots[:count], positions
        self.places.width = width
        allowed = self.columns[:width] <= positions[:, None]
        return self.model(
            input_ids=self.tokens[:count, None],
            attention_mask=self._mask(allowed[:, None, None]),
            position_ids=positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]

    def advance(self, tokens: Tensor) -> None:
        """Put one token (B,) behind each of the first B slots."""
        self.tokens[: len(tokens)] = tokens
        self.positions[: len(tokens)] += 1
