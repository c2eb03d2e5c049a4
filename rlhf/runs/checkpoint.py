"""Checkpoints that are either whole or not there.

A checkpoint is written beside its place, every file of it is hashed into a manifest, and then it is
renamed. What a crash leaves behind has no manifest, or one that its files do not match, and is
skipped by name. TRL's trainers write under their own folder names; there the manifest, which is
written last, does what the rename does.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.files import write_atomic

MANIFEST = "manifest.json"
# in an output_dir
FOLDER = "checkpoints"
# a folder that was sealed and not yet renamed is whole too
_NAME = re.compile(r"(?:step|checkpoint|writing)-0*(\d+)")


class CorruptCheckpoint(Exception):
    """A checkpoint whose files do not match its manifest; the message says which."""


@dataclass
class Checkpoint:
    """A whole checkpoint: its folder, the steps made before it, and what its writer recorded
    (`about` on disk).
    """

    folder: Path
    step: int
    metadata: dict[str, Any] = field(default_factory=dict)


def crash_point(point: str) -> None:
    """Mark a moment at which a crash must do no harm; tests end the process at each of them."""


def write(
    root: Path,
    step: int,
    world: Any,
    write_files: Callable[[Path], None],
    metadata: Callable[[], dict[str, Any]],
) -> Checkpoint:
    """Write the checkpoint of `step` on all ranks.

    `write_files(folder)` writes its files on each rank; `metadata()`, called after that, returns
    what it records.
    """
    target = root / f"step-{step:06d}"
    beside = root / f"writing-{step:06d}"
    if world.is_main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    world.barrier()

    crash_point("begun")
    write_files(beside)
    write_random_state(beside / f"random-{world.rank}.pt")
    crash_point("filled")
    world.barrier()

    recorded = metadata()
    if world.is_main:
        absent = [
            rank for rank in range(world.size) if not (beside / f"random-{rank}.pt").is_file()
        ]
        if absent:
            raise UserError(
                f"{root}: ranks {absent} do not share output_dir, which has to be one folder for all nodes"
            )
        seal(beside, step, recorded)
        crash_point("sealed")
        # a rollback may have left one of the same step: it makes room only now, when the new one is
        # whole
        _set_aside(target)
        crash_point("set aside")
        os.replace(beside, target)
        _sync_folder(root)
        crash_point("renamed")
    world.barrier()
    return Checkpoint(target, step, recorded)


def seal(folder: Path, step: int, metadata: dict[str, Any]) -> None:
    """Flush every file of the folder to disk and write the manifest: {step, about, files: {name:
    [bytes, sha256]}}.

    The manifest comes last, so that a folder with a manifest that matches is whole.
    """
    entries = sorted(folder.rglob("*"))
    files = {}
    for path in entries:
        if path.is_dir() or path.name == MANIFEST:
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = [path.stat().st_size, _sha256(path)]
        crash_point(f"hashed {path.name}")
    # a file's name is on disk only once its folder is
    for path in entries:
        if path.is_dir():
            _sync_folder(path)

    # as it will be read back, so that both digests are of the same text
    manifest = json.loads(json.dumps({"step": step, "about": metadata, "files": files}))
    manifest["sha256"] = _manifest_digest(manifest)
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    _sync_folder(folder)
    _sync_folder(folder.parent)


def check(folder: Path) -> Checkpoint:
    """Return the checkpoint in a folder. Raise CorruptCheckpoint unless every file is the one that
    was written.
    """
    manifest = read_manifest(folder)
    for name, (size, digest) in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CorruptCheckpoint(f"{name} is missing")
        # cheaper than hashing, and finds what a full disk leaves
        if path.stat().st_size != size:
            raise CorruptCheckpoint(
                f"{name} has {path.stat().st_size} bytes, the manifest says {size}"
            )
        if _sha256(path) != digest:
            raise CorruptCheckpoint(f"{name} is not what was written (its hash differs)")
    return Checkpoint(folder, manifest["step"], manifest["about"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest {step, about, files} of a folder. Raise CorruptCheckpoint unless it is as
    `seal` wrote it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CorruptCheckpoint(f"no {MANIFEST}: it was never finished") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{MANIFEST} cannot be read ({error})") from None
    try:
        is_whole = _manifest_is_whole(manifest, folder)
    except (KeyError, TypeError, ValueError, AttributeError):
        is_whole = False
    if not is_whole:
        raise CorruptCheckpoint(f"{MANIFEST} is not what was written")
    return manifest


def _manifest_is_whole(manifest: Any, folder: Path) -> bool:
    """Return whether a manifest has its parts and digest; may also raise where a part is missing."""
    if not isinstance(manifest["about"], dict) or any(
        len(entry) != 2 for entry in manifest["files"].values()
    ):
        return False
    # an earlier version wrote no digest
    if manifest.get("sha256") not in (None, _manifest_digest(manifest)):
        return False
    # a folder that was copied may have any name
    return not _NAME.fullmatch(folder.name) or int(manifest["step"]) == _step(folder)


def _manifest_digest(manifest: dict[str, Any]) -> str:
    content = {name: manifest[name] for name in ("step", "about", "files")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def newest(root: Path, log: Callable[[str], None], before: int | None = None) -> Checkpoint | None:
    """Return the newest whole checkpoint under `root`, of a step below `before`; log those that are
    skipped.
    """
    for folder in _folders(root):
        if before is not None and _step(folder) >= before:
            continue
        try:
            return check(folder)
        except CorruptCheckpoint as reason:
            log(f"skipping {folder}: {reason}")
    return None


def archive(root: Path, after: int) -> None:
    """Rename the checkpoints of step `after` and later, which the run leaves behind; the next
    `prune` removes them.
    """
    for folder in _folders(root):
        if _step(folder) >= after:
            _set_aside(folder)


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints and the best one (by `score`, the later
    one of equals).
    """
    # of the whole ones, newest first
    scores: dict[Path, float | None] = {}
    for folder in _folders(root):
        with contextlib.suppress(CorruptCheckpoint):
            scores[folder] = read_manifest(folder)["about"].get("score")
    # the best one is kept beside the newest, however old it is
    kept = set(list(scores)[:keep])
    scored = [
        folder for folder, score in scores.items() if score is not None and math.isfinite(score)
    ]
    if scored:
        kept.add(max(scored, key=lambda folder: scores[folder]))

    for folder in root.iterdir() if root.is_dir() else ():
        is_ours = folder.is_dir() and _NAME.fullmatch(folder.name.removeprefix("aside-"))
        if is_ours and folder not in kept:
            # so that what a crash leaves of it is never taken for a damaged one
            (folder / MANIFEST).unlink(missing_ok=True)
            crash_point(f"unsealed {folder.name}")
            shutil.rmtree(folder, ignore_errors=True)


def write_random_state(path: Path) -> None:
    """Write the state of every random generator of this process (the user's scorer may draw from
    them too).
    """
    import numpy
    import torch

    # as plain lists, which torch.load reads without running code
    name, keys, *rest = numpy.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    torch.save(state, path)


def read_random_state(path: Path) -> None:
    """Restore what `write_random_state` wrote."""
    import numpy
    import torch

    state = torch.load(path, weights_only=True)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def _set_aside(folder: Path) -> None:
    if folder.exists():
        aside = folder.with_name(f"aside-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)


def _folders(root: Path) -> list[Path]:
    """Return the folders named as checkpoints, newest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name).group(1))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Flush a folder's own entries (a rename in it) to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
