"""Checkpoints of DeepSpeed's engine, loaded by as many ranks as wrote them or by another number.

Under ZeRO each rank writes its part of the weights and moments. What another number of ranks needs is
put together from the files of all, parameter by parameter: nothing is gathered or written twice while a
run saves. DeepSpeed's universal checkpoints do the same by a conversion of the whole folder.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.ranks.deepspeed_backend import gathered

PARTS = "*zero_pp_rank_*_mp_rank_00_optim_states.pt"
# what stands for the weights themselves among the names of an optimizer's state
WEIGHTS = "weights"


def load(engine: Any, folder: str | Path, tag: str | None = None, *, strict: bool = False) -> None:
    """Restore weights and the optimizer's state of a trained engine, on all ranks.

    `tag` is the folder in `folder`; None takes the one that its file `latest` names. Raises UserError
    where there is none, or where the state cannot be divided among another number of ranks.
    """
    folder = Path(folder)
    latest = folder / "latest"
    if tag is None and latest.is_file():
        tag = latest.read_text().strip()
    place = folder / (tag or "")
    files = rank_files(place)
    # without ZeRO every rank has all of it in the one file
    if not files or len(files) == torch.distributed.get_world_size():
        found, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=strict)
        if found is None:
            raise UserError(f"{folder}: DeepSpeed found no state of its engine there")
        return
    load_divided(engine, SavedParts(place, files))


def rank_files(folder: Path) -> list[Path]:
    """Return the files with the parts of ZeRO's optimizer state, in the order of ranks."""
    return sorted(folder.glob(PARTS), key=lambda path: int(re.search(r"rank_(\d+)", path.name)[1]))


class Fragment(NamedTuple):
    """A stretch of a parameter in the flat tensor of a rank's group of parameters."""

    rank: int
    group: int
    start: int
    count: int


class SavedParts:
    """The weights and the optimizer's state that ranks have written, by the name of the parameter.

    Files are mapped into memory and read where they are asked for.
    """

    def __init__(self, folder: Path, files: list[Path]):
        self.folder = folder
        self._parts = [_read(file)["optimizer_state_dict"] for file in files]
        self.fragments: dict[str, list[Fragment]] = defaultdict(list)
        divided = "fp32_flat_groups" in self._parts[0]
        find = self._fragments_of_zero3 if divided else self._fragments_of_zero2
        for name, fragment in find():
            self.fragments[name].append(fragment)

        inner, weights = "base_optimizer_state", "single_partition_of_fp32_groups"
        if divided:
            inner, weights = "optimizer_state_dict", "fp32_flat_groups"
        self._states = [part[inner]["state"] for part in self._parts]
        self._weights = [part[weights] for part in self._parts]
        # settings of the optimizer by group, such as the step size; the same on all ranks
        self.settings: list[dict[str, Any]] = self._parts[0][inner]["param_groups"]

    def empty_state(self, group: int, flat: Tensor) -> dict[str, Tensor]:
        """Return the optimizer's state of a group, with zeros where there is a number for each weight.

        It is empty before the group's first step.
        """
        state = {}
        # the first rank's part is of full length, and may be padded in the state alone
        count = self._weights[0][group].numel()
        for key, value in self._states[0].get(group, {}).items():
            value = torch.as_tensor(value)
            if value.dim() == 0:
                # the count of steps, which PyTorch keeps on the CPU
                state[key] = value.clone()
            elif value.is_floating_point() and value.numel() >= count:
                state[key] = torch.zeros_like(flat, dtype=value.dtype, requires_grad=False)
            else:
                raise UserError(
                    f"{self.folder}: '{key}' of the optimizer is not one number for each weight, and cannot be divided "
                    f"among another number of ranks. Start {len(self._parts)} as before"
                )
        return state

    def whole(self, name: str, key: str = WEIGHTS) -> Tensor:
        """Return a parameter, or its part of the optimizer's state `key`, as one flat tensor."""
        if name not in self.fragments:
            raise UserError(f"{self.folder}: holds no state of {name}")
        pieces = []
        for rank, group, start, count in self.fragments[name]:
            held = self._weights[rank][group] if key == WEIGHTS else self._states[rank][group][key]
            pieces.append(held.narrow(0, start, count))
        return torch.cat(pieces)

    def _fragments_of_zero2(self) -> Iterator[tuple[str, Fragment]]:
        for rank, part in enumerate(self._parts):
            for group, names in enumerate(part["param_slice_mappings"]):
                for name, place in names.items():
                    yield name, Fragment(rank, group, place.start, place.numel)

    def _fragments_of_zero3(self) -> Iterator[tuple[str, Fragment]]:
        """Yield the fragments under ZeRO-3, where each parameter is cut into equal parts, the last
        one padded.
        """
        described = _read(self.folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
        ranks = len(self._parts)
        for group, shapes in enumerate(described["param_shapes"]):
            start = 0
            for name, shape in shapes.items():
                size = torch.Size(shape).numel()
                for rank in range(ranks):
                    share, count = _share(size, rank, ranks)
                    yield name, Fragment(rank, group, start, count)
                start += share


@dataclass
class OwnPart:
    """This rank's stretch of a parameter: `count` numbers from `offset` on.

    They stand in the flat weights of its group, which the optimizer updates, from `start` on.
    """

    group: int
    start: int
    offset: int
    count: int

    def copy(self, target: Tensor, whole: Tensor) -> None:
        """Copy this stretch of a whole parameter to its place in a flat tensor of the group."""
        source = whole.narrow(0, self.offset, self.count)
        target.narrow(0, self.start, self.count).copy_(source)


def load_divided(engine: Any, saved: SavedParts) -> None:
    """Restore an engine's trained weights and optimizer state from those of another number of ranks.

    Raises UserError where a state is not one number for each weight, such as moments in 8 bits.
    """
    flats, own = own_parts(engine.optimizer)
    states = [saved.empty_state(group, flat) for group, flat in enumerate(flats)]
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        weights = saved.whole(name)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        with gathered([parameter], modify=True), torch.no_grad():
            parameter.copy_(weights.view(shape))
        part = own.get(parameter)
        if part is None:
            continue
        part.copy(flats[part.group].data, weights)
        for key, held in states[part.group].items():
            if held.dim():
                part.copy(held, saved.whole(name, key))

    # the optimizer of PyTorch inside ZeRO's
    inner = engine.optimizer.optimizer
    for flat, state in zip(flats, states, strict=True):
        if state:
            inner.state[flat] = state
    for group, settings in zip(inner.param_groups, saved.settings, strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})


def own_parts(optimizer: Any) -> tuple[list[Tensor], dict[nn.Parameter, OwnPart]]:
    """Return the flat weights of this rank by group, and which of a parameter's stand there."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = {}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for group, parameters in enumerate(optimizer.fp16_groups):
            start = 0
            for parameter in parameters:
                share, count = _share(parameter.ds_numel, rank, ranks)
                offset = min(rank * share, parameter.ds_numel)
                own[parameter] = OwnPart(group, start, offset, count)
                start += share
        return optimizer.fp32_partitioned_groups_flat, own

    for group, parameters in enumerate(optimizer.bit16_groups):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            # none where other ranks hold all of it
            if mapping is not None:
                inside = mapping.lp_fragment_address
                start = mapping.hp_fragment_address.start
                own[parameter] = OwnPart(group, start, inside.start, inside.numel)
    return optimizer.single_partition_of_fp32_groups, own


def _share(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return the equal share of each rank in a parameter under ZeRO-3, and what of a rank's own is no
    padding.
    """
    share = -(-size // ranks)
    return share, max(0, min(share, size - rank * share))


def _read(file: Path) -> Any:
    """Return what DeepSpeed has written, mapped into memory; its own classes are among it."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)
