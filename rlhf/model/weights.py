"""Read weights and their settings from files, with errors that name the file; fingerprints of
weights.
"""

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf.model.weight_files import not_finite
from rlhf.ranks.divided import is_adapter, own_part, sampled, shape_of


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise UserError for the first (name, tensor) that holds NaN or infinity: nothing learns from
    it. Of what ZeRO-3 divides, each rank reads its part.
    """
    for name, tensor in tensors:
        if not is_finite(own_part(tensor)):
            raise not_finite(where, name)


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, in one pass without a copy. aminmax hands NaN on."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(float(low)) and math.isfinite(float(high))


def fingerprint(model: nn.Module, sample: int = 4096) -> str:
    """Return 16 hex digits that name a model's weights, whatever dtype they were loaded in.

    Hashes names, shapes and an even sample of each tensor, read as bfloat16, in sorted order:
    seconds for billions of parameters. Adapter weights that PEFT injected are left out. Of a
    divided model all ranks ask together.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base_weights(model).items()):
        name = name.removeprefix("base_model.model.")
        # read as bfloat16, weights have the same fingerprint whether loaded as float32 or as
        # bfloat16
        size = math.prod(shape_of(tensor))
        step = max(1, size // sample)
        values = sampled(tensor, step, min(sample, -(-size // step)))
        digest.update(f"{name}{shape_of(tensor)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def folder_fingerprint(path: str | Path) -> str:
    """Return a name for the weights in a folder by the hash of its safetensors files."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")):
        with open(file, "rb") as stream:
            # by blocks: a file may be larger than the memory
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()[:16]


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's own weights by their names without PEFT's wrapping, as they are kept: under
    ZeRO-3 in parts.
    """
    weights = model.state_dict(keep_vars=True).items()
    return {plain_name(name): weight for name, weight in weights if not is_adapter(name)}


def plain_name(name: str) -> str:
    """Return the name that a weight of the base has without PEFT's wrapping."""
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name)
