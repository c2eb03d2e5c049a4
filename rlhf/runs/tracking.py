"""What a run writes down: metrics.jsonl, sample tables, result.json, the console line, and W&B when
asked.

    with Tracker("runs/ppo", report_to="wandb", config=asdict(config)) as tracker:
        tracker.log({"score/total": 0.4, "kl/sequence": 3.1}, step)
        tracker.console(step, config.max_steps, metrics, ["score/total", "kl/sequence"])
        tracker.result({"program": "ppo", "seed": config.seed, "headline": {...}})

Metric names are those of rlhf/runs/metrics.py.
"""

import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

from rlhf.files import dumps, write_atomic
from rlhf.runs.metrics import check_names
from rlhf.runs.wandb import WandbLog

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
PACKAGES = ("rlhf", "torch", "transformers", "trl", "peft", "deepspeed", "datasets")


class Tracker:
    """Writes a run's numbers under `output_dir`; only the main rank writes, all ranks may call.

    Without `resume_step` the files start afresh. With it, what was written after that step's
    checkpoint is cut off, so that a resumed run leaves the same files as one that was never
    stopped: at `position`, the file sizes that the checkpoint recorded, or after the rows of that
    step where they are not known.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        report_to: Literal["none", "wandb"] = "none",
        project: str | None = None,
        run_name: str | None = None,
        job_type: str | None = None,
        tags: Iterable[str] = (),
        config: dict[str, Any] | None = None,
        is_main: bool = True,
        resume_step: int | None = None,
        position: dict[str, int] | None = None,
        console_seconds: float = 10.0,
    ):
        self.output_dir = Path(output_dir)
        self.is_main = is_main
        self.progress = Progress(console_seconds)
        if not is_main:
            return
        (self.output_dir / "tables").mkdir(parents=True, exist_ok=True)
        self._open(resume_step, position)
        self.wandb = WandbLog(self.output_dir, resumed=resume_step is not None)
        if report_to == "wandb":
            self.wandb.start(project, run_name, config or {}, job_type, tags)

    def _open(self, step: int | None, position: dict[str, int] | None) -> None:
        for path in self._files():
            if step is None:
                path.unlink(missing_ok=True)
            elif path.exists():
                _cut_back(path, step, None if position is None else position.get(path.name, 0))
        self._metrics_file = open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def _files(self) -> list[Path]:
        return [
            self.output_dir / "metrics.jsonl",
            *sorted((self.output_dir / "tables").glob("*.jsonl")),
        ]

    def position(self) -> dict[str, int]:
        """Flush the files to disk and return their sizes, for a checkpoint; empty on other ranks."""
        if not self.is_main:
            return {}
        # a step that is in the checkpoint is not made again
        self.wandb.flush()
        sizes = {}
        for path in self._files():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        return sizes

    def rewind(self, step: int, position: dict[str, int]) -> None:
        """Cut off what was written since the checkpoint of `step`; W&B keeps it."""
        if self.is_main:
            self._metrics_file.close()
            self._open(step, position)
            self.wandb.rewind()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append one line of numbers. Raises KeyError, on every rank, for a name outside the
        vocabulary.
        """
        # on all ranks, so that all of them stop at the same place
        check_names(metrics)
        if not self.is_main:
            return
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        row = {"step": int(step), "time": round(time.time(), 3), **numbers}
        self._metrics_file.write(dumps(row) + "\n")
        # a killed process keeps what it has logged
        self._metrics_file.flush()
        self.wandb.log(numbers, int(step))

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Append sample rows (prompt, response, score and its breakdown, ...) to
        tables/<name>.jsonl, and to W&B.
        """
        if not self.is_main or not rows:
            return
        with open(self.output_dir / "tables" / f"{name}.jsonl", "a", encoding="utf-8") as file:
            for row in rows:
                file.write(dumps({"step": int(step), **row}) + "\n")
        self.wandb.table(name, rows, int(step))

    def images(self, files: Mapping[str, str | Path], step: int) -> None:
        """Show pictures (name -> file) in W&B; without it do nothing, since the files are there
        already.
        """
        if self.is_main:
            self.wandb.images(files, int(step))

    def page(self, name: str, html: str) -> None:
        """Show a page of HTML in W&B; without it do nothing."""
        if self.is_main:
            self.wandb.page(name, html)

    def artifacts(self, inputs: Iterable[str | Path], kind: str = "model") -> None:
        """Send what is in `output_dir` to W&B as an artifact made from `inputs`: folders of models
        and files of data.
        """
        if self.is_main:
            self.wandb.artifacts(inputs, self.output_dir, kind)

    def console(
        self, step: int, total: int, metrics: dict[str, float], names: Iterable[str]
    ) -> None:
        """Print the named metrics, at most every `console_seconds`; at the first and the last step
        always.
        """
        if self.is_main:
            self.progress.show(step, total, metrics, names)

    def result(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write result.json in one piece, adding finished (UTC), versions and platform; return what
        was written.
        """
        whole = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **result,
            "versions": versions(),
            "platform": platform.platform(),
        }
        if self.is_main:
            write_atomic(self.output_dir / "result.json", dumps(whole, indent=2) + "\n")
            self.wandb.result(whole)
        return whole

    def finish(self, *, failed: bool = False) -> None:
        """Close the files and the W&B run; calling it twice does no harm."""
        if self.is_main:
            self._metrics_file.close()
            self.wandb.finish(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.finish(failed=kind is not None)


class Progress:
    """The console line of a run, with an estimate of the time left."""

    def __init__(self, every_seconds: float):
        self.every_seconds = every_seconds
        # time and step of the first line
        self.first: tuple[float, int] | None = None
        self.last_time = -math.inf

    def show(self, step: int, total: int, metrics: dict[str, float], names: Iterable[str]) -> None:
        now = time.monotonic()
        if now - self.last_time < self.every_seconds and step < total:
            return
        self.last_time = now
        self.first = self.first or (now, step)
        start, first = self.first

        text = f"step {step}/{total}"
        # the first line has no time before it to go by
        if first < step < total:
            seconds = (now - start) / (step - first) * (total - step)
            text += f", {_clock(seconds)} left"
        shown = [f"{name} {metrics[name]:.4g}" for name in names if name in metrics]
        print("  ".join([text, *shown]), flush=True)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl without a torn last one; "NaN" and the like are numbers
    again.
    """
    rows = _rows(path)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str):
                row[name] = NOT_FINITE.get(value, value)
    return rows


def versions() -> dict[str, str | None]:
    """Return the versions of what numbers depend on; None where a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cut_back(path: Path, step: int, size: int | None) -> None:
    """Cut a file to `size` bytes; where it is shorter, or `size` is not known, to the rows up to
    `step`.
    """
    if size is not None and size <= path.stat().st_size:
        os.truncate(path, size)
        return
    # the size is not known, or the file was cut by hand
    kept = [dumps(row) + "\n" for row in _rows(path) if row["step"] <= step]
    write_atomic(path, "".join(kept))


def _rows(path: str | Path) -> list[dict[str, Any]]:
    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                # the process was killed while it wrote this line
                break
    return rows


def _number(name: str, value: Any) -> float | int:
    # tensors and numpy numbers
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, (int, float)):
        raise TypeError(f"metric '{name}': expected a number, found {value!r}")
    return value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{seconds:02}s"
