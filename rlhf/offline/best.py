"""The best of a run's evaluations on held-out rows: when to stop, and which model to save."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.runs import checkpoint
from rlhf.runs.run import Run


class HeldOutLosses:
    """The evaluations on held-out rows so far, (step, loss) in their order.

    All that early stopping knows follows from them, so that a checkpoint which holds them is
    resumed in the same state.
    """

    def __init__(self, evaluations: list[tuple[int, float]] = ()):
        self.evaluations = [(int(step), float(loss)) for step, loss in evaluations]

    def add(self, step: int, loss: float | None) -> None:
        """Add an evaluation; one without a finite loss, or of a step that is known, is left out."""
        is_known = step in dict(self.evaluations)
        if loss is not None and math.isfinite(loss) and not is_known:
            self.evaluations.append((step, loss))

    def loss_at(self, step: int) -> float | None:
        """Return the loss after a step, None where it was not evaluated."""
        return dict(self.evaluations).get(step)

    @property
    def best(self) -> tuple[int, float]:
        """Return step and loss of the best evaluation; of equals the last, which `prune` keeps."""
        return min(reversed(self.evaluations), key=lambda evaluation: evaluation[1])

    @property
    def without_gain(self) -> int:
        """Return how many evaluations there were since the last one below all before it."""
        losses = [loss for _, loss in self.evaluations]
        if not losses:
            return 0
        last_gain = losses.index(min(losses))
        return len(losses) - 1 - last_gain


def require_held_out(run: Run, rows: list[Any]) -> None:
    """Raise UserError where the run is to keep its best model and no rows are held out to tell it."""
    if run.config.keeps_best and not rows:
        name = "early_stopping_patience" if run.config.early_stopping_patience else ""
        raise UserError(
            f"'{name or 'load_best_model_at_end'}' needs held-out rows, and no group is in validation. Raise "
            "--validation_fraction, or train without it"
        )


def load_best(trainer: Any, losses: HeldOutLosses, run: Run, learnt: Any = None) -> int:
    """Put the weights of the best evaluation into the trainer's model, and the state that `learnt`
    had then into that; return its step.

    Call it on all ranks. Raises UserError where there was no evaluation, or its checkpoint is not
    whole any more.
    """
    if not losses.evaluations:
        raise UserError(
            f"{run.folder}: no evaluation on held-out pairs had a finite loss: no best model to save. Lower "
            "learning_rate, or look at these pairs"
        )
    step, loss = losses.best
    last = trainer.state.global_step
    run.log(f"the model of step {step} of {last} is saved: held-out loss {loss:.4f}, the lowest")
    if step != last:
        folder = run.world.raise_on_all_ranks(lambda: _checkpoint_of(run, step))
        # the trainer's own way of loading, which knows DeepSpeed
        trainer.state.best_model_checkpoint = str(folder)
        trainer._load_best_model()
        if learnt is not None:
            learnt.load_state_dict(read_memories(folder)[0]["learnt"])
    return step


def memory_file(folder: Path, rank: int | str) -> Path:
    """Return the file in a checkpoint with what the Trainer of a rank leaves out of it."""
    return folder / f"memory-{rank}.json"


def read_memories(folder: Path) -> list[dict[str, Any]]:
    """Return what the callback of each rank wrote beside the Trainer's files, in rank order."""
    count = len(list(folder.glob(memory_file(folder, "*").name)))
    return [json.loads(memory_file(folder, rank).read_text()) for rank in range(count)]


def own_memory(memories: list[dict[str, Any]], rank: int, ranks: int) -> dict[str, Any]:
    """Return what a rank goes on with: its own, or of another number of ranks what stands for all.

    Losses and metrics are averaged over ranks when they are logged.
    """
    if len(memories) == ranks:
        return memories[rank]
    merged = dict(memories[0])
    merged["tr_loss"] = sum(memory["tr_loss"] for memory in memories) / len(memories)
    merged["metrics"] = {}
    for name in memories[0]["metrics"]:
        of_ranks = [memory["metrics"][name] for memory in memories]
        merged["metrics"][name] = list(itertools.chain.from_iterable(of_ranks))
    return merged


def _checkpoint_of(run: Run, step: int) -> Path:
    """Return the checkpoint of a step: the run's, or one beside that which it was resumed from."""
    roots = [run.checkpoints]
    if run.resumed:
        roots.append(run.resumed.folder.parent)
    reasons = []
    for root in dict.fromkeys(roots):
        folder = root / f"checkpoint-{step}"
        try:
            return checkpoint.check(folder).folder
        except checkpoint.CorruptCheckpoint as reason:
            reasons.append(f"{folder}: {reason}")
    raise UserError(
        f"the best model of the run is that of step {step}, which cannot be loaded. {'; '.join(reasons)}. Put it "
        "back, or start over with --overwrite_output_dir true"
    )
