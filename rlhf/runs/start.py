"""The start of a run: join the ranks, decide what to resume from, seed the random generators."""

import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlhf.config import current_names
from rlhf.errors import EXIT_GUARD, EarlyExit, UserError, near_file
from rlhf.files import lock_folder
from rlhf.options.shared import EIGHT_BIT, NOISE_VERSION, RunConfig, SamplingConfig
from rlhf.runs import checkpoint
from rlhf.runs.checkpoint import Checkpoint
from rlhf.runs.inputs import check_inputs
from rlhf.runs.run import START_OVER, Run
from rlhf.startup import Ranks, read_ranks, silence_libraries
from rlhf.values import read_yaml

# with the number of ranks they make the rows of a step
BATCH_OPTIONS = ("per_device_train_batch_size", "gradient_accumulation_steps")
# raising one makes a finished run longer
LENGTH_OPTIONS = ("total_episodes", "num_train_epochs", "max_steps")


def start_run(program: str, config: RunConfig) -> Run:
    """Join the ranks, lock the output folder, find the checkpoint to resume from, and seed all
    random generators.

    Raises UserError where fixed options differ from those of the folder's run or a requested
    checkpoint cannot be used, and EarlyExit where the run is finished already.
    """
    silence_libraries()
    folder = Path(config.output_dir)
    finished = {} if config.overwrite_output_dir else read_result(folder)
    if finished:
        check_finished(program, config, finished)
    ranks = read_ranks(os.environ)

    def claim_folder() -> Checkpoint | None:
        lock_folder(folder)
        found = find_checkpoint(program, config, ranks, is_finished=bool(finished))
        check_inputs(program, config, is_resumed=found is not None)
        return found

    # torch takes seconds to import: what is wrong without it is reported before
    found = claim_folder() if ranks.size == 1 else None
    import numpy
    import torch

    from rlhf.ranks.distributed import start

    world = start(config.hang_timeout)
    if world.size > 1:
        # only the main rank reads the folder; what it finds, or raises, is the same on all ranks
        found = world.raise_on_all_ranks(lambda: claim_folder() if world.is_main else None)
        found = world.gather([found])[0]
    kept = keep_older(config, found.metadata["options"]) if found else []
    run = Run(program, config, world, resumed=found)
    if run.resumed:
        run.log(f"resuming from {run.resumed.folder}, after step {run.resumed.step}")
        then = run.resumed.metadata["ranks"]
        if then != world.size:
            run.log(
                f"{then} rank(s) made it and {world.size} go on, with the same weights, moments, order of data and "
                "sampling noise; the sums over ranks are rounded otherwise, and dropout leaves out other numbers"
            )
    for name in kept:
        run.log(
            f"the run began before '{name}' existed, and goes on with {getattr(config, name)}. For another value, "
            f"{START_OVER}"
        )

    random.seed(config.seed)
    numpy.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    return run


def check_finished(program: str, config: RunConfig, result: dict[str, Any]) -> None:
    """Return if the folder's finished run is to be made longer; raise EarlyExit if it is the one that
    was requested.

    Raises UserError if another run was requested.
    """
    folder = Path(config.output_dir)
    file = folder / "config.yaml"
    before = read_yaml(file) if file.is_file() else {}
    check_fixed(config, before, f"{folder} holds a finished run; to make another one, {START_OVER}")
    # a checkpoint that is named is continued from, finished or not
    if config.resume not in ("auto", "never"):
        return
    # a guard stopped it for a reason: continuing needs an explicit choice
    if result.get("stopped"):
        # checkpoints are named by PPO, or by TRL's trainers
        name = "step" if program == "ppo" else "checkpoint"
        raise EarlyExit(
            f"{folder} holds a run that was stopped: {result['stopped']}. To continue anyway, pass "
            f"--resume {folder / checkpoint.FOLDER}/{name}-...; or {START_OVER}",
            EXIT_GUARD,
        )

    now, then = _lengths(vars(config)), _lengths(before)
    # a run of an earlier version may lack an option
    compared = [name for name in now if name in then]
    is_longer = any(now[name] > then[name] for name in compared)
    if is_longer and config.resume == "auto":
        return
    # where max_steps is given, it is what has ended the run
    limit = "max_steps" if now.get("max_steps", math.inf) < math.inf else next(iter(compared), None)
    raise EarlyExit(
        f"{folder} is finished ({result['finished']}). To train on, raise --{limit}; or {START_OVER}"
    )


def _lengths(values: dict[str, Any]) -> dict[str, float]:
    """Return the options that limit a run's length; max_steps -1 is no limit."""
    given = [name for name in LENGTH_OPTIONS if name in values]
    return {name: math.inf if values[name] == -1 else values[name] for name in given}


def find_checkpoint(
    program: str,
    config: RunConfig,
    ranks: Ranks,
    *,
    is_finished: bool,
) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None to start from the beginning. Raise UserError if
    it does not fit.
    """
    if config.overwrite_output_dir:
        return None
    if config.resume in ("auto", "never"):
        root = Path(config.output_dir) / checkpoint.FOLDER
        found = checkpoint.newest(root, lambda text: print(f"{program}: {text}", flush=True))
        # without one the run would silently start over
        if found is None and is_finished:
            raise UserError(
                f"{root}: no whole checkpoint from which the finished run could be trained on"
            )
        if found is None:
            return None
        if config.resume == "never":
            raise UserError(
                f"{config.output_dir} holds checkpoints up to step {found.step}, and --resume is never: {START_OVER}"
            )
    else:
        try:
            found = checkpoint.check(Path(config.resume))
        except checkpoint.CorruptCheckpoint as reason:
            near = near_file(config.resume)
            raise UserError(
                f"{config.resume}: no checkpoint to resume from: {reason}{near}"
            ) from None
    check_resumable(found, program, config, ranks)
    return found


def check_resumable(found: Checkpoint, program: str, config: RunConfig, ranks: Ranks) -> None:
    """Raise UserError where a checkpoint is of another program, number of ranks, sampling noise or
    fixed options.
    """
    metadata = found.metadata
    if metadata.get("program") != program:
        raise UserError(
            f"{found.folder}: is a checkpoint of '{metadata.get('program')}', not of '{program}'. Choose another "
            "--output_dir or --resume"
        )
    adapted = check_ranks(found, config, ranks)
    # the first version recorded none
    noise = metadata.get("noise", 1)
    if isinstance(config, SamplingConfig) and noise != NOISE_VERSION:
        raise UserError(
            f"{found.folder}: the run was begun with sampling noise {noise}, and this version samples with "
            f"{NOISE_VERSION}: what it samples from here on would not be what that run would have sampled. Go on with "
            f"the version that began it, or {START_OVER}"
        )
    check_fixed(
        config,
        metadata["options"],
        f"{found.folder} cannot be resumed with these options; restore them, or {START_OVER}",
        adapted,
    )


def check_ranks(found: Checkpoint, config: RunConfig, ranks: Ranks) -> tuple[str, ...]:
    """Return the options that may differ from those of the checkpoint because the number of ranks
    does.

    Raises UserError where the run cannot go on with this number, or would take other steps.
    """
    before, then = found.metadata["options"], found.metadata["ranks"]
    if found.metadata["launched"] != ranks.launched:
        how = "without a launcher"
        remedy = "without one"
        if not ranks.launched:
            how = "under a launcher"
            remedy = "under one, where a single process is enough: deepspeed --num_gpus 1 ..."
        raise UserError(
            f"{found.folder}: made by {then} rank(s) {how}, and now there are {ranks.size} {started(ranks)}. The "
            f"optimizer's state has another form there: start it {remedy}"
        )
    if then == ranks.size:
        return ()
    if config.optim in EIGHT_BIT:
        raise UserError(
            f"{found.folder}: made by {then} rank(s), and now there are {ranks.size}. Moments in 8 bits (optim "
            f"{config.optim}) share scales in blocks of a rank's part, and cannot be divided otherwise: start {then}"
        )
    if not hasattr(config, "gradient_accumulation_steps"):
        return ()
    rows, now = rows_of_step(before, then), rows_of_step(vars(config), ranks.size)
    if rows != now:
        raise UserError(
            f"{found.folder}: a step of {then} rank(s) learnt from {rows} rows, and one of {ranks.size} would learn "
            f"from {now} with these options. {same_rows(rows, before[BATCH_OPTIONS[0]], ranks.size)}"
        )
    return BATCH_OPTIONS


def started(ranks: Ranks) -> str:
    """Return in words how this process was started."""
    return "under one" if ranks.launched else "without one"


def rows_of_step(options: dict[str, Any], ranks: int) -> int:
    """Return from how many rows all ranks learn in one step of SFT, reward model or DPO."""
    return math.prod(options[name] for name in BATCH_OPTIONS) * ranks


def same_rows(rows: int, batch_size: int, ranks: int) -> str:
    """Return the advice that gives a step so many rows on so many ranks, with batches of at most
    `batch_size`.
    """
    if rows % ranks:
        return f"{rows} rows cannot be divided among {ranks}: start another number of ranks"
    own = rows // ranks
    batch = max(size for size in range(1, batch_size + 1) if own % size == 0)
    values = " ".join(
        f"--{name} {value}"
        for name, value in zip(BATCH_OPTIONS, (batch, own // batch), strict=True)
    )
    return f"Keep the rows of a step: {values}"


def check_fixed(
    config: Any, before: dict[str, Any], message: str, free: Sequence[str] = ()
) -> None:
    """Raise UserError, beginning with `message`, that lists each fixed option whose value differs
    from `before`; those named in `free` may.
    """
    before = current_names(config, before)
    changed = []
    for field in fields(config):
        name = field.name
        # an option that is new in this version was at its default
        if field.metadata.get("resume") == "free" or name not in before or name in free:
            continue
        # as JSON has it: tuples are lists, and keys are strings
        now = json.loads(json.dumps(getattr(config, name)))
        if now != before[name]:
            changed.append(f"  {name}: was {before[name]!r}, now {now!r}")
    if changed:
        raise UserError("\n".join([f"{message}. Fixed options that differ:", *changed]))


def keep_older(config: Any, before: dict[str, Any]) -> list[str]:
    """Set the options that did not exist when a run began to what it did then; return their names."""
    before = current_names(config, before)
    kept = []
    for field in fields(config):
        then = field.metadata.get("before")
        if then is not None and field.name not in before and getattr(config, field.name) != then:
            setattr(config, field.name, then)
            kept.append(field.name)
    return kept


def read_result(folder: Path) -> dict[str, Any]:
    """Return result.json of a finished run, else an empty dict."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    return result if result.get("finished") else {}
