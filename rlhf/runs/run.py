"""One run of a program: its folder, its checkpoints, what it goes on from, what it reads, how it ends."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rlhf.runs import checkpoint
from rlhf import config as options
from rlhf.runs.checkpoint import Checkpoint
from rlhf.config import EXIT_GUARD, EXIT_INTERRUPTED, Halt, UserError
from rlhf.data.records import Prompt, Record, digest, prompt_group
from rlhf.files import lock_folder, unlock_folder
from rlhf.options.shared import RunConfig

OUTCOME = ("adapter_model.safetensors", "adapter_config.json", "rlhf.json", "model.safetensors", "config.json")
TRAINED_ON = "trained_on.txt"  # hashes of the first user turns that a run was trained on


class Run:
    """One run of a program: its ranks, its folder, its tracker, its checkpoints. `begin` makes one.

    `resumed` is the checkpoint it goes on from, None for a run from the start. Nothing in the folder is changed before
    the first use of `tracker`, so that what stops a program while it loads costs an earlier run nothing.
    """

    def __init__(self, program: str, config: RunConfig, world, resumed: Checkpoint | None = None):
        self.program, self.config, self.world, self.resumed = program, config, world, resumed
        self.folder = Path(config.output_dir)
        self.checkpoints = self.folder / checkpoint.FOLDER
        self.fingerprints: dict[str, str] = {}  # of the rows that are used, by kind and split
        self.row_counts: dict[str, dict[str, Any]] = {}  # {"read", "used", "dropped": {reason: count}}, likewise
        self.weights: dict[str, str] = {}  # fingerprints of what the run starts from and is scored by
        self.freezes: set[str] = set()
        self.trained_on: set[str] = set()
        self.stopped_by: str | None = None  # the signal that asked the run to end
        self._tracker = None
        self._seen = 0.0
        self._handlers: dict[int, Any] = {}

    @property
    def tracker(self):
        """The run's tracker; its first use takes the folder."""
        if self._tracker is None:
            self._tracker = self._take()
        return self._tracker

    def _take(self):
        """Claim the output folder: clear away what another run or a later part of this one left, write config.yaml,
        open the tracker, and from here on let a signal end the run after its step."""
        from rlhf.runs.tracking import Tracker

        config, resumed = self.config, self.resumed
        if self.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.archive(self.checkpoints, resumed.step + 1 if resumed else 0)
            (self.folder / "result.json").unlink(missing_ok=True)
            if resumed is None:  # another kind of weights would be found beside the new ones
                for name in OUTCOME:
                    (self.folder / name).unlink(missing_ok=True)
                shutil.rmtree(self.folder / "value", ignore_errors=True)
            # what was said of this start is not for the next: the file is to go on where the run is cut off
            options.save(replace(config, overwrite_output_dir=False, resume="auto"), self.folder / "config.yaml")
            self.write_trained_on()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return Tracker(
            config.output_dir,
            report_to=config.report_to,
            project=config.project,
            run_name=config.run_name,
            config={"program": self.program, **options_dict(config)},
            is_main=self.world.is_main,
            resume_step=resumed.step if resumed else None,
            position=resumed.about["position"] if resumed and resumed.folder.parent == self.checkpoints else None,
        )

    def _on_signal(self, number: int, frame) -> None:
        """End after the step; SIGINT once more, but not in the second in which launchers send both, ends at once."""
        again = number == signal.SIGINT and self.stopped_by and time.monotonic() - self._seen > 1.0
        self._seen = time.monotonic()
        if again:
            raise KeyboardInterrupt
        if not self.stopped_by:
            self.stopped_by = signal.Signals(number).name
            if self.world.is_main:  # not print, which a signal may have come in the middle of
                os.write(1, f"{self.program}: {self.stopped_by}: ending after this step, with a checkpoint\n".encode())

    def interrupted(self) -> bool:
        """Whether any rank was asked to end; all ranks call it after each step and hear the same."""
        return bool(self.world.sum(float(self.stopped_by is not None)))

    def due(self, step: int, total: int) -> bool:
        """Whether a checkpoint belongs after this step: every save_steps, with each evaluation, and at the end."""
        every = [n for n in (self.config.save_steps, self.config.eval_steps) if n]
        return step == total or any(step % n == 0 for n in every)

    def about(self, step: int, score: float | None = None, state: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a checkpoint says about itself, and what a resume compares and puts back."""
        return {
            "program": self.program,
            "ranks": self.world.size,
            "launched": self.world.launched,
            "options": options_dict(self.config),
            "data": self.fingerprints,
            "weights": self.weights,
            "position": self.tracker.position(),
            "score": score,
            "state": state or {},
        }

    def save_checkpoint(
        self, step: int, fill: Callable[[Path], None], score: float | None = None, state: dict[str, Any] | None = None
    ) -> None:
        """Write the checkpoint of `step` and remove those that are too many; on all ranks.

        `fill(folder)` writes the program's files, `score` (the higher the better) elects the best, `state` comes back
        as `resumed.about["state"]`.
        """
        checkpoint.write(self.checkpoints, step, self.world, fill, lambda: self.about(step, score, state))
        if self.world.is_main:
            checkpoint.prune(self.checkpoints, self.config.save_total_limit)

    def roll_back(self, before: int) -> Checkpoint | None:
        """The newest whole checkpoint made before step `before`; later ones are set aside and metrics.jsonl is cut
        back to it. None if there is none."""
        self.world.barrier()
        found = None
        if self.world.is_main:
            kept = checkpoint.newest(self.checkpoints, self.log, before)
            if kept is not None:
                checkpoint.archive(self.checkpoints, kept.step + 1)
                self.tracker.rewind(kept.step, kept.about["position"])
            found = kept
        return self.world.gather([found])[0]

    def restore_random_state(self) -> None:
        """That of this rank when the checkpoint was written."""
        checkpoint.read_random_state(self.resumed.folder / f"random-{self.world.rank}.pt")

    def halt(self, step: int) -> Halt:
        """The exception that ends an interrupted run."""
        signals = [name for name in self.world.gather([self.stopped_by]) if name]
        self.close()
        asked = [f"--{n}" for n, usual in (("overwrite_output_dir", False), ("resume", "auto"))
                 if getattr(self.config, n) != usual]  # fmt: skip
        but = f", without {' and '.join(asked)}," if asked else ""
        return Halt(
            f"{self.program}: stopped by {signals[0]} after step {step}, saved in {self.checkpoints}. The same command"
            f"{but} goes on from there",
            EXIT_INTERRUPTED,
        )

    def close(self) -> None:
        """Close the tracker, hand the signals back and part from the other ranks."""
        self.tracker.finish()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        self.world.barrier()
        self.world.stop_watching()
        if self.world.is_main:
            unlock_folder(self.folder)

    def log(self, text: str) -> None:
        if self.world.is_main:
            print(f"{self.program}: {text}", flush=True)

    def rows(
        self, kind: type[Record], split: Literal["train", "validation"], tokenizer, data: list[str] | None = None
    ) -> list[dict[str, Any]]:
        """Encoded rows of one split (see `encode`) without those that are too long.

        What is dropped is counted and said, and kept for result.json as is the fingerprint of the rows that are left.
        Raises UserError where more than `max_dropped` of the training rows is dropped, or all of them.
        """
        from rlhf.data.encode import encode
        from rlhf.data.load import fingerprint

        source, bad = ", ".join(data or self.config.data), Counter()
        records = self.load(kind, split, data, bad)
        longest = None if kind is Prompt else self.config.max_response_length
        rows, dropped = encode(records, tokenizer, self.config.max_prompt_length, longest, self.config.on_error)
        what = kind.__name__.lower()
        if bad:
            self._count_rows(f"{what}/every split", source, bad.pop("read"), bad, may_stop=split == "train")
        name = f"{what}/{split}"
        self._count_rows(name, source, len(records), dropped, may_stop=split == "train")
        kept = [row["record"] for row in rows]
        self.fingerprints[name] = fingerprint(kept)
        if split == "train":
            self.trained_on |= {prompt_group(record.prompt) for record in kept}
            before = self.resumed.about["data"].get(name) if self.resumed else None
            if before not in (None, self.fingerprints[name]):
                raise UserError(
                    f"{source}: not the rows that {self.resumed.folder} was trained on (fingerprint "
                    f"{self.fingerprints[name]}, then {before}). Put the data back, or {ANEW}"
                )
        return rows

    def load(
        self, kind: type[Record], split: str | None, data: list[str] | None = None, bad: Counter | None = None
    ) -> list[Any]:
        """Records of one split; `bad` gets the number of skipped rows by reason."""
        from rlhf.data.load import load

        config = self.config
        return load(
            self.frozen(data or config.data, kind),
            kind,
            split=split,
            half=config.half,
            validation_fraction=config.validation_fraction,
            test_fraction=config.test_fraction,
            limit=config.limit,
            on_error=config.on_error,
            bad=bad,
        )

    def _count_rows(self, name: str, source: str, read: int, dropped: Counter, *, may_stop: bool) -> None:
        """Keep and say how many rows were dropped and why; stop where they are too many."""
        count = dropped.total()
        self.row_counts[name] = {"read": read, "used": read - count, "dropped": dict(dropped)}
        if not count:
            return
        reasons = "; ".join(f"{number}: {reason}" for reason, number in dropped.items())
        what, split = name.split("/")
        found = f"{source}: {count} of {read} {what} rows of {split} are dropped ({reasons})"
        if may_stop and count == read:
            raise UserError(f"{found}. Nothing is left to train on: raise the limits, or mend the rows")
        if may_stop and count > self.config.max_dropped * read:
            raise UserError(
                f"{found}, more than max_dropped {self.config.max_dropped:g}. Raise the limits, mend the rows, or "
                "allow it with: --max_dropped 1"
            )
        self.log(f"{'WARNING: ' if count > MANY_DROPPED * read else ''}{found}")

    def write_trained_on(self) -> None:
        """What `rlhf compare` leaves out, whatever it is asked to read."""
        (self.folder / TRAINED_ON).write_text("".join(f"{name}\n" for name in sorted(self.trained_on)))

    def record_dependency(self, name: str, fingerprint: str) -> None:
        """Note what this run starts from or learns from. Raises UserError if a resumed run had something else."""
        self.weights[name] = fingerprint
        before = self.resumed.about.get("weights", {}).get(name) if self.resumed else None
        if before not in (None, fingerprint):
            raise UserError(
                f"{name}: its files have changed since {self.resumed.folder} was made (fingerprint {fingerprint}, then "
                f"{before}). Put them back, or {ANEW}"
            )

    @property
    def torch_dtype(self) -> str:
        if self.config.dtype != "auto":
            return self.config.dtype
        if not getattr(self.config, "use_peft", True):
            return "float32"  # what is trained is kept in float32; the trainer computes in bfloat16 on a GPU
        return "bfloat16" if self.world.device.type == "cuda" else "float32"

    def frozen(self, sources: list[str], kind: type[Record]) -> list[str]:
        """The sources, each preference store as the file of pairs that it is now, or at its event (votes.db@118): votes
        that come in meanwhile change nothing. The main rank writes the file to output_dir/data/ once, and all ranks
        read that; a run that is resumed reads what it read before.

        Prompts of a store are those of its pairs, so that PPO learns on the prompts that DPO learns on; a store
        without votes gives all its prompts.
        """
        from rlhf.data.sources import is_path, is_store, split_event
        from rlhf.data.freeze import freeze, frozen

        result = []
        for source in sources:
            if is_path(source) and Path(source).expanduser().resolve().is_relative_to(self.folder.resolve()):
                raise UserError(f"{source}: lies in output_dir, where files are the run's own. Move the data elsewhere")
            if is_store(source):
                path, event = split_event(source)
                place = f"{Path(path).resolve()}{'' if event is None else f'@{event}'}"
                name = f"{Path(path).stem}-{digest(place)[:6]}.jsonl"  # stores may share a name
                file = self.folder / "data" / name
                if source not in self.freezes:
                    made = self.resumed and file.is_file()
                    call = partial(freeze, path, file, event, self.config.aggregate)
                    self.world.raise_on_all_ranks(lambda made=made, call=call: self.world.is_main and not made and call())
                    self.freezes.add(source)
                if kind is not Prompt or frozen(file)["rows"]:
                    source = str(file)
            result.append(source)
        return result

    def finish(self, headline: dict[str, Any], budget: dict[str, float], **more: Any) -> None:
        """Write result.json and the model card, and close the tracker."""
        from rlhf.runs.tracking import write_card

        result = {
            "program": self.program,
            "seed": self.config.seed,
            "headline": headline,
            "budget": budget,
            "data": self.fingerprints,
            "rows": self.row_counts,
            **more,
        }
        if self.world.is_main:
            provenance = {"start": self.config.model_name_or_path, "data": ", ".join(self.config.data)}
            write_card(self.config.output_dir, self.program, options_dict(self.config), result, provenance)
            self.tracker.result(result)  # last: its presence says that all is there
        self.close()
        self.log(f"done: {format_metrics(headline)} -> {self.config.output_dir}")


def start_run(program: str, config: RunConfig) -> Run:
    """Join the ranks, find out what there is to go on from, seed everything. The folder is left as it is until then.

    Raises UserError where options that are fixed differ from those the folder's run began with, or a checkpoint that
    was asked for cannot be used; Halt when the run is finished already.
    """
    from rlhf.models import silence_libraries

    silence_libraries()
    folder = Path(config.output_dir)
    done = read_result(folder) if not config.overwrite_output_dir else {}
    if done:
        refuse_finished(folder, config, done)
    import numpy
    import torch

    from rlhf.distributed import start

    world = start()
    run = Run(program, config, world)

    def claim() -> Checkpoint | None:
        if not world.is_main:
            return None
        lock_folder(folder)
        return find_checkpoint(run, bool(done))

    found = world.raise_on_all_ranks(claim)
    run.resumed = world.gather([found])[0]
    if run.resumed:
        run.log(f"resuming from {run.resumed.folder}, after step {run.resumed.step}")
    random.seed(config.seed)
    numpy.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    return run


ANEW = "choose another --output_dir, or begin anew with --overwrite_output_dir true"
MANY_DROPPED = 0.1  # share of dropped rows from which the message is a warning
MORE = ("total_episodes", "num_train_epochs", "max_steps")  # options by which a finished run can be made longer


def refuse_finished(folder: Path, config: RunConfig, done: dict[str, Any]) -> None:
    """Raise Halt if the folder's finished run is the one that is asked for; return if it is to be made longer.

    Raises UserError if it is another one, or if it was stopped and nothing says where to go on.
    """
    before = options.read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    check_fixed(config, before, f"{folder} holds a finished run; to make another one, {ANEW}")
    if config.resume not in ("auto", "never"):
        return
    if done.get("stopped"):
        raise Halt(
            f"{folder} holds a run that was stopped: {done['stopped']}. To go on all the same, say from where: "
            f"--resume {folder / checkpoint.FOLDER}/step-...; or {ANEW}",
            EXIT_GUARD,
        )
    now, then = {}, {}
    for name in MORE:
        if hasattr(config, name) and name in before:
            # max_steps -1 is no limit: as many steps as the epochs have
            now[name], then[name] = (math.inf if n == -1 else n for n in (getattr(config, name), before[name]))
    is_longer = any(now[name] > then[name] for name in now)
    if not is_longer or config.resume == "never":
        # where max_steps is given, it is what has ended the run
        more = "max_steps" if now.get("max_steps", math.inf) < math.inf else next(iter(now), None)
        raise Halt(f"{folder} is finished ({done['finished']}). To train on, raise --{more}; or {ANEW}")


def find_checkpoint(run: Run, finished: bool) -> Checkpoint | None:
    """The checkpoint to go on from; see `begin`."""
    config, asked = run.config, run.config.resume
    if config.overwrite_output_dir:
        return None
    if asked in ("auto", "never"):
        found = checkpoint.newest(run.checkpoints, run.log)
        if found is None:
            if finished:
                raise UserError(
                    f"{run.checkpoints}: no whole checkpoint from which the finished run could be trained on"
                )
            return None
        if asked == "never":
            raise UserError(f"{run.folder} holds checkpoints up to step {found.step}, and --resume is never: {ANEW}")
    else:
        try:
            found = checkpoint.check(Path(asked))
        except checkpoint.CorruptCheckpoint as reason:
            raise UserError(f"{asked}: no checkpoint to resume from: {reason}{options.near_file(asked)}") from None
    about, world = found.about, run.world
    if about.get("program") != run.program:
        raise UserError(f"{found.folder}: a checkpoint of '{about.get('program')}', and this is '{run.program}'")
    if (about["ranks"], about["launched"]) != (world.size, world.launched):
        how = "under a launcher" if about["launched"] else "without a launcher"
        raise UserError(
            f"{found.folder}: made by {about['ranks']} rank(s) {how}, and now there are {world.size}. Its optimizer "
            "state is cut by ranks: start as many, in the same way"
        )
    check_fixed(config, about["options"], f"{found.folder} cannot be gone on from; put them back, or {ANEW}")
    return found


def check_fixed(config: Any, before: dict[str, Any], otherwise: str) -> None:
    """Raise UserError that shows each fixed option whose value is another than `before`."""
    before = options.current_names(config, before)
    fixed = [f.name for f in fields(config) if f.metadata.get("resume") != "free" and f.name in before]
    now = json.loads(json.dumps({name: getattr(config, name) for name in fixed}))
    changed = [f"  {name}: was {before[name]!r}, now {now[name]!r}" for name in fixed if now[name] != before[name]]
    if changed:
        raise UserError("\n".join([f"{otherwise}. Fixed options that differ:", *changed]))


def read_result(folder: Path) -> dict[str, Any]:
    """result.json of a finished run, else an empty dict."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    return result if result.get("finished") else {}


def options_dict(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config)}


def format_metrics(metrics: dict[str, Any]) -> str:
    """The metrics for the console: without parts of scores, standard errors and what metrics.jsonl is for."""
    shown = ("score/", "kl/sequence", "response/", "loss/total", "reward_accuracy", "reward/accuracy")
    parts = [
        f"{name} {_round(value)}"
        for name, value in metrics.items()
        if any(s in name for s in shown) and not name.endswith("_se") and name.count("/") <= 2
    ]
    return ", ".join(parts)


def _round(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return value
