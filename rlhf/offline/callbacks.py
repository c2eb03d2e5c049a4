"""What a run does at the events of a TRL trainer: evaluate, log, write checkpoints, and stop."""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from rlhf.errors import EXIT_GUARD, EarlyExit
from rlhf.evaluate import Evaluation, sample_table, summarise
from rlhf.guards import Decision
from rlhf.model.files import is_adapter
from rlhf.model.loading import InitialModel, write_identity
from rlhf.model.weights import is_finite
from rlhf.offline.best import HeldOutLosses, memory_file, own_memory, read_memories
from rlhf.offline.guards import OfflineGuards
from rlhf.offline.trl_names import rename_trl
from rlhf.ranks.deepspeed_backend import check_engine
from rlhf.ranks.distributed import peak_memory
from rlhf.ranks.divided import own_part, readable
from rlhf.runs import checkpoint
from rlhf.runs.budget import Budget
from rlhf.runs.run import Run, format_metrics

ACCURACY = {"sft": "token/accuracy", "reward": "reward/accuracy", "dpo": "dpo/reward_accuracy"}


class AlreadyFinished(Exception):
    """The checkpoint is that of the last step. The Trainer would make one more, in the middle of an
    epoch.
    """


class RunCallback(TrainerCallback):
    """Connects a TRL trainer to its run; `trainers.train` sets `trainer`.

    It evaluates by sampling at step 0, every eval_steps and at the end, and adds `measure(model)`
    to those metrics, which `metrics` holds afterwards. It sends the trainer's logs to the tracker
    with `budget/*` added. It makes the Trainer's checkpoints whole: what the Trainer leaves out,
    the state of `learnt` (with state_dict and load_state_dict), then the manifest, last of all and
    on all ranks. It ends training after `patience` evaluations on held-out rows without a lower
    loss; 0: never. `held_out` has those evaluations.
    """

    trainer: Any = None

    def __init__(
        self,
        run: Run,
        initial: InitialModel,
        budget: Budget,
        evaluation: Evaluation | None = None,
        reference: Any = None,
        measure: Callable[[Any], dict[str, float]] | None = None,
        learnt: Any = None,
        patience: int = 0,
    ):
        self.run = run
        self.initial = initial
        self.budget = budget
        self.evaluation = evaluation
        self.reference = reference
        self.measure = measure
        self.learnt = learnt
        self.patience = patience
        self.metrics: dict[str, float] = {}
        self.evaluated_step = -1
        self.stopped = False
        self.held_out = HeldOutLosses()
        self.guards = OfflineGuards(run.program, run.config.guards)
        # of a guard that has ended the run
        self.stop_reason = ""
        # the Trainer's sum of losses since its last log, after the step before
        self._loss_sum = 0.0
        accuracy = ACCURACY[run.program]
        self.shown = (
            "loss/total",
            accuracy,
            f"eval/{accuracy}",
            "eval/loss/total",
            "learning_rate",
        )

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.deepspeed:
            check_engine(self.trainer.model_wrapped)
        if self.run.resumed is None:
            self._evaluate(model, state.global_step)
            return
        self._restore()
        if state.global_step >= state.max_steps or self._is_patience_at_end():
            raise AlreadyFinished

    def on_step_begin(self, args, state, control, **kwargs):
        self.run.world.note_step(state.global_step + 1)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        # none under DeepSpeed, whose engine keeps the gradients and has made its step by now
        gradients = [
            parameter.grad for parameter in model.parameters() if parameter.grad is not None
        ]
        if not math.isfinite(float(torch.nn.utils.get_total_norm(gradients))):
            raise not_finite(self.run, state.global_step + 1, "the gradient is not finite")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        run, step = self.run, state.global_step
        every = run.config.eval_steps
        found = []
        if step >= state.max_steps or (every and step % every == 0):
            self._evaluate(model, step)
            found = self.guards.logged(step, self.metrics)

        self.stopped = run.interrupted()
        control.should_training_stop = control.should_training_stop or self.stopped
        control.should_save = self.stopped or run.should_checkpoint(step, state.max_steps)

        loss = self._step_loss(step)
        is_whole = math.isfinite(loss)
        if control.should_save and is_whole:
            trained = [own_part(p) for p in model.parameters() if p.requires_grad]
            is_whole = all(map(is_finite, trained))
        # one exchange for both; NaN on any rank is NaN in the sum
        own = torch.tensor([float(not is_whole), loss], dtype=torch.float64)
        broken, total = run.world.sum(own)
        if broken:
            raise not_finite(run, step, "the loss or a weight is not finite")
        self._act(found + self.guards.loss(step, float(total) / run.world.size), control)
        return control

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics = metrics or {}
        # the log-loss where the trainer has it: the loss may have other terms
        self.held_out.add(state.global_step, metrics.get("eval_log_loss", metrics.get("eval_loss")))
        is_training = self.trainer is not None and self.trainer.is_in_train
        if is_training and self._is_patience_at_end():
            self.run.log(
                f"step {state.global_step}: {self.held_out.without_gain} evaluations without a lower held-out loss "
                "than before: training ends here"
            )
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs.update(self.budget.total(self.run.world))
        logs["memory/peak"] = peak_memory(self.run.world.device)
        metrics = rename_trl(logs, self.run.program)
        self._act(self.guards.logged(state.global_step, metrics), control)
        self.run.tracker.log(metrics, state.global_step)
        if metrics.keys() & set(self.shown):
            self.run.tracker.console(state.global_step, state.max_steps, metrics, self.shown)

    def on_save(self, args, state, control, **kwargs):
        run, step = self.run, state.global_step
        folder = run.checkpoints / f"checkpoint-{step}"
        self._write_memory(folder)
        # the manifest covers the files of all ranks
        run.world.barrier()

        loss = self.held_out.loss_at(step)
        metadata = run.metadata(
            score=None if loss is None else -loss,
            state={
                "last": self.metrics,
                "evaluated": self.evaluated_step,
                "held_out": self.held_out.evaluations,
            },
        )
        if run.world.is_main:
            if is_adapter(folder):
                write_identity(folder, self.initial, program=run.program)
            checkpoint.seal(folder, step, metadata)
            checkpoint.crash_point("sealed")
            checkpoint.prune(run.checkpoints, run.config.save_total_limit)
        run.world.barrier()

    def _step_loss(self, step: int) -> float:
        """Return this rank's loss of the step that was just made, by what the Trainer has summed up."""
        total = float(self.trainer._tr_loss)
        # the sum began again where the step before was logged
        before = 0.0 if self.trainer._globalstep_last_logged == step - 1 else self._loss_sum
        self._loss_sum = total
        return total - before

    def _act(self, decisions: list[Decision], control: Any) -> None:
        """Say what the guards have decided, and end training where one stops the run."""
        for decision in decisions:
            if decision.action == "stop" and not self.stop_reason:
                self.stop_reason = (
                    f"guard {decision.guard} at step {decision.step}: {decision.reason}"
                )
                control.should_training_stop = True
                # it would take the place of one from before the fault
                control.should_save = False
        for event in self.guards.decisions.drain_events():
            self.run.tracker.table("guards", [asdict(event)], event.step)
            self.run.log(
                f"guard {event.guard} at step {event.step}: {event.action}: {event.reason}"
            )

    def finish(self, headline: dict[str, Any], budget: dict[str, float], **more: Any) -> None:
        """Write result.json with what the guards have decided, and close the run.

        Raises EarlyExit where one of them has stopped it.
        """
        if self.stop_reason:
            more["stopped"] = self.stop_reason
        self.run.finish(headline, budget, guards=self.guards.decisions.events, **more)
        if self.stop_reason:
            raise EarlyExit(f"{self.run.program}: stopped by {self.stop_reason}", EXIT_GUARD)

    def _is_patience_at_end(self) -> bool:
        return bool(self.patience) and self.held_out.without_gain >= self.patience

    def _evaluate(self, model, step: int) -> None:
        if (self.evaluation is None and self.measure is None) or step == self.evaluated_step:
            return
        self.evaluated_step = step
        rows = []
        read = [model]
        # a reference of its own, where it is no context of the same model
        if isinstance(self.reference, nn.Module):
            read.append(self.reference)
        with readable(*read, world=self.run.world):
            if self.evaluation is not None:
                rows = self.evaluation.run(model, nullcontext, self.reference, self.run.world)
            self.metrics = summarise(rows)
            if self.measure is not None:
                self.metrics |= self.measure(model)
        self.run.tracker.log(self.metrics, step)
        self.run.tracker.table("samples", sample_table(rows), step)
        self.run.log(f"step {step}: {format_metrics(self.metrics)}")

    def _write_memory(self, folder: Path) -> None:
        """Write what the Trainer of this rank has summed up since its last log, which its
        checkpoints leave out.
        """
        kept = {
            "tr_loss": float(self.trainer._tr_loss),
            "total_loss": self.trainer._total_loss_scalar,
            "last_logged": self.trainer._globalstep_last_logged,
            "tokens": self.trainer._total_train_tokens,
            "metrics": self.trainer._metrics["train"],
            "budget": self.budget.state_dict(),
            "learnt": self.learnt.state_dict() if self.learnt is not None else {},
            "guards": self.guards.state_dict(),
        }
        memory_file(folder, self.run.world.rank).write_text(json.dumps(kept))

    def _restore(self) -> None:
        """Restore what `on_save` wrote beside the Trainer's own files."""
        resumed = self.run.resumed
        memories, world = read_memories(resumed.folder), self.run.world
        kept = own_memory(memories, world.rank, world.size)
        self.trainer._tr_loss += kept["tr_loss"]
        self.trainer._total_loss_scalar = kept["total_loss"]
        self.trainer._globalstep_last_logged = kept["last_logged"]
        self.trainer._initial_global_step = 0
        self.trainer._total_train_tokens = kept["tokens"]
        self.trainer._metrics["train"] = defaultdict(list, kept["metrics"])
        self.budget.load_shares([memory["budget"] for memory in memories], world)
        if self.learnt is not None:
            self.learnt.load_state_dict(kept["learnt"])
        self._loss_sum = kept["tr_loss"]
        # a checkpoint of an earlier version has none of either
        if "guards" in kept:
            self.guards.load_state_dict(kept["guards"])
        self.held_out = HeldOutLosses(resumed.metadata["state"].get("held_out", []))
        self.metrics = resumed.metadata["state"]["last"]
        self.evaluated_step = resumed.metadata["state"]["evaluated"]


def not_finite(run: Run, step: int, what: str) -> EarlyExit:
    """Close the run and return the exception that ends it because of NaN or infinite numbers;
    nothing is saved.
    """
    run.close()
    kept = f" Checkpoints from before are in {run.checkpoints}." if run.checkpoints.is_dir() else ""
    return EarlyExit(
        f"{run.program}: stopped at step {step}: {what}, and nothing is saved of it.{kept} Lower learning_rate, take "
        "dtype float32, or look at the rows",
        EXIT_GUARD,
    )
