"""The pretrained base that comes with the package: what `rlhf sandbox build` takes at its default
settings, so that every machine begins with the same weights.

Pretraining on the spot gives other weights with another processor or number of threads, since
rounding grows over the steps. The weights are kept as 16-bit floats, which halves the file; they
are written out as 32-bit ones. `pretrained/sandbox.json` says what the base is made from. To make
the files again, after a change of the corpus, the tokenizer or the pretraining:

    rlhf sandbox build --pretrain --output_dir runs/new
    python -m rlhf.sandbox.packaged runs/new/base
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy

FOLDER = Path(__file__).parent / "pretrained"
WEIGHTS = "model.safetensors"
RECORD = "sandbox.json"


def read_record() -> dict[str, Any]:
    """Return what the packaged base is made from ("made_from"), and its losses."""
    return json.loads((FOLDER / RECORD).read_text(encoding="utf-8"))


def copy_to(folder: Path) -> None:
    """Write the packaged base into a new folder, as a Hub model with 32-bit weights."""
    shutil.copytree(FOLDER, folder)
    _convert(folder / WEIGHTS, numpy.float32)


def package(base: Path) -> None:
    """Replace the packaged base by the one in a folder, with its weights rounded to 16 bits."""
    record = json.loads((base / RECORD).read_text(encoding="utf-8"))
    # of the machine that made it
    record.pop("seconds", None)
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree(base, FOLDER)
    _convert(FOLDER / WEIGHTS, numpy.float16)
    text = json.dumps(record | {"packaged": True}, indent=2)
    (FOLDER / RECORD).write_text(text + "\n", encoding="utf-8")


def _convert(file: Path, dtype: type) -> None:
    from safetensors.numpy import load_file, save_file

    weights = {name: values.astype(dtype) for name, values in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    # the library makes files that only their owner may read
    file.chmod(0o644)


if __name__ == "__main__":
    package(Path(sys.argv[1]))
