"""Checkpoints that are whole or not there.

One is written beside its place, every file of it hashed into a manifest, and then renamed; what a crash leaves behind
has no manifest, or one that its files do not fit, and is passed over by name. TRL's trainers write under their own
folder names, where the manifest, written last, plays the part of the rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import UserError
from rlhf.files import write_atomic

MANIFEST = "manifest.json"
FOLDER = "checkpoints"  # in an output_dir
# a folder that was sealed and not yet renamed is whole too
_NAME = re.compile(r"(?:step|checkpoint|writing)-0*(\d+)")


class CorruptCheckpoint(Exception):
    """A checkpoint whose files are not those of its manifest; the message says which."""


@dataclass
class Checkpoint:
    """A whole checkpoint: where it is, after how many steps it was made, and what its writer said about it."""

    folder: Path
    step: int
    about: dict[str, Any] = field(default_factory=dict)


def crash_point(point: str) -> None:
    """A moment of the writer at which a crash must do no harm; tests end the process at each of them."""


def write(root: Path, step: int, world: Any, fill: Callable[[Path], None], about: Callable[[], dict]) -> Checkpoint:
    """Write the checkpoint of `step` on all ranks: `fill(folder)` writes its files, `about()` describes it.

    A checkpoint of the same step, which a rollback has left, makes room at the end, when the new one is whole.
    """
    target, beside = root / f"step-{step:06d}", root / f"writing-{step:06d}"
    if world.is_main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    world.barrier()
    crash_point("begun")
    fill(beside)
    write_random_state(beside / f"random-{world.rank}.pt")
    crash_point("filled")
    world.barrier()
    described = about()
    if world.is_main:
        absent = [r for r in range(world.size) if not (beside / f"random-{r}.pt").is_file()]
        if absent:
            raise UserError(f"{root}: ranks {absent} write elsewhere; output_dir has to be one folder for all nodes")
        seal(beside, step, described)
        crash_point("sealed")
        _aside(target)  # one of the same step that a rollback has left behind
        crash_point("set aside")
        os.replace(beside, target)
        _sync(root)
        crash_point("renamed")
    world.barrier()
    return Checkpoint(target, step, described)


def seal(folder: Path, step: int, about: dict[str, Any]) -> None:
    """Put every file of the folder on the disk and write the manifest: {step, about, files: {name: [bytes, sha256]}}.

    Last of all, so that a folder with a manifest that fits is whole."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = [path.stat().st_size, _sha256(path)]
        crash_point(f"hashed {path.name}")
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        _sync(inner)
    # as it will be read, so that both digests are of the same text
    manifest = json.loads(json.dumps({"step": step, "about": about, "files": files}))
    manifest["sha256"] = _manifest_digest(manifest)
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    _sync(folder)
    _sync(folder.parent)


def check(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises Damaged unless every file is the one that was written."""
    manifest = read_manifest(folder)
    for name, (size, digest) in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CorruptCheckpoint(f"{name} is missing")
        if path.stat().st_size != size:
            raise CorruptCheckpoint(f"{name} has {path.stat().st_size} bytes, the manifest says {size}")
        if _sha256(path) != digest:
            raise CorruptCheckpoint(f"{name} is not what was written (its hash differs)")
    return Checkpoint(folder, manifest["step"], manifest["about"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest {step, about, files} of a folder. Raises Damaged where it is not as `seal` wrote it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CorruptCheckpoint(f"no {MANIFEST}: it was never finished") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{MANIFEST} cannot be read ({error})") from None
    try:
        right = isinstance(manifest["about"], dict) and all(len(pair) == 2 for pair in manifest["files"].values())
        # one that an earlier version wrote has no digest of itself
        right &= manifest.get("sha256") in (None, _manifest_digest(manifest))
        # a folder that was copied may have any name
        named = _NAME.fullmatch(folder.name)
        right &= int(manifest["step"]) == (_step(folder) if named else manifest["step"])
    except (KeyError, TypeError, ValueError, AttributeError):
        right = False
    if not right:
        raise CorruptCheckpoint(f"{MANIFEST} is not what was written")
    return manifest


def _manifest_digest(manifest: dict[str, Any]) -> str:
    content = {name: manifest[name] for name in ("step", "about", "files")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def newest(root: Path, log: Callable[[str], None], before: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint under `root`, of a step below `before`; what is passed over is named."""
    for folder in _folders(root):
        if before is not None and _step(folder) >= before:
            continue
        try:
            return check(folder)
        except CorruptCheckpoint as reason:
            log(f"passing over {folder}: {reason}")
    return None


def archive(root: Path, after: int) -> None:
    """Rename the checkpoints of step `after` and later: another course was taken from before them. The next `prune`
    removes them."""
    for folder in _folders(root):
        if _step(folder) >= after:
            _aside(folder)


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints and the best one (`about["score"]`, the higher the better)."""
    scores: dict[Path, float | None] = {}  # of the whole ones, newest first
    for folder in _folders(root):
        with contextlib.suppress(CorruptCheckpoint):
            scores[folder] = read_manifest(folder)["about"].get("score")
    scored = [f for f, score in scores.items() if score is not None and math.isfinite(score)]
    kept = {*list(scores)[:keep], *([max(scored, key=lambda f: (scores[f], _step(f)))] if scored else [])}
    for folder in root.iterdir() if root.is_dir() else ():
        ours = _NAME.fullmatch(folder.name.removeprefix("aside-"))
        if folder.is_dir() and ours and folder not in kept:
            (folder / MANIFEST).unlink(missing_ok=True)  # so that half of one is never taken for damaged
            crash_point(f"unsealed {folder.name}")
            shutil.rmtree(folder, ignore_errors=True)


def write_random_state(path: Path) -> None:
    """The state of every random generator of this process (a scorer of the user's may draw from them)."""
    import random

    import numpy
    import torch

    name, keys, *rest = numpy.random.get_state()
    state = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    torch.save(state, path)


def read_random_state(path: Path) -> None:
    """Put back what `write_random_state` wrote."""
    import random

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


def _aside(folder: Path) -> None:
    if folder.exists():
        aside = folder.with_name(f"aside-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)


def _folders(root: Path) -> list[Path]:
    """The folders named as checkpoints, newest first."""
    found = [p for p in root.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)] if root.is_dir() else []
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name).group(1))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Put a folder's own entries (a rename in it) on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
