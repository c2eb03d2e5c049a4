"""The life of a PPO run: evaluate, log, write checkpoints, roll back, resume, and save the result."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data.records import BadScore
from rlhf.errors import EXIT_GUARD, EarlyExit
from rlhf.evaluate import Evaluation, sample_table, summarise
from rlhf.guards import Decision
from rlhf.model.loading import InitialModel
from rlhf.ppo.rollout import Rollout
from rlhf.ppo.trainer import PPOTrainer
from rlhf.runs.run import Run, format_metrics

# what the console shows of each step
CONSOLE_METRICS = (
    "score/total",
    "kl/sequence",
    "response/length",
    "ppo/clip_fraction",
    "value/explained_variance",
)


@dataclass
class TrainingLoop:
    """A trainer inside the folder of its run. `train` makes the steps that are left, `finish` saves
    and reports.
    """

    run: Run
    trainer: PPOTrainer
    initial: InitialModel
    # None: no evaluation by sampling
    evaluation: Evaluation | None
    # scorer -> weight of its score in the total
    weights: dict[str, float]
    # the metrics of the newest evaluation
    headline: dict[str, float] = field(default_factory=dict)

    def train(self) -> Decision | None:
        """Make the steps that are left, from the start or from the run's checkpoint.

        Returns the decision of the guard that stopped the run, or None at its end. Raises EarlyExit when
        a signal ends it.
        """
        run, trainer = self.run, self.trainer
        # takes over the folder; from here on a signal ends the run after its step
        run.open_tracker()
        if run.resumed:
            trainer.load(run.resumed.folder)
            run.restore_random_state()
            self.headline = run.resumed.metadata["state"]["last"]
        else:
            self.evaluate(0)

        stopped = trainer.train(self.on_step, self.roll_back)
        if stopped:
            self.evaluate(trainer.steps_done)
        return stopped

    def on_step(self, step: int, metrics: dict[str, float], rollout: Rollout | None) -> None:
        """Log a step; then evaluate and write a checkpoint where one belongs."""
        run, config = self.run, self.run.config
        is_last = step == config.total_steps
        events = self.trainer.guards.decisions.drain_events()
        is_pending = self.trainer.pending_decision is not None

        # skipped rollouts and steps that a guard ends are always logged
        if step % config.logging_steps == 0 or is_last or rollout is None or is_pending:
            run.tracker.log(metrics, step)
        for decision in events:
            run.log(f"guard {decision.guard} at step {step}: {decision.action}: {decision.reason}")
        run.tracker.table("guards", [asdict(decision) for decision in events], step)
        run.tracker.console(step, config.total_steps, metrics, CONSOLE_METRICS)

        # no checkpoint: a run that is killed here and resumed must come to the same decision again
        if is_pending:
            return

        is_interrupted = run.interrupted()
        wants_evaluation = is_last or (config.eval_steps and step % config.eval_steps == 0)
        is_evaluated = bool(wants_evaluation) and self.evaluate(step)
        if is_interrupted or run.should_checkpoint(step, config.total_steps):
            self.save_checkpoint(
                step, self.headline.get("eval/score/total") if is_evaluated else None
            )
        if is_interrupted:
            raise run.interrupted_error(step)

    def evaluate(self, step: int) -> bool:
        """Sample from the policy on the validation prompts and log it; return False where nothing
        was evaluated.
        """
        if self.evaluation is None:
            return False
        roles, run = self.trainer.roles, self.run
        try:
            with self.trainer.learner.readable():
                rows = self.evaluation.run(
                    roles.model,
                    lambda: roles.use("policy"),
                    lambda: roles.use("reference"),
                    run.world,
                )
        except BadScore as error:
            run.log(f"the evaluation at step {step} is left out: {error}")
            return False

        self.headline = summarise(rows)
        self.headline["eval/score/total"] = sum(
            weight * self.headline[f"eval/score/{name}"]
            for name, weight in self.weights.items()
            if weight
        )
        run.tracker.log(self.headline, step)
        run.tracker.table("samples", sample_table(rows), step)
        run.log(f"step {step}: {format_metrics(self.headline)}")
        return True

    def roll_back(self, decision: Decision) -> bool:
        """Restore the newest checkpoint from before the fault; return False if there is none."""
        kept = self.run.roll_back(decision.since)
        if kept is None:
            self.run.log(f"there is no checkpoint from before step {decision.since} to go back to")
            return False
        self.trainer.load(kept.folder, after=decision)
        self.headline = kept.metadata["state"]["last"]
        # written at once, so that a run that is killed now knows of this rollback when it is
        # resumed
        self.save_checkpoint(kept.step, kept.metadata["score"])
        self.run.log(
            f"back to {kept.folder}, with step sizes times {self.trainer.guards.decisions.rate_scale:g}"
        )
        return True

    def save_checkpoint(self, step: int, score: float | None) -> None:
        """Write the checkpoint of `step`; `score` is its evaluation's, if it has one."""
        self.run.save_checkpoint(step, self.write_files, score, {"last": self.headline})

    def write_files(self, folder: Path) -> None:
        """Write the trainer's state, and the policy so that a checkpoint can be sampled from and
        compared.
        """
        self.trainer.save(folder)
        self.save_policy(folder)

    def save_policy(self, folder: Path) -> None:
        """Write the policy and the critic; on all ranks."""
        self.trainer.roles.save(folder, self.initial, writes=self.run.world.is_main)

    def finish(self, stopped: Decision | None) -> None:
        """Write the policy and result.json. Raises EarlyExit where a guard stopped the run or nothing was
        learnt.
        """
        run, trainer = self.run, self.trainer
        spent = trainer.budget.total(run.world)
        if not spent["budget/tokens_trained"]:
            run.close()
            reason = (
                stopped.reason if stopped else f"every rollout was skipped, see {run.folder}/tables"
            )
            raise EarlyExit(f"ppo: nothing was learnt: {reason}", EXIT_GUARD)

        self.save_policy(run.folder)
        result: dict[str, Any] = {
            "guards": trainer.guards.decisions.events,
            "steps": trainer.steps_done,
        }
        if stopped:
            result["stopped"] = stopped.reason
        run.finish(self.headline, spent, **result)
        if stopped:
            raise EarlyExit(
                f"ppo: stopped by guard {stopped.guard} at step {stopped.step}: {stopped.reason}",
                EXIT_GUARD,
            )
