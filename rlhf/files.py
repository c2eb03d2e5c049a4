"""Folders that one process at a time works in, files named by what they hold, and files written
whole.
"""

import atexit
import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from rlhf.errors import UserError
from rlhf.plugins import import_module

# in a folder that a process is at work in
LOCK = ".lock"
# the folders that this process has locked
_LOCKS: dict[Path, TextIO] = {}
MODEL_FILES = (
    *("*.safetensors", "*.bin", "*.gguf", "*.json", "*.jinja", "*.model"),
    *("vocab.txt", "merges.txt"),
)
# what a run says about itself
RECORD_FILES = ("result.json", "card.json")
# with the place of the base
ADAPTER_FILES = ("adapter_config.json", "rlhf.json")


def lock_folder(folder: str | Path) -> None:
    """Keep other processes out of a folder until `unlock_folder`, or until this process ends, in
    whatever way.

    Makes the folder where it is missing. Locking it again in the same process does nothing. Raises
    UserError where another process holds it, or where nothing can be written.
    """
    folder = Path(folder).resolve()
    if folder in _LOCKS:
        return
    if not _LOCKS:
        atexit.register(_unlock_all, os.getpid())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / LOCK)
    except OSError as error:
        raise UserError(
            f"{folder}: nothing can be written there ({error.strerror}). Choose another place"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    _LOCKS[folder] = file


def unlock_folder(folder: str | Path) -> None:
    """Let others into a folder that `lock_folder` has locked; does nothing where it is not locked."""
    file = _LOCKS.pop(Path(folder).resolve(), None)
    if file is not None:
        Path(file.name).unlink(missing_ok=True)
        # for processes too that were forked meanwhile
        fcntl.flock(file, fcntl.LOCK_UN)
        file.close()


def _locked(path: Path):
    """Return the lock file, open and locked. Raises UserError where another process has locked it."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  held until it is unlocked
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{path.parent}: {file.read() or 'another process'} is at work in this folder. Wait until it has "
                "ended, or choose another --output_dir"
            ) from None
        # whoever held it may have removed the file between our opening and locking it
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _unlock_all(process: int) -> None:
    """Unlock at the end of the process that locked them; a folder that a refused start has left
    empty goes too.
    """
    if os.getpid() != process:
        return
    for folder in list(_LOCKS):
        unlock_folder(folder)
        with contextlib.suppress(OSError):
            folder.rmdir()


def model_files(folder: str | Path) -> list[Path]:
    """Return the files that decide what a model in this folder computes: weights, settings,
    tokenizer, template.

    A GGUF file is all of it. None for a name on the Hub.
    """
    if Path(folder).suffix == ".gguf":
        return [Path(folder)]
    found = {path for pattern in MODEL_FILES for path in Path(folder).glob(pattern)}
    return sorted(path for path in found if path.name not in RECORD_FILES)


def scorer_files(spec: dict[str, Any]) -> list[Path]:
    """Return the local files that the scores of a scorer's specification depend on; a service has
    none.

    Of a Python function it is the file that defines it: what that imports is not followed.
    """
    if "voice" in spec:
        return [Path(spec["voice"]), *(scorer_files(spec["judge"]) if spec.get("judge") else [])]
    if "function" in spec:
        module = import_module(str(spec["function"]).partition(":")[0], "scorers")
        return [Path(module.__file__)] if getattr(module, "__file__", None) else []
    if "openai" in spec:
        return [Path(spec[name]) for name in ("template", "guide") if spec.get(name)]
    folders = [spec["model"]] if "model" in spec else spec.get("ensemble", [])
    return [file for folder in folders for file in model_files(folder)]


def files_fingerprint(files: Iterable[str | Path]) -> str:
    """Return 16 hex digits that name the files' contents and names. The place of an adapter's base
    is left out: it may move, and its weights have a fingerprint of their own.
    """
    digest = hashlib.sha256()
    for file in map(Path, files):
        digest.update(f"{file.name}\n".encode())
        if file.name in ADAPTER_FILES:
            settings = json.loads(file.read_text())
            settings.pop("base_model_name_or_path", None)
            digest.update(json.dumps(settings, sort_keys=True).encode())
        else:
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def model_fingerprint(model: str) -> str:
    """Return what identifies a model: its name on the Hub, or the fingerprint of its files, which
    may be moved.
    """
    return files_fingerprint(model_files(model)) if Path(model).exists() else model


def cache_folder() -> Path:
    """Return RLHF_CACHE, else `rlhf` in XDG_CACHE_HOME, else in ~/.cache."""
    if chosen := os.environ.get("RLHF_CACHE"):
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "rlhf"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write text or bytes so that a reader, or a crash, finds the old file or the whole new one."""
    # of this process: others may write the same file
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def dumps(value: Any, indent: int | None = None) -> str:
    """Return `value` as JSON, whatever it holds (see `json_safe`)."""
    return json.dumps(json_safe(value), ensure_ascii=False, allow_nan=False, indent=indent)


def json_safe(value: Any, *, nan_as_null: bool = False) -> Any:
    """Return `value` as JSON can hold it: numbers that are not finite become strings (or None),
    arrays numbers, the rest text.
    """
    if isinstance(value, dict):
        return {str(k): json_safe(v, nan_as_null=nan_as_null) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [json_safe(v, nan_as_null=nan_as_null) for v in value]
    if hasattr(value, "tolist"):
        return json_safe(value.tolist(), nan_as_null=nan_as_null)
    if isinstance(value, float) and not math.isfinite(value):
        if nan_as_null:
            return None
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
