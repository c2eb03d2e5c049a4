"""How many bytes a pass keeps alive, counted on tensors that have shapes and no memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Peak:
    """The moment at which a pass has most bytes alive, without what stood there before it."""

    total: int = 0
    # of these, in the `grad` of parameters, and made while logits were counted
    gradients: int = 0
    logits: int = 0


class Ledger(TorchDispatchMode):
    """Counts the memory of all tensors that are made inside, views once, until they are freed.

    An operator is seen as torch calls its kernel, so that what a composite one makes on the way
    counts. What a kernel takes inside itself does not: workspaces of libraries.
    """

    def __init__(self, before: Iterable[Tensor] = ()):
        """`before`: tensors that stand already, and do not count."""
        super().__init__()
        self.alive = 0
        self.gradients = 0
        self.logits = 0
        self.is_in_head = False
        self.peak = Peak()
        self._seen: Any = WeakIdKeyDictionary()
        for tensor in before:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self._add(value)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        logits = size if self.is_in_head else 0
        weakref.finalize(storage, self._remove, size, logits)
        self.alive += size
        self.logits += logits
        if self.alive > self.peak.total:
            self.peak = Peak(self.alive, self.gradients, self.logits)

    def _remove(self, size: int, logits: int) -> None:
        self.alive -= size
        self.logits -= logits

    @contextlib.contextmanager
    def in_head(self) -> Iterator[None]:
        """Count what is made inside as logits."""
        self.is_in_head = True
        try:
            yield
        finally:
            self.is_in_head = False

    def watch_gradients(self, parameters: Iterable[nn.Parameter], *, handed_over: bool) -> list:
        """Count what becomes the `grad` of these parameters; return the handles of the hooks.

        handed_over: it is freed as soon as it is there, as ZeRO-2 and 3 do, which keep their own.
        """
        held: set[int] = set()

        def after(parameter: Tensor) -> None:
            if handed_over:
                parameter.grad = None
            elif id(parameter) not in held:
                held.add(id(parameter))
                self.gradients += parameter.grad.untyped_storage().nbytes()

        return [p.register_post_accumulate_grad_hook(after) for p in parameters]

    def start_again(self) -> None:
        """Forget the peak so far: the next one starts from what is alive now."""
        self.peak = Peak(self.alive, self.gradients, self.logits)


def peak_of(
    model: nn.Module,
    passes: Callable[[Ledger], Any],
    *,
    repeated: bool = False,
    handed_over: bool = False,
) -> Peak:
    """Return the peak of `passes(ledger)` on a model of fake tensors; gradients are freed
    afterwards.

    repeated: of a second call, which finds the gradients of the first. handed_over: see
    `Ledger.watch_gradients`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with Ledger([*model.parameters(), *model.buffers()]) as ledger:
        handles = ledger.watch_gradients(trained, handed_over=handed_over)
        passes(ledger)
        if repeated:
            ledger.start_again()
            passes(ledger)
    for handle in handles:
        handle.remove()
    for parameter in trained:
        parameter.grad = None
    return ledger.peak


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, shared memory once."""
    storages = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
