"""A run's W&B log. Nothing that goes wrong with W&B stops the program, and nothing ever asks for a
login.
"""

import os
import re
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf.files import dumps, json_safe

# after which a server that does not answer is given up
INIT_SECONDS = 15
# what is uploaded of a folder; of other files W&B is told where they are and their hashes
UPLOADED = ("adapter_model.safetensors", "adapter_config.json", "rlhf.json", "README.md")
ONLY_NAMED = ("model*.safetensors", "config.json")
# what W&B takes of a tag, and of an artifact's name
LONGEST_TAG, LONGEST_NAME = 64, 128


class WandbLog:
    """A W&B run, or nothing where it is off: `run` is None before `start`, and after a failure.

    A step that was sent once is not sent again by a resumed run: the last one is kept in
    output_dir/wandb_step.
    """

    def __init__(self, output_dir: Path, *, resumed: bool):
        self.run: Any = None
        self.output_dir = output_dir
        self.resumed = resumed
        self._sent_file = output_dir / "wandb_step"
        if not resumed:
            self._sent_file.unlink(missing_ok=True)
        self._skip_through = self._last_sent()
        # what is known of the step that is being made: one row of W&B's history, so that any two
        # numbers of a step can be plotted against each other
        self._row: dict[str, Any] = {}

    def start(
        self,
        project: str | None,
        run_name: str | None,
        config: dict[str, Any],
        job_type: str | None = None,
        tags: Iterable[str] = (),
    ) -> None:
        """Start the run online if WANDB_MODE says so or a key is configured, else or if that fails
        offline.

        What is not given here is left to W&B's own variables: WANDB_PROJECT, WANDB_NAME,
        WANDB_RUN_GROUP, WANDB_RUN_ID, WANDB_DIR, ...; WANDB_JOB_TYPE and WANDB_TAGS come before what
        is given.
        """
        given = os.environ
        if given.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
            _warn("W&B is off: WANDB_DISABLED is set")
            return
        try:
            import wandb
        # its import may fail in many ways, and none of them concerns the run
        except Exception as error:
            _warn(f"W&B is off: {_first_line(error)}")
            return

        id_file = self.output_dir / "wandb_id"
        known_id = given.get("WANDB_RUN_ID")
        if not known_id and self.resumed and id_file.exists():
            known_id = id_file.read_text().strip()

        settings = {"init_timeout": INIT_SECONDS, "console": "off"}
        for name in list(settings):
            if f"WANDB_{name.upper()}" in given:
                del settings[name]

        modes = dict.fromkeys([_mode(), "offline"])
        for mode in modes:
            # the id of a run that failed to start stays in use: the second attempt takes a new one
            is_known = bool(known_id) and mode == next(iter(modes))
            run_id = known_id if is_known else uuid.uuid4().hex[:8]
            try:
                self.run = wandb.init(
                    project=project or given.get("WANDB_PROJECT") or "rlhf",
                    name=run_name or given.get("WANDB_NAME") or self.output_dir.resolve().name,
                    group=given.get("WANDB_RUN_GROUP"),
                    job_type=given.get("WANDB_JOB_TYPE") or job_type,
                    tags=None if given.get("WANDB_TAGS") else _allowed(tags),
                    id=run_id,
                    resume="allow" if self.resumed and is_known and mode == "online" else None,
                    dir=given.get("WANDB_DIR") or str(self.output_dir),
                    config=json_safe(config),
                    mode=mode,
                    # one that failed before is not taken up again
                    reinit="finish_previous",
                    settings=wandb.Settings(**settings),
                )
                # the id a resumed run takes up again
                id_file.write_text(run_id)
                self.run.define_metric("*", step_metric="step")
                return
            except Exception as error:
                self.run = None
                then = (
                    "going on without it"
                    if mode == "offline"
                    else "writing offline (send later: wandb sync)"
                )
                _warn(f"W&B {mode} failed ({_first_line(error)}); {then}")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Add values to the row of a step, which is sent when the next one begins."""
        if self.run is None or step <= self._skip_through:
            return
        if self._row and self._row["step"] != step:
            self.flush()
        self._row = self._row | {"step": step, **values}

    def flush(self) -> None:
        """Send the row of the step that is being made."""
        row, self._row = self._row, {}
        if self.run is None or not row:
            return
        with self._failing_quietly("log"):
            self.run.log(row)
        # written after sending: a crash between sends a step twice, never not at all
        if self.run is not None and row["step"] > self._last_sent():
            self._sent_file.write_text(str(row["step"]))

    def table(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        if self.run is None or step <= self._skip_through:
            return
        with self._failing_quietly("table"):
            import wandb

            columns = list(dict.fromkeys(chain.from_iterable(rows)))
            table = wandb.Table(columns=columns)
            for row in rows:
                table.add_data(*[_cell(row.get(column)) for column in columns])
            self.log({f"tables/{name}": table}, step)

    def images(self, files: Mapping[str, str | Path], step: int) -> None:
        if self.run is None or step <= self._skip_through:
            return
        with self._failing_quietly("images"):
            import wandb

            images = {f"figures/{name}": wandb.Image(str(file)) for name, file in files.items()}
            self.log(images, step)

    def page(self, name: str, html: str) -> None:
        """Show a page of HTML beside the last step's numbers."""
        if self.run is None:
            return
        with self._failing_quietly("page"):
            import wandb

            step = self._row.get("step", max(self._last_sent(), 0))
            self._row = self._row | {"step": step, f"pages/{name}": wandb.Html(html)}

    def artifacts(self, inputs: Iterable[str | Path], output: Path, kind: str) -> None:
        """Name the local files and folders that were read as the run's inputs, and send what it
        made.

        W&B joins artifacts of the same name and content: the adapter that one run makes and
        another reads is one, and so its history can be followed. Names that are no local path, such
        as those of a hub, are left out; the run's config has them.
        """
        if self.run is None:
            return
        with self._failing_quietly("artifacts"):
            for path in dict.fromkeys(map(Path, inputs)):
                if path.exists():
                    self._use(_artifact(path, "model" if path.is_dir() else "data"))
            self.run.log_artifact(_artifact(output, kind))

    def _use(self, artifact: Any) -> None:
        if not self.run.settings._offline:
            self.run.use_artifact(artifact)
            return
        # use_artifact refuses offline, where it cannot wait for the server; this is what it does
        # before it waits
        self.run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)

    def result(self, result: dict[str, Any]) -> None:
        """Send the data fingerprints and the headline of a result."""
        if self.run is None:
            return
        with self._failing_quietly("result"):
            self.run.config.update(
                {"data": json_safe(result.get("data", {}))}, allow_val_change=True
            )
            self.run.summary.update({"result": json_safe(result.get("headline", {}))})

    def finish(self, *, failed: bool = False) -> None:
        if self.run is None:
            return
        self.flush()
        with self._failing_quietly("finish"):
            self.run.finish(exit_code=1 if failed else None)
        self.run = None

    def rewind(self) -> None:
        """Skip the steps that were sent already: after a rollback they are made again."""
        self.flush()
        self._skip_through = max(self._skip_through, self._last_sent())

    def _last_sent(self) -> int:
        try:
            return int(self._sent_file.read_text())
        except (OSError, ValueError):
            return -1

    @contextmanager
    def _failing_quietly(self, what: str) -> Iterator[None]:
        """Turn an error of W&B into a warning, and W&B off."""
        try:
            yield
        except Exception as error:
            _warn(f"W&B {what} failed ({_first_line(error)}); going on with metrics.jsonl alone")
            self.run = None


def _mode() -> str:
    """Return WANDB_MODE, or whether a key allows to write online; online without a key would ask
    for a login.
    """
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode == "online" and not has_key():
        _warn(
            "WANDB_MODE=online, but no key in WANDB_API_KEY or netrc: W&B writes offline (send later: wandb sync)"
        )
        return "offline"
    return mode or ("online" if has_key() else "offline")


def has_key() -> bool:
    """Return whether a key for the W&B server is configured."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    from requests.utils import get_netrc_auth

    return get_netrc_auth(server_url()) is not None


def server_url() -> str:
    """Return the address of the W&B server."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _artifact(path: Path, kind: str) -> Any:
    """Return a file, or the model or report in a folder, as an artifact named by the end of its path."""
    import wandb

    path = path.resolve()
    name = re.sub(r"[^\w.-]", "-", f"{path.parent.name}-{path.name}")
    artifact = wandb.Artifact(name[-LONGEST_NAME:], type=kind)
    if not path.is_dir():
        # data stay where they are
        artifact.add_reference(path.as_uri())
        return artifact
    sent = [path / name for name in UPLOADED] + sorted(path.glob("report.*"))
    for file in sent:
        if file.is_file():
            artifact.add_file(str(file))
    for pattern in ONLY_NAMED:
        for file in sorted(path.glob(pattern)):
            artifact.add_reference(file.as_uri())
    return artifact


def _allowed(tags: Iterable[str]) -> list[str]:
    """Return tags as W&B takes them: none twice, none too long."""
    return list(dict.fromkeys(tag[:LONGEST_TAG] for tag in tags))


def _cell(value: Any) -> Any:
    return dumps(value) if isinstance(value, (dict, list, tuple)) else value


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
