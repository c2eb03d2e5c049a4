"""One run of a program: its options, ranks, output folder, tracker and checkpoints, and how it
ends.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import save_options
from rlhf.errors import EXIT_INTERRUPTED, EarlyExit, UserError
from rlhf.files import unlock_folder
from rlhf.options.shared import NOISE_VERSION, RunConfig
from rlhf.runs import checkpoint
from rlhf.runs.checkpoint import Checkpoint
from rlhf.runs.rows import RunData
from rlhf.runs.signals import StopSignals

if TYPE_CHECKING:
    from rlhf.ranks.distributed import DistributedContext
    from rlhf.runs.tracking import Tracker

OUTCOME = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "rlhf.json",
    "model.safetensors",
    "config.json",
)
START_OVER = "choose another --output_dir, or start over with --overwrite_output_dir true"
# parts of the metric names that the console shows
SHOWN = ("score/", "kl/sequence", "response/", "loss/total", "reward_accuracy", "reward/accuracy")


class Run:
    """One run of a program; `rlhf.runs.start.start_run` makes it.

    `data` reads the rows, `tracker` writes metrics, `resumed` is the checkpoint that the run
    continues from (None for a run from the start). Nothing in the output folder is changed before
    `open_tracker`: a program that fails while it loads leaves an earlier run as it was.
    """

    def __init__(
        self,
        program: str,
        config: RunConfig,
        world: DistributedContext,
        resumed: Checkpoint | None = None,
    ):
        self.program = program
        self.config = config
        self.world = world
        self.resumed = resumed
        self.folder = Path(config.output_dir)
        self.checkpoints = self.folder / checkpoint.FOLDER
        self.data = RunData(config, world, self.log, resumed)
        # fingerprints of what the run starts from and is scored by
        self.dependencies: dict[str, str] = {}
        # folders of models that it reads beside the one that it starts from
        self.read_models: list[str] = []
        self.tracker: Tracker | None = None
        self.signals = StopSignals(program, announce=world.is_main)

    def log(self, text: str) -> None:
        """Print a line that begins with the program's name, on the main rank."""
        if self.world.is_main:
            print(f"{self.program}: {text}", flush=True)

    @property
    def torch_dtype(self) -> str:
        """Return the dtype to load the base model in."""
        from rlhf.ranks.distributed import base_dtype

        # PPO computes in the dtype that it loads
        by_trl = self.program != "ppo"
        trains_whole = by_trl and not getattr(self.config, "use_peft", True)
        return base_dtype(self.config.dtype, self.world.device, trains_whole=trains_whole)

    def record_dependency(self, name: str, fingerprint: str) -> None:
        """Record what this run starts from or learns from. Raise UserError if the resumed run had
        something else.
        """
        self.dependencies[name] = fingerprint
        # other weights under the same path would change the run in the middle
        before = self.resumed.metadata.get("weights", {}).get(name) if self.resumed else None
        if before not in (None, fingerprint):
            raise UserError(
                f"{name}: its files have changed since {self.resumed.folder} was made (fingerprint {fingerprint}, then "
                f"{before}). Put them back, or {START_OVER}"
            )

    def open_tracker(self) -> None:
        """Take over the output folder, open the tracker, and let signals end the run after its step
        from here on.

        Removes what another run, or a later part of this one, has left in the folder, and writes
        config.yaml.
        """
        from rlhf.runs.tracking import Tracker

        config, resumed = self.config, self.resumed
        if self.world.is_main:
            self._clear_folder()
            # the file is for the next start, which may have been cut off and is to resume by
            # default
            save_options(
                replace(config, overwrite_output_dir=False, resume="auto"),
                self.folder / "config.yaml",
            )
            self.data.write_trained_on(self.folder)
        self.signals.install()

        # a checkpoint of another folder has not recorded the sizes of these files
        is_from_here = resumed is not None and resumed.folder.parent == self.checkpoints
        self.tracker = Tracker(
            config.output_dir,
            report_to=config.report_to,
            project=config.project,
            run_name=config.run_name,
            job_type=self.program,
            tags=self._tags(),
            config={"program": self.program, **options_dict(config)},
            is_main=self.world.is_main,
            resume_step=resumed.step if resumed else None,
            position=resumed.metadata["position"] if is_from_here else None,
        )

    def _tags(self) -> list[str]:
        """Return the words to find this run by: program, kind of advantages or losses, and model."""
        kinds = getattr(self.config, "advantage_estimator", None) or getattr(
            self.config, "loss_type", []
        )
        kinds = [kinds] if isinstance(kinds, str) else kinds
        return [self.program, *kinds, Path(self.config.model_name_or_path).name]

    def _clear_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.archive(self.checkpoints, after=self.resumed.step + 1 if self.resumed else 0)
        (self.folder / "result.json").unlink(missing_ok=True)
        if self.resumed is None:
            # weights of another kind would be found beside the new ones
            for name in OUTCOME:
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "value", ignore_errors=True)

    def should_checkpoint(self, step: int, total: int) -> bool:
        """Return whether to write a checkpoint after `step`: every save_steps, at each evaluation,
        and at the end.
        """
        # 0 switches either off
        intervals = [n for n in (self.config.save_steps, self.config.eval_steps) if n]
        return step == total or any(step % n == 0 for n in intervals)

    def metadata(
        self, score: float | None = None, state: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what a checkpoint records about itself: what a resume compares, and what it
        restores.
        """
        return {
            "program": self.program,
            "ranks": self.world.size,
            "launched": self.world.launched,
            "options": options_dict(self.config),
            "data": self.data.fingerprints,
            # its name in checkpoints from the start
            "weights": self.dependencies,
            "noise": NOISE_VERSION,
            "position": self.tracker.position(),
            "score": score,
            "state": state or {},
        }

    def save_checkpoint(
        self,
        step: int,
        write_files: Callable[[Path], None],
        score: float | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Write the checkpoint of `step` and remove superfluous ones; call it on all ranks.

        `write_files(folder)` writes the program's files. `score` (higher is better) decides which
        checkpoint is the best. `state` is returned by a resume as `resumed.metadata["state"]`.
        """
        checkpoint.write(
            self.checkpoints,
            step,
            self.world,
            write_files,
            lambda: self.metadata(score, state),
        )
        if self.world.is_main:
            checkpoint.prune(self.checkpoints, self.config.save_total_limit)

    def roll_back(self, before: int) -> Checkpoint | None:
        """Return the newest whole checkpoint made before step `before`, or None; call it on all
        ranks.

        Later checkpoints are archived, and metrics.jsonl is cut back to the one returned.
        """
        self.world.barrier()
        kept = None
        if self.world.is_main:
            kept = checkpoint.newest(self.checkpoints, self.log, before)
            if kept is not None:
                checkpoint.archive(self.checkpoints, kept.step + 1)
                self.tracker.rewind(kept.step, kept.metadata["position"])
        # the main rank alone has looked
        return self.world.gather([kept])[0]

    def restore_random_state(self) -> None:
        """Restore this rank's random generators as they were at the checkpoint that the run
        continues from.
        """
        file = self.resumed.folder / f"random-{self.world.rank}.pt"
        # a rank that is new has been seeded as at the start of a run
        if file.is_file():
            checkpoint.read_random_state(file)

    def interrupted(self) -> bool:
        """Return whether any rank was asked to stop; all ranks call it after each step and get the
        same answer.
        """
        return bool(self.world.sum(float(self.signals.received is not None)))

    def interrupted_error(self, step: int) -> EarlyExit:
        """Close the run and return the exception that ends an interrupted program."""
        names = self.world.gather([self.signals.received])
        # the signal may have reached one rank only
        first = next(name for name in names if name is not None)
        self.close()

        # these options were for this start only
        dropped = []
        if self.config.overwrite_output_dir:
            dropped.append("--overwrite_output_dir")
        if self.config.resume != "auto":
            dropped.append("--resume")
        without = f", without {' and '.join(dropped)}," if dropped else ""
        return EarlyExit(
            f"{self.program}: stopped by {first} after step {step}, saved in {self.checkpoints}. The same command"
            f"{without} continues from there",
            EXIT_INTERRUPTED,
        )

    def finish(self, headline: dict[str, Any], budget: dict[str, float], **more: Any) -> None:
        """Write the model card and result.json, and close the run."""
        from rlhf.runs.model_card import write_card

        result = {
            "program": self.program,
            "seed": self.config.seed,
            "headline": headline,
            "budget": budget,
            "data": self.data.fingerprints,
            "rows": self.data.row_counts,
            "noise": NOISE_VERSION,
            **more,
        }
        if self.world.is_main:
            provenance = {
                "start": self.config.model_name_or_path,
                "data": ", ".join(self.config.data),
            }
            write_card(self.folder, self.program, options_dict(self.config), result, provenance)
            # last: a folder with result.json holds a finished run
            self.tracker.result(result)
            read = [self.config.model_name_or_path, *self.config.data, *self.read_models]
            self.tracker.artifacts(read)
        self.close()
        self.log(f"done: {format_metrics(headline)} -> {self.config.output_dir}")

    def close(self) -> None:
        """Close the tracker, restore the signal handlers, leave the other ranks and unlock the
        folder.
        """
        if self.tracker is not None:
            self.tracker.finish()
        self.signals.restore()
        self.world.barrier()
        self.world.stop_watching()
        if self.world.is_main:
            unlock_folder(self.folder)


def options_dict(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass without copying their values."""
    return {field.name: getattr(config, field.name) for field in fields(config)}


def format_metrics(metrics: dict[str, Any]) -> str:
    """Return the metrics that the console shows as text: no parts of scores, standard errors or
    minor metrics.
    """
    parts = []
    for name, value in metrics.items():
        is_detail = name.endswith("_se") or name.count("/") > 2
        if is_detail or not any(shown in name for shown in SHOWN):
            continue
        # nan and infinity have no digits to cut
        is_finite_float = isinstance(value, float) and math.isfinite(value)
        parts.append(f"{name} {value:.4g}" if is_finite_float else f"{name} {value}")
    return ", ".join(parts)
