"""How SFT, reward model and DPO drive TRL's trainers: arguments, cost, evaluation by sampling, resume, saving."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, get_type_hints

from rlhf.errors import EXIT_GUARD, Halt, UserError, did_you_mean
from rlhf.offline.trl_names import rename_trl
from rlhf.runs import checkpoint
from rlhf.runs.run import Run, format_metrics
from rlhf.values import coerce

no_context = nullcontext  # the policy's context where the model already is the policy


def trl_arguments(cls: type, run: Run, held_out: bool, **fixed: Any) -> Any:
    """TRL's config for this run; `held_out` says whether there are rows to evaluate on.

    Raises UserError on a name or value under `trl:` that cannot be used, and where a schedule or optimizer wants
    arguments or packages that are not there.
    """
    from rlhf.deepspeed_config import read_deepspeed_config

    config = run.config
    values = {
        "output_dir": str(run.checkpoints),
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": run.world.device.type == "cpu",
        "bf16": run.world.device.type == "cuda" and config.dtype in ("auto", "bfloat16"),
        "report_to": "none",
        "logging_nan_inf_filter": False,  # a loss that is not finite is to be seen, and ends the run
        "save_strategy": "steps",
        "save_steps": 10**9,  # the checkpoint callback says when
        "disable_tqdm": True,
        "deepspeed": read_deepspeed_config(config.deepspeed, run.world, config),
        "dataloader_pin_memory": run.world.device.type == "cuda",
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "eval_strategy": "steps" if config.eval_steps and held_out else "no",
        "eval_steps": config.eval_steps or None,
        "max_length": None,  # rows that are too long were dropped when they were encoded
    }
    shared = ("learning_rate", "max_grad_norm", "per_device_train_batch_size", "logging_steps", "num_train_epochs")
    shared += ("max_steps", "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay")
    values |= {name: getattr(config, name) for name in (*shared, "gradient_checkpointing")}
    values |= fixed | trl_overrides(cls, config)
    with refused_by_trl():
        arguments = cls(**values)
        make_schedule(arguments)
    return arguments


def trl_overrides(cls: type, config: Any) -> dict[str, Any]:
    """The values under `trl:`, each of its field's type. Raises UserError for one that TRL, or this project, has not
    as an option of that name."""
    hints = get_type_hints(cls)
    result = {}
    for name, value in config.trl.items():
        if name not in hints:
            raise UserError(f"trl: '{name}' is no option of {cls.__name__}.{did_you_mean(name, hints)}")
        if hasattr(config, name):
            raise UserError(f"trl: '{name}' is an option of this program: --{name} {value}")
        try:
            result[name] = coerce(value, hints[name], f"trl: '{name}'")
        except TypeError:  # a type that options do not have, which TRL checks itself
            result[name] = value
    return result


@contextmanager
def refused_by_trl():
    """What TRL and the libraries under it refuse of the options they are given, as a UserError."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"TRL refuses these options: {error}") from None


def make_schedule(arguments: Any) -> None:
    """Make the optimizer and its schedule for one weight: what they lack is known before anything is trained."""
    import torch
    from transformers import Trainer, get_scheduler

    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    if cls.__module__.startswith("torch."):
        cls(optimizer.param_groups[0]["params"], **options)
    warmup = arguments.get_warmup_steps(100)
    get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, 100, arguments.lr_scheduler_kwargs)


def count_flops(trainer, budget, lora_dropout: float = 0.0) -> None:
    """Switch dropout off where TRL's options ask for it (DPO and reward; SFT trains with it), but for the
    `lora_dropout` that a new adapter was given: TRL forgets what a model calls as a function, and takes away LoRA's.

    Count what `budget` sees in each training step of the trainer, and take away the trainer's own printing: the
    tracker's console line stands for it."""
    from transformers import PrinterCallback

    from rlhf.deepspeed_backend import register_foreign_reads
    from rlhf.roles import disable_dropout

    if getattr(trainer.args, "disable_dropout", False):
        disable_dropout(trainer.model, lora_dropout)
        if getattr(trainer, "ref_model", None) is not None:
            disable_dropout(trainer.ref_model)
    if (trainer.args.deepspeed or {}).get("zero_optimization", {}).get("stage") == 3:
        register_foreign_reads(trainer.model)
    trainer.remove_callback(PrinterCallback)
    training_step = trainer.training_step

    def counted(model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask")  # packed rows have none, and hardly any padding
        budget.tokens_trained += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        with budget.counting():
            return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = counted


def eval_callback(run: Run, evaluate, policy, reference, budget=None, measure=None):
    """A TRL callback: evaluates by sampling at step 0, every eval_steps and at the end; adds `budget/*` to each log.

    `policy` and `reference` are as `Evaluation.run` takes them; `measure` gives more metrics of a model. The last
    metrics stand in its `.last`.
    """
    from transformers import TrainerCallback

    from rlhf.deepspeed_backend import gathered
    from rlhf.distributed import peak_memory
    from rlhf.evaluate import sample_table, summarise

    class Sampler(TrainerCallback):
        def __init__(self):
            self.last: dict[str, float] = {}
            self.step = -1

        def _run(self, model, step: int) -> None:
            if (evaluate is None and measure is None) or step == self.step:
                return
            self.step = step
            with gathered(model):
                rows = evaluate.run(model, policy, reference, run.world) if evaluate else []
                self.last = summarise(rows) | (measure(model) if measure else {})
            run.tracker.log(self.last, step)
            run.tracker.table("samples", sample_table(rows), step)
            run.log(f"step {step}: {format_metrics(self.last)}")

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            if run.resumed is None:
                self._run(model, state.global_step)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            every = run.config.eval_steps
            if (every and state.global_step % every == 0) or state.global_step >= state.max_steps:
                self._run(model, state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if budget is not None and logs is not None:
                logs.update(budget.total(run.world) | {"memory/peak": peak_memory(run.world.device)})

    return Sampler()


def train(trainer, run: Run, initial, budget, sampler) -> None:
    """Train to the end, from the run's checkpoint if it has one, writing checkpoints on the way.

    Raises Halt when a signal has ended it early, or a loss, gradient or weight is not finite any more, and UserError
    when no step was made.
    """
    rows, batch = len(trainer.train_dataset), trainer.args.train_batch_size * run.world.size
    if trainer.args.dataloader_drop_last and rows < batch:
        raise UserError(f"trl: 'dataloader_drop_last' drops all {rows} rows, since a batch is {batch}: no step is left")
    run.open_tracker()
    trainer.add_callback(trainer_callback(run.tracker, run.program))
    saver = checkpoint_callback(trainer, run, initial, budget, sampler)
    trainer.add_callback(saver)
    try:
        trainer.train(resume_from_checkpoint=str(run.resumed.folder) if run.resumed else None)
    except AlreadyFinished:
        trainer._finalize_training(None, 0, time.time())
    except ImportError as error:
        if not run.config.trl:
            raise
        raise UserError(f"trl: {', '.join(run.config.trl)}: a package is missing: {error}") from None
    if saver.stopped:
        raise run.interrupted_error(trainer.state.global_step)


def not_finite(run: Run, step: int, what: str) -> Halt:
    """The exception that ends a run whose numbers are NaN or infinite; nothing that was made of them is saved."""
    run.close()
    kept = f" Checkpoints from before stand in {run.checkpoints}." if run.checkpoints.is_dir() else ""
    return Halt(
        f"{run.program}: stopped at step {step}: {what}, and nothing is saved of it.{kept} Lower learning_rate, take "
        "dtype float32, or look at the rows",
        EXIT_GUARD,
    )


class AlreadyFinished(Exception):
    """The checkpoint is that of the last step. The Trainer would make one more, in the middle of an epoch."""


def checkpoint_callback(trainer, run: Run, initial, budget, sampler):
    """A TRL callback that makes the Trainer's checkpoints whole: what the Trainer forgets beside its files, then the
    manifest, last of all and on all ranks. Says when one is due, and ends the training when a signal asked for it."""
    import torch
    from transformers import TrainerCallback

    from rlhf.weights import is_finite

    class Saver(TrainerCallback):
        stopped = False

        def on_train_begin(self, args, state, control, **kwargs):
            if run.resumed is None:
                return
            kept = json.loads((run.resumed.folder / _memory(run)).read_text())
            trainer._tr_loss += kept["tr_loss"]
            trainer._total_loss_scalar, trainer._globalstep_last_logged = kept["total_loss"], kept["last_logged"]
            trainer._initial_global_step = 0
            trainer._total_train_tokens = kept["tokens"]
            trainer._metrics["train"] = defaultdict(list, kept["metrics"])
            budget.load_state_dict(kept["budget"])
            about = run.resumed.metadata["state"]
            sampler.last, sampler.step = about["last"], about["evaluated"]
            if state.global_step >= state.max_steps:
                raise AlreadyFinished

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            # none under DeepSpeed, whose engine keeps the gradients and has made its step by now
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm):
                raise not_finite(run, state.global_step + 1, "the gradient is not finite")

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.stopped = run.interrupted()
            control.should_training_stop = control.should_training_stop or self.stopped
            control.should_save = self.stopped or run.should_checkpoint(state.global_step, state.max_steps)
            whole = math.isfinite(float(trainer._tr_loss))
            if control.should_save:  # ZeRO-3 keeps this rank's part of a parameter apart
                learning = [p for p in model.parameters() if p.requires_grad]
                whole = whole and all(is_finite(getattr(p, "ds_tensor", p)) for p in learning)
            if run.world.sum(float(not whole)):
                raise not_finite(run, state.global_step, "the loss or a weight is not finite")
            return control

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.loss = (state.global_step, (metrics or {}).get("eval_loss"))

        def on_save(self, args, state, control, **kwargs):
            from rlhf.models import write_identity

            folder, step = run.checkpoints / f"checkpoint-{state.global_step}", state.global_step
            kept = {
                "tr_loss": float(trainer._tr_loss),
                "total_loss": trainer._total_loss_scalar,
                "last_logged": trainer._globalstep_last_logged,
                "tokens": trainer._total_train_tokens,
                "metrics": trainer._metrics["train"],
                "budget": budget.state_dict(),
            }
            (folder / _memory(run)).write_text(json.dumps(kept))
            run.world.barrier()
            at, loss = getattr(self, "loss", (-1, None))
            score = -loss if at == step and loss is not None and math.isfinite(loss) else None
            about = run.metadata(step, score, {"last": sampler.last, "evaluated": sampler.step})
            if run.world.is_main:
                if (folder / "adapter_config.json").is_file():
                    write_identity(folder, initial, program=run.program)
                checkpoint.seal(folder, step, about)
                checkpoint.crash_point("sealed")
                checkpoint.prune(run.checkpoints, run.config.save_total_limit)
            run.world.barrier()

    return Saver()


def _memory(run: Run) -> str:
    """What the Trainer of this rank has summed up since its last log, which its own checkpoints leave out."""
    return f"memory-{run.world.rank}.json"


def held_out_loss(trainer, run: Run) -> dict[str, float]:
    """The trainer's own evaluation on its held-out rows, under our names; logged by its callbacks.

    Raises Halt if the loss is not finite: such a model is no result.
    """

    named = rename_trl(trainer.evaluate(), run.program)
    if not math.isfinite(named["eval/loss/total"]):
        raise not_finite(run, trainer.state.global_step, "the loss on held-out rows is not finite")
    return {k: v for k, v in named.items() if k.startswith("eval/") and not k.startswith("eval/time")}


def reference_context(model, name: str = "reference"):
    """The context of the reference policy: the frozen copy where there is one, the bare base under a new adapter,
    None for a model trained whole."""
    from rlhf.adapters import use_adapter

    if not hasattr(model, "peft_config"):
        return None
    return lambda: use_adapter(model, name if name in model.peft_config else None)


def save_policy(run: Run, model, initial, merge: bool = False) -> None:
    """Write weights (the adapter, or whole weights), tokenizer and rlhf.json to the output_dir; call on all ranks.

    Raises UserError, and writes nothing, if they are not finite.
    """
    from rlhf.deepspeed_backend import gathered
    from rlhf.models import write_identity
    from rlhf.weights import check_finite

    folder = Path(run.config.output_dir)
    with gathered(model):
        if run.world.is_main:
            is_adapter = hasattr(model, "peft_config")
            if is_adapter and merge:
                model.set_adapter("default")
                model = model.merge_and_unload(adapter_names=["default"])
            check_finite(model.named_parameters(), f"{folder}: not saved")
            if is_adapter and merge:
                model.save_pretrained(folder)
            elif is_adapter:
                model.save_pretrained(folder, selected_adapters=["default"])
            else:
                model.save_pretrained(folder)
            initial.tokenizer.save_pretrained(folder)
            if is_adapter and not merge:
                write_identity(folder, initial, program=run.program)
    run.world.barrier()


def trainer_callback(tracker, stage: Literal["sft", "reward", "dpo"], keys: Iterable[str] = ()):
    """A transformers TrainerCallback that sends every log of the trainer through `tracker`; set report_to="none" there.

    keys: what the console line shows, by our names (default: loss/total, the accuracy of the stage, learning_rate).
    """
    from transformers import TrainerCallback

    accuracy = {"sft": "token/accuracy", "reward": "reward/accuracy", "dpo": "dpo/reward_accuracy"}[stage]
    shown = list(keys) or ["loss/total", accuracy, f"eval/{accuracy}", "eval/loss/total", "learning_rate"]

    class TrackerCallback(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            metrics = rename_trl(logs or {}, stage)
            if not metrics:
                return
            tracker.log(metrics, state.global_step)
            if any(key in metrics for key in shown):
                tracker.console(state.global_step, state.max_steps, metrics, shown)

    return TrackerCallback()
