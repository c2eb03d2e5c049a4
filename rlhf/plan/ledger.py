"""How many bytes a pass keeps alive, counted on tensors that have shapes and no memory."""

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
    """The moment at which a pass has most bytes alive, without what was allocated before it."""

    total: int = 0
    # of these, gradients of parameters, made while logits were counted, and in a bucket
    gradients: int = 0
    logits: int = 0
    bucket: int = 0


@dataclass(frozen=True)
class Reduction:
    """What becomes of a gradient as soon as it is there, see `rlhf.plan.memory.reduction_of`.

    bucket: bytes of the buffer in which gradients travel, taken when a pass has its first one. kept:
    bytes that a rank keeps of all gradients, taken with the first one of all, while `grad` is freed
    at once and the bucket after each pass. None: gradients stay in `grad`, and the bucket
    until the optimizer's step.
    """

    bucket: int = 0
    kept: int | None = None


class Ledger(TorchDispatchMode):
    """Counts the memory of all tensors that are made inside, views once, until they are freed.

    An operator is seen as torch calls its kernel, so that what a composite one makes on the way
    counts. What a kernel takes inside itself does not: workspaces of libraries.
    """

    def __init__(self, before: Iterable[Tensor] = ()):
        """`before`: tensors that are allocated already, and do not count."""
        super().__init__()
        self.alive = 0
        self.gradients = 0
        self.logits = 0
        self.bucket = 0
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
        self.logits += logits
        self._take(size)

    def _take(self, size: int) -> None:
        self.alive += size
        if self.alive > self.peak.total:
            self.start_again()

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

    def watch_gradients(self, parameters: Iterable[nn.Parameter], reduction: Reduction) -> list:
        """Count the gradients of these parameters and their bucket; return the handles of the hooks."""
        held: set[int] = set()

        def after(parameter: Tensor) -> None:
            if not self.bucket:
                self.bucket = reduction.bucket
                self._take(reduction.bucket)
            if reduction.kept is None:
                if id(parameter) not in held:
                    held.add(id(parameter))
                    self.gradients += parameter.grad.untyped_storage().nbytes()
                return
            if not self.gradients:
                self.gradients = reduction.kept
                self._take(reduction.kept)
            parameter.grad = None

        return [p.register_post_accumulate_grad_hook(after) for p in parameters]

    def end_pass(self, reduction: Reduction) -> None:
        """Free the bucket unless it stays until the optimizer's step."""
        if reduction.kept is not None:
            self.alive -= self.bucket
            self.bucket = 0

    def start_again(self) -> None:
        """Forget the peak so far: the next one starts from what is alive now."""
        self.peak = Peak(self.alive, self.gradients, self.logits, self.bucket)


def peak_of(
    model: nn.Module,
    passes: Callable[[Ledger], Any],
    *,
    repeated: bool = False,
    reduction: Reduction = Reduction(),
) -> Peak:
    """Return the peak of `passes(ledger)` on a model of fake tensors; gradients are freed
    afterwards.

    repeated: of a second call, which finds the gradients of the first.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with Ledger([*model.parameters(), *model.buffers()]) as ledger:
        handles = ledger.watch_gradients(trained, reduction)
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
