"""What files of weights say without torch: whether they are whole, and their tensors usable."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from rlhf.errors import UserError

# the two factors of a layer in LoRA, by the ends of their names
OTHER_FACTOR = {"lora_A.weight": "lora_B.weight", "lora_B.weight": "lora_A.weight"}
# what torch.compile and DDP put before the names of a model's tensors
WRAPPERS = ("_orig_mod.", "module.")
# floating-point numbers that numpy has
NUMPY_FLOATS = ("F16", "F32", "F64")
# magic, version, number of tensors and of settings
GGUF_HEAD = 24


def check_weights(folder: str | Path) -> None:
    """Raise UserError for a safetensors file that is cut short or is none, or was saved through a
    wrapper; its head alone is read.
    """

    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            names = safe_open(str(file), "numpy").keys()
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file}: the weights cannot be read ({error}). Copy or save them again"
            ) from None
        if names and all(name.startswith(WRAPPERS) for name in names):
            raise UserError(
                f"{file}: was saved through a wrapper (torch.compile, DDP): its tensors are called {names[0]} and so "
                "on. Save the model that is inside of it"
            )


def tensor_names(file: Path) -> list[str] | None:
    """Return the names of the tensors in a safetensors file; None where there is none."""

    return list(safe_open(str(file), "numpy").keys()) if file.is_file() else None


def check_factors(path: str | Path) -> None:
    """Raise UserError for an adapter with one factor of a layer without the other, or with numbers
    that are not finite; those that numpy does not have are left out.
    """
    import numpy

    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file():
        return
    weights = safe_open(str(file), "numpy")
    names = set(weights.keys())
    for name in sorted(names):
        for ending, other in OTHER_FACTOR.items():
            if name.endswith(ending) and name.removesuffix(ending) + other not in names:
                raise UserError(
                    f"{path}: its weights do not fit: {name} is there without its {other}. Copy it again"
                )
        is_read = weights.get_slice(name).get_dtype() in NUMPY_FLOATS
        if is_read and not numpy.isfinite(weights.get_tensor(name)).all():
            raise not_finite(path, name)


def not_finite(where: str | Path, name: str) -> UserError:
    """Return the error for a tensor that nothing can learn from."""
    return UserError(
        f"{where}: '{name}' holds numbers that are not finite (NaN or infinity), so it cannot be used. "
        "Take an earlier checkpoint or another start; for a run of one's own, a lower learning_rate"
    )


def check_gguf(file: Path) -> None:
    """Raise UserError for a file that does not begin as GGUF does."""
    with open(file, "rb") as stream:
        head = stream.read(GGUF_HEAD)
    if len(head) < GGUF_HEAD or not head.startswith(b"GGUF"):
        raise UserError(
            f"{file}: no GGUF file could be loaded (it does not begin as one). Fetch or convert it again"
        )
