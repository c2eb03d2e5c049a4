"""What a run writes down: metrics.jsonl always, sample tables, result.json, the model card; W&B when asked.

    with Tracker("runs/ppo", report_to="wandb", config=asdict(config), data=fingerprints) as tracker:
        tracker.log({"score/total": 0.4, "kl/sequence": 3.1}, step)
        tracker.console(step, config.max_steps, metrics, ["score/total", "kl/sequence"])
        tracker.result({"program": "ppo", "seed": config.seed, "headline": {...}})

Names are those of rlhf/runs/metrics.py. Nothing that goes wrong with W&B stops a run, and nothing ever asks for a login.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rlhf.files import dumps, json_safe, write_atomic
from rlhf.runs.metrics import METRICS, check_names, metrics_page

__all__ = [
    "METRICS",
    "Tracker",
    "metrics_page",
    "read_metrics",
    "versions",
    "write_card",
]

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
WANDB_INIT_SECONDS = 15
SENT = "wandb_step"  # the last step that W&B was sent


class Tracker:
    """Writes a run's numbers under `output_dir`; only the main rank writes, all ranks may call.

    config, data: the resolved options and the data fingerprints {name: fingerprint}; both go to W&B, data into
    result.json. Without `resume_step` the files start afresh; with it, what was written after that step's checkpoint
    (`position`, as it was then) is cut off, so that a resumed run leaves the same file as one that never stopped. W&B
    is not sent a step again. `report_to="wandb"` runs online if WANDB_MODE says so or a key is configured
    (WANDB_API_KEY or netrc), offline otherwise.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        report_to: Literal["none", "wandb"] = "none",
        project: str | None = None,
        run_name: str | None = None,
        config: dict[str, Any] | None = None,
        data: dict[str, str] | None = None,
        is_main: bool = True,
        resume_step: int | None = None,
        position: dict[str, int] | None = None,
        console_seconds: float = 10.0,
    ):
        self.output_dir = Path(output_dir)
        self.is_main = is_main
        self.data = dict(data or {})
        self.console_seconds = console_seconds
        self._console_first: tuple[float, int] | None = None
        self._console_last = -math.inf
        self._file = self._run = None
        self._sent = -1
        if not is_main:
            return
        (self.output_dir / "tables").mkdir(parents=True, exist_ok=True)
        self._open(resume_step, position)
        if resume_step is None:
            (self.output_dir / SENT).unlink(missing_ok=True)
        else:
            self._sent = _sent(self.output_dir)
        if report_to == "wandb":
            resumed = resume_step is not None
            self._run = _start_wandb(self.output_dir, project, run_name, {**(config or {}), "data": self.data}, resumed)

    def _open(self, step: int | None, position: dict[str, int] | None) -> None:
        for path in self._files():
            _cut(path, step, None if position is None else position.get(path.name, 0))
        self._file = open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def _files(self) -> list[Path]:
        return [self.output_dir / "metrics.jsonl", *sorted((self.output_dir / "tables").glob("*.jsonl"))]

    def position(self) -> dict[str, int]:
        """How long each file is now, and certainly on the disk: for a checkpoint. Empty on other ranks."""
        if not self.is_main:
            return {}
        for path in self._files():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        return {path.name: path.stat().st_size for path in self._files()}

    def rewind(self, step: int, position: dict[str, int]) -> None:
        """Cut off what was written since the checkpoint of `step`; W&B keeps it."""
        if self.is_main:
            self._file.close()
            self._open(step, position)
            self._sent = max(self._sent, _sent(self.output_dir))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append one line of numbers. Raises KeyError, on every rank, for a name outside the vocabulary."""
        check_names(metrics)
        if not self.is_main:
            return
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        self._file.write(dumps({"step": int(step), "time": round(time.time(), 3), **numbers}) + "\n")
        self._file.flush()
        if step > self._sent:
            self._wandb("log", lambda run: run.log({"step": int(step), **numbers}))
            self._mark_sent(step)

    def _mark_sent(self, step: int) -> None:
        """Note how far W&B has been told, for a later resume; steps up to there are not sent again."""
        if self._run is not None and step > _sent(self.output_dir):
            (self.output_dir / SENT).write_text(str(int(step)))

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Append sample rows (prompt, response, score and its breakdown, ...) to tables/<name>.jsonl, and to W&B."""
        if not self.is_main or not rows:
            return
        with open(self.output_dir / "tables" / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(dumps({"step": int(step), **row}) + "\n" for row in rows)
        columns = list(dict.fromkeys(key for row in rows for key in row))

        def send(run):
            import wandb

            cells = [[_cell(row.get(c)) for c in columns] for row in rows]
            run.log({"step": int(step), f"tables/{name}": wandb.Table(columns=columns, data=cells)})

        if step > self._sent:
            self._wandb("table", send)

    def images(self, files: Mapping[str, str | Path], step: int) -> None:
        """Show pictures (name -> file) in W&B; without it nothing is done, since the files are there already."""

        def send(run):
            import wandb

            run.log({"step": int(step), **{f"figures/{name}": wandb.Image(str(file)) for name, file in files.items()}})

        if step > self._sent:
            self._wandb("images", send)

    def console(self, step: int, total: int, metrics: dict[str, float], keys: Iterable[str]) -> None:
        """One line of progress on stdout, at most every `console_seconds`; the first and the last step always."""
        now = time.monotonic()
        if not self.is_main or (now - self._console_last < self.console_seconds and step < total):
            return
        self._console_first = self._console_first or (now, step)
        self._console_last = now
        start, first = self._console_first
        left = f", {_clock((now - start) / (step - first) * (total - step))} left" if first < step < total else ""
        shown = "  ".join(f"{key} {metrics[key]:.4g}" for key in keys if key in metrics)
        print(f"step {step}/{total}{left}  {shown}".rstrip(), flush=True)

    def result(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write result.json in one piece, adding finished (UTC), data, versions and platform; returns what it wrote."""
        whole = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "data": self.data,
            **result,
            "versions": versions(),
            "platform": platform.platform(),
        }
        if self.is_main:
            write_atomic(self.output_dir / "result.json", dumps(whole, indent=2) + "\n")
            self._wandb(
                "config", lambda run: run.config.update({"data": json_safe(whole["data"])}, allow_val_change=True)
            )
            self._wandb("summary", lambda run: run.summary.update({"result": json_safe(whole.get("headline", {}))}))
        return whole

    def finish(self) -> None:
        """Close the files and the W&B run; calling it twice does no harm."""
        if self._file is not None:
            self._file.close()
        self._wandb("finish", lambda run: run.finish())
        self._run = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self._wandb("finish", lambda run: run.finish(exit_code=1))
            self._run = None
        self.finish()

    def _wandb(self, what: str, call) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # a tracker must never end a run
            _warn(f"W&B {what} failed ({_first_line(error)}); going on with metrics.jsonl alone")
            self._run = None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, "NaN" and its kin turned back into numbers; a torn last line is left out."""
    return [{k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()} for row in _rows(path)]


def versions() -> dict[str, str | None]:
    """Versions of what numbers depend on; None where a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("rlhf", "torch", "transformers", "trl", "peft", "deepspeed", "datasets"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def write_card(
    output_dir: str | Path, program: str, config: dict[str, Any], result: dict[str, Any], provenance: dict[str, Any]
) -> None:
    """README.md in `output_dir`: what was trained, from what, on which data, with what result.

    config: the resolved options; result: as in result.json;
    provenance: {data set: {"source": ..., "rows": ..., "fingerprint": ..., ...}}, or {what: one line of text}.
    """
    folder, base = Path(output_dir), str(config.get("model_name_or_path", "unknown"))
    adapter = (folder / "adapter_config.json").exists()
    lines = ["---", f"library_name: {'peft' if adapter else 'transformers'}"]
    if base != "unknown" and not Path(base).exists():  # the Hub refuses a card whose base is a folder
        lines.append(f"base_model: {base}")
    lines += [
        "tags:",
        "- rlhf",
        f"- {program}",
        "---",
        "",
        f"# {folder.resolve().name}: {program} of {Path(base).name}",
    ]
    lines += [
        "",
        f"Trained by `launch/{program}.py` from `{base}`, seed {result.get('seed', '?')}. All options stand in",
    ]
    lines += ["`config.yaml`, the numbers over time in `metrics.jsonl`, the outcome in `result.json`."]
    lines += ["", "## Result", "", *_table(["number", "value"], result.get("headline", {}).items())]
    lines += ["", "## Cost", "", *_table(["counter", "value"], result.get("budget", {}).items()), "", "## Data", ""]
    lines += [f"- {name}: {text}" for name, text in provenance.items() if not isinstance(text, dict)]
    sets = {name: dict(facts) for name, facts in provenance.items() if isinstance(facts, dict)}
    for name, counts in result.get("rows", {}).items():
        dropped = "; ".join(f"{count}: {reason}" for reason, count in counts["dropped"].items())
        sets.setdefault(name, {}).update(read=counts["read"], used=counts["used"], dropped=dropped)
    for name, fingerprint in result.get("data", {}).items():
        sets.setdefault(name, {}).setdefault("fingerprint", fingerprint)
    fields = list(dict.fromkeys(key for facts in sets.values() for key in facts))
    rows = [[name, *(facts.get(field, "") for field in fields)] for name, facts in sets.items()]
    lines += ["", *_table(["data", *fields], rows), "", "The same fingerprint is the same rows.", "", "## Versions", ""]
    lines.append(", ".join(f"{k} {v}" for k, v in result.get("versions", versions()).items() if v))
    write_atomic(folder / "README.md", "\n".join(lines) + "\n")


def _table(header: list[str], rows: Iterable) -> list[str]:
    rows = [[_card_cell(cell) for cell in row] for row in rows]
    if not rows:
        return ["None given."]
    return ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]


def _card_cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _sent(output_dir: Path) -> int:
    try:
        return int((output_dir / SENT).read_text())
    except (OSError, ValueError):
        return -1


def _cut(path: Path, resume_step: int | None, size: int | None = None) -> None:
    """Drop the file; or with `resume_step` cut it to `size` bytes, or where it is shorter or size is not known, to the
    lines up to that step (a torn last one is dropped)."""
    if not path.exists():
        return
    if resume_step is None:
        path.unlink()
        return
    if size is not None and size <= path.stat().st_size:
        os.truncate(path, size)
        return
    kept = [row for row in _rows(path) if row["step"] <= resume_step]
    write_atomic(path, "".join(dumps(row) + "\n" for row in kept))


def _rows(path: str | Path) -> list[dict[str, Any]]:
    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the process was killed while it wrote this line
    return rows


def _start_wandb(output_dir: Path, project: str | None, run_name: str | None, config: dict, resumed: bool):
    """A W&B run, or None with a warning; online, then offline, never a question.

    What was not chosen here is left to W&B's own variables: WANDB_PROJECT, WANDB_NAME, WANDB_RUN_ID, WANDB_DIR, ...
    """
    given = os.environ
    if given.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        _warn("W&B is off: WANDB_DISABLED is set")
        return None
    try:
        import wandb

        id_file = output_dir / "wandb_id"
        known = id_file.read_text().strip() if resumed and id_file.exists() else None
    except Exception as error:
        _warn(f"W&B is off: {_first_line(error)}")
        return None
    known = given.get("WANDB_RUN_ID") or known
    mode = given.get("WANDB_MODE", "").lower() or ("online" if _wandb_key() else "offline")
    if mode == "online" and not _wandb_key():
        _warn("WANDB_MODE=online, but no key in WANDB_API_KEY or netrc: W&B writes offline (send later: wandb sync)")
        mode = "offline"
    settings = {"init_timeout": WANDB_INIT_SECONDS, "console": "off"}
    settings = {name: value for name, value in settings.items() if f"WANDB_{name.upper()}" not in given}
    for attempt in dict.fromkeys([mode, "offline"]):
        # the id of a run that failed to start stays in use: the second attempt takes a new one
        run_id = known if known and attempt == mode else uuid.uuid4().hex[:8]
        try:
            run = wandb.init(
                project=project or given.get("WANDB_PROJECT") or "rlhf",
                name=run_name or given.get("WANDB_NAME") or str(output_dir),
                id=run_id,
                resume="allow" if resumed and run_id == known and attempt == "online" else None,
                dir=given.get("WANDB_DIR") or str(output_dir),
                config=json_safe(config),
                mode=attempt,
                settings=wandb.Settings(**settings),
            )
            id_file.write_text(run_id)
            run.define_metric("*", step_metric="step")
            return run
        except Exception as error:
            then = "writing offline (send later: wandb sync)" if attempt != "offline" else "going on without it"
            _warn(f"W&B {attempt} failed ({_first_line(error)}); {then}")
    return None


def _wandb_key() -> bool:
    """Whether a key is configured for the server, without asking anyone."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import netrc
    from urllib.parse import urlsplit

    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    for path in filter(None, [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]):
        try:
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _number(name: str, value: Any) -> float | int:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, (int, float)):
        raise TypeError(f"metric '{name}': expected a number, found {value!r}")
    return value


def _cell(value: Any) -> Any:
    return dumps(value) if isinstance(value, (dict, list, tuple)) else value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{seconds:02}s"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
