"""Models that ZeRO-3 divides among the ranks: loaded and read without being whole on any of them.

A divided parameter is DeepSpeed's: `ds_tensor` is this rank's part of it, and `data` is empty but
where all ranks have gathered it together.

    with dividing(settings):                  each weight is divided when it is loaded
        model = AutoModelForCausalLM.from_pretrained(...)
    with readable(model, world=world):        passes without gradients, as many as each rank likes
        generate(model, ...)
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from rlhf.ranks import deepspeed_backend
from rlhf.ranks.distributed import DistributedContext
from rlhf.startup import read_ranks
from rlhf.text import say_once

# a whole model may take so much of the memory that is free; keys and values need some as well
SHARE_OF_FREE_MEMORY = 0.5
# modules that are never called themselves
LISTS = (nn.ModuleList, nn.ModuleDict)
# what PEFT's layers call the module that they read the weights of without calling it
WRAPPED = ("base_layer", "original_module", "token_adapter")
# parts of the names of what an adapter holds
ADAPTER_PARTS = ("lora_", "modules_to_save", "trainable_tokens_")
# transformers reads weights ahead in threads, all of them in the end, unless this variable is set
READ_AHEAD_OFF = "HF_DEACTIVATE_ASYNC_LOAD"


def is_divided(tensor: Any) -> bool:
    """Return whether ZeRO-3 keeps this parameter in parts, also where it is whole at the moment."""
    return hasattr(tensor, "ds_id")


def is_part(tensor: Any) -> bool:
    """Return whether only a part of this parameter is here."""
    return is_divided(tensor) and tensor.numel() != tensor.ds_numel


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape that a tensor has where it is whole."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def own_part(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor that are here: all, or this rank's part, without its padding."""
    if not is_part(tensor):
        return tensor
    part = tensor.ds_tensor
    before = tensor.ds_zero_partition_rank * part.numel()
    return part[: max(0, tensor.ds_numel - before)]


def sampled(tensor: Tensor, step: int, count: int) -> Tensor:
    """Return the numbers at 0, step, 2 step, ... of a tensor in rows, `count` of them, as the 16 bits
    of bfloat16 each. All ranks ask together for a tensor in parts.
    """
    flat = own_part(tensor).detach().reshape(-1)
    if not is_part(tensor):
        return flat[::step][:count].to("cpu", torch.bfloat16).view(torch.int16)
    before = tensor.ds_zero_partition_rank * tensor.ds_tensor.numel()
    first = -(-before // step)
    here = flat[first * step - before :: step][: max(0, count - first)].to(torch.bfloat16)
    bits = torch.zeros(count, dtype=torch.int32, device=tensor.device)
    bits[first : first + len(here)] = here.view(torch.int16).to(bits)
    # each number is on one rank, and 0 on the others
    torch.distributed.all_reduce(bits)
    return bits.to("cpu", torch.int16)


def whole(tensors: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which these are whole; all ranks enter it together."""
    return deepspeed_backend.gathered(list(tensors))


def whole_state(model: nn.Module, *, kept: bool) -> dict[str, Tensor]:
    """Return a model's weights by name, whole and in main memory, where `kept`; else none.

    All ranks ask together: weights are gathered one after the other.
    """
    copies: dict[int, Tensor] = {}
    state = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        with whole([weight]):
            if kept:
                # one copy of weights that two modules share
                state[name] = copies.setdefault(id(weight), weight.detach().cpu())
    return state


def free_memory(device: torch.device) -> float:
    """Return the bytes that this process can still take on a device."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    # the ranks on a machine share its memory
    return psutil.virtual_memory().available / read_ranks(os.environ).local_size


@contextlib.contextmanager
def dividing(settings: dict[str, Any] | None) -> Iterator[None]:
    """Divide each parameter that modules are given inside, before the next one is read.

    settings: the DeepSpeed JSON of ZeRO-3; with None parameters stay whole. All ranks load the same
    model inside; the numbers are the main rank's.
    """
    if settings is None:
        yield
        return
    divide = deepspeed_backend.divider(settings)

    def divide_new(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta and not is_divided(parameter):
            divide(parameter)

    before = os.environ.get(READ_AHEAD_OFF)
    os.environ[READ_AHEAD_OFF] = "1"
    hook = register_module_parameter_registration_hook(divide_new)
    try:
        yield
    finally:
        hook.remove()
        del os.environ[READ_AHEAD_OFF]
        if before is not None:
            os.environ[READ_AHEAD_OFF] = before


# Passes


@contextlib.contextmanager
def readable(*modules: nn.Module, world: DistributedContext | None = None) -> Iterator[None]:
    """Let each rank make as many passes without gradients through these modules as it likes.

    Divided parameters are gathered once where they fit; else passes fetch them layer by layer,
    which is slower, and the exchanges of `world` between passes take part in it (`LayerStream`).
    All ranks enter and leave it together.
    """
    stream = LayerStream(modules)
    if not stream.streamed:
        yield
    elif stream.fits():
        # ranks that gather nothing need no hooks of DeepSpeed's, which exchange their traces
        everything = stream.streamed + stream.kept
        with whole(everything), deepspeed_backend.without_hooks(modules):
            yield
    else:
        with whole(stream.kept), stream.passes(world):
            yield


def is_streamed(module: nn.Module) -> bool:
    """Return whether passes through a module fetch its parameters, so that each reads other memory."""
    return any(map(is_part, module.parameters()))


class LayerStream:
    """Makes layers whole while a pass is in them, on all ranks, which need not make the same passes.

    A layer is fetched by all ranks together. So each rank says which layer it wants next, and the
    lowest of them is fetched; who waits for another takes part and drops it. Ranks that began
    together go on together, and one that is behind catches up. A rank that makes no more passes
    takes part until no rank wants a layer (`settle`).
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self.modules = list(modules)
        named = [entry for module in self.modules for entry in module.named_parameters()]
        divided = {parameter: name for name, parameter in named if is_divided(parameter)}
        # adapters, and what DeepSpeed keeps whole as well since it is small
        self.kept = [p for p, name in divided.items() if p.ds_persist or is_adapter(name)]
        self._own = set(divided) - set(self.kept)
        self.streamed = [parameter for parameter in divided if parameter in self._own]
        self.layers = [layer for module in self.modules for layer in self._layers_of(module)]
        self.parts = [self._parameters_of(layer) for layer in self.layers]

    def _parameters_of(self, module: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in module.parameters() if parameter in self._own]

    def _layers_of(self, module: nn.Module) -> list[nn.Module]:
        """Return the modules that are fetched as one: each layer in a list of layers, and each
        module outside of such lists, with what PEFT has put around it.
        """
        if not self._parameters_of(module):
            return []
        is_list = isinstance(module, nn.ModuleList)
        is_wrapper = any(name in module._modules for name in WRAPPED)
        has_lists = any(isinstance(part, LISTS) for part in module.modules())
        if is_wrapper or not has_lists:
            return [module]
        found = []
        for child in module.children():
            is_layer = is_list and not isinstance(child, LISTS) and self._parameters_of(child)
            found += [child] if is_layer else self._layers_of(child)
        return found

    def fits(self) -> bool:
        """Return whether the whole model has room on every rank, the same on all; say which."""
        needed = sum(p.ds_numel * p.element_size() for p in self.streamed if is_part(p))
        device = self.streamed[0].device
        room = torch.tensor(SHARE_OF_FREE_MEMORY * free_memory(device), device=device)
        torch.distributed.all_reduce(room, op=torch.distributed.ReduceOp.MIN)
        fits = needed <= float(room)
        share = f"{SHARE_OF_FREE_MEMORY:.0%} of the memory that is free on each rank"
        if fits and needed:
            say_once(f"ZeRO-3: the model ({needed / 2**30:.2f} GiB) is gathered for sampling")
        if not fits:
            say_once(
                f"ZeRO-3: sampling fetches the model layer by layer, which is slower: the whole takes "
                f"{needed / 2**30:.2f} GiB, more than {share}"
            )
        return fits

    @contextlib.contextmanager
    def passes(self, world: DistributedContext | None) -> Iterator[None]:
        """Fetch layers inside, and take part in the other ranks' fetches before each exchange of
        `world`.
        """
        for part in self.parts:
            part[0].partition(param_list=part)
        # those that a list of layers has beside it, such as learned positions
        in_layers = {parameter for part in self.parts for parameter in part}
        loose = [parameter for parameter in self.streamed if parameter not in in_layers]
        hooks = []
        for number, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_pre_hook(self._fetching(number), prepend=True))
            # after an error too: all ranks have to hold the same
            hooks.append(layer.register_forward_hook(self._dropping(number), always_call=True))
        if world is not None:
            world.before_waiting = self.settle
        try:
            with whole(loose), deepspeed_backend.without_hooks(self.modules):
                yield
                self.settle()
        finally:
            for hook in hooks:
                hook.remove()
            if world is not None:
                world.before_waiting = None

    def _fetching(self, number: int) -> Callable[..., None]:
        def fetch(*_: Any) -> None:
            while self._serve(number) != number:
                pass

        return fetch

    def _dropping(self, number: int) -> Callable[..., None]:
        def drop(*_: Any) -> None:
            self.parts[number][0].partition(param_list=self.parts[number])

        return drop

    def settle(self) -> None:
        """Take part in what the other ranks fetch until none wants a layer any more."""
        nothing = len(self.layers)
        while self._serve(nothing) != nothing:
            pass

    def _serve(self, wanted: int) -> int:
        """Fetch the lowest layer that a rank wants, and return its number; drop it unless it is
        `wanted`.
        """
        lowest = torch.tensor(wanted, device=self.streamed[0].device)
        torch.distributed.all_reduce(lowest, op=torch.distributed.ReduceOp.MIN)
        number = int(lowest)
        if number < len(self.layers):
            part = self.parts[number]
            part[0].all_gather(param_list=part)
            if number != wanted:
                part[0].partition(param_list=part)
        return number


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name is an adapter's, not the base's."""
    return any(part in name for part in ADAPTER_PARTS)
