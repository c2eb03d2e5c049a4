"""How SFT, reward model and DPO use TRL's trainers: arguments, training, the result."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import torch
import transformers
from transformers import PrinterCallback, Trainer, get_scheduler
from trl import DPOTrainer, SFTTrainer

from rlhf.errors import EarlyExit, UserError
from rlhf.model.adapters import use_adapter
from rlhf.model.dropout import disable_dropout
from rlhf.model.files import first_line
from rlhf.model.loading import InitialModel, write_identity
from rlhf.model.packing import try_packing
from rlhf.model.quantized import dequantize
from rlhf.model.weights import check_finite
from rlhf.offline.callbacks import AlreadyFinished, RunCallback, not_finite
from rlhf.offline.packed import check_apart, pack_forward
from rlhf.offline.trl_names import rename_trl
from rlhf.options.offline import check_trl
from rlhf.program import user_error
from rlhf.ranks import deepspeed_state
from rlhf.ranks.deepspeed_backend import register_foreign_reads
from rlhf.ranks.deepspeed_config import read_deepspeed_config
from rlhf.ranks.divided import is_adapter, is_divided, readable, whole, whole_state
from rlhf.runs.budget import Budget
from rlhf.runs.run import Run
from rlhf.values import coerce

# options that TRL has under the same names
SHARED = (
    "learning_rate",
    "max_grad_norm",
    "per_device_train_batch_size",
    "logging_steps",
    "num_train_epochs",
    "max_steps",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "gradient_checkpointing",
)


def trl_arguments(cls: type, run: Run, *, has_held_out: bool, **fixed: Any) -> Any:
    """Return TRL's config for this run; `fixed` are further values of it.

    Raises UserError on a name or value under `trl:` that cannot be used, and where a schedule or
    optimizer lacks arguments or packages.
    """
    config = run.config
    on_gpu = run.world.device.type == "cuda"
    values = {
        "output_dir": str(run.checkpoints),
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": not on_gpu,
        "bf16": on_gpu and config.dtype in ("auto", "bfloat16"),
        "report_to": "none",
        # a loss that is not finite has to be seen: it ends the run
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        # RunCallback decides when to save
        "save_steps": 10**9,
        "disable_tqdm": True,
        "deepspeed": read_deepspeed_config(config.deepspeed, run.world, config),
        "dataloader_pin_memory": on_gpu,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "eval_strategy": "steps" if config.eval_steps and has_held_out else "no",
        "eval_steps": config.eval_steps or None,
        # rows that are too long were dropped when they were encoded
        "max_length": None,
    }
    values |= {name: getattr(config, name) for name in SHARED}
    # otherwise TRL's own choice of AdamW
    if config.optim != "adamw":
        values["optim"] = config.optim
    values |= fixed | trl_overrides(cls, config)
    if values.get("packing") and values["max_length"] is None:
        # of a pack, then: room for the longest row
        values["max_length"] = config.max_prompt_length + config.max_response_length
    with refused_by_trl(config.trl):
        arguments = cls(**values)
        check_schedule(arguments)
    return arguments


def trl_overrides(cls: type, config: Any) -> dict[str, Any]:
    """Return the values under `trl:`, each of its field's type.

    Raises UserError for a name that TRL does not have.
    """
    hints = get_type_hints(cls)
    check_trl(config.trl, cls.__name__, hints)
    result = {}
    for name, value in config.trl.items():
        try:
            result[name] = coerce(value, hints[name], f"trl: '{name}'")
        except TypeError:
            # a type that options do not have, which TRL checks itself
            result[name] = value
    return result


@contextmanager
def refused_by_trl(trl: dict[str, Any]) -> Iterator[None]:
    """Raise as a UserError what TRL and the libraries under it refuse of the options.

    With options of their own, `trl`, whatever they raise is taken for a refusal of these.
    """
    try:
        yield
    except Exception as error:
        is_refusal = bool(trl) or isinstance(error, (ValueError, TypeError, ImportError))
        if is_no_refusal(error) or not is_refusal:
            raise
        named = f" (trl: {', '.join(trl)})" if trl else ""
        raise UserError(f"TRL refuses these options{named}: {first_line(error)}") from error


def is_no_refusal(error: Exception) -> bool:
    """Return whether an error says something else than that a library refuses options."""
    own = (UserError, EarlyExit, torch.OutOfMemoryError)
    return isinstance(error, own) or user_error(error) is not None


def check_schedule(arguments: Any) -> None:
    """Make the optimizer and its schedule for one weight, so that what they lack is known before
    training.
    """
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    weight = torch.zeros(1, requires_grad=True)
    if cls.__module__.startswith("torch."):
        cls([weight], **options)
    optimizer = torch.optim.SGD([weight], lr=arguments.learning_rate)
    warmup = arguments.get_warmup_steps(100)
    get_scheduler(
        arguments.lr_scheduler_type, optimizer, warmup, 100, arguments.lr_scheduler_kwargs
    )


def prepare_trainer(trainer: Trainer, lora_dropout: float = 0.0) -> None:
    """Change how a trainer computes: no dropout where TRL's options say so, and passes without
    padding; silence it.

    TRL's own `disable_dropout` (DPO and reward; SFT trains with dropout) misses dropout that a
    model calls as a function, and takes away that of a new adapter: `lora_dropout` is put back.
    """
    if getattr(trainer.args, "disable_dropout", False):
        disable_dropout(trainer.model, lora_dropout)
        if getattr(trainer, "ref_model", None) is not None:
            disable_dropout(trainer.ref_model)
    for model in filter(None, (trainer.model, getattr(trainer, "ref_model", None))):
        model = trainer.accelerator.unwrap_model(model)
        # tried before training, where ZeRO-3 records which weights a pass reads
        with readable(model):
            try_packing(model)
        if isinstance(trainer, (SFTTrainer, DPOTrainer)):
            own_head = not getattr(trainer, "use_weighting", False)
            pack_forward(model, paired=isinstance(trainer, DPOTrainer), own_head=own_head)
    if getattr(trainer, "padding_free", False):
        with readable(trainer.model):
            check_apart(trainer.model)
    if trainer.args.deepspeed:
        # in place of the Trainer's own, which loads what as many ranks have written
        transformers.trainer.deepspeed_load_checkpoint = load_trained
    if (trainer.args.deepspeed or {}).get("zero_optimization", {}).get("stage") == 3:
        register_foreign_reads(trainer.model)
    # the tracker's console line replaces it
    trainer.remove_callback(PrinterCallback)


def count_training(trainer: Trainer, budget: Budget) -> None:
    """Count the tokens and the cost of each training step."""
    training_step = trainer.training_step

    def counted(model, inputs, *args, **kwargs):
        # packed rows have no mask, and hardly any padding
        mask = inputs.get("attention_mask")
        budget.tokens_trained += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        with budget.counting():
            return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = counted


def load_trained(engine: Any, folder: str, load_module_strict: bool = True) -> None:
    """Restore a checkpoint of the Trainer, written by any number of ranks."""
    deepspeed_state.load(engine, folder, strict=load_module_strict)


def train(trainer: Trainer, callback: RunCallback, lora_dropout: float = 0.0) -> None:
    """Train to the end, from the run's checkpoint if it has one, writing checkpoints on the way.

    `callback` is one of the trainer's. Raises EarlyExit when a signal has ended it early, or a loss,
    gradient or weight is not finite any more, and UserError when no step was made.
    """
    run = callback.run
    sets = {"rows": trainer.train_dataset, "held-out rows": trainer.eval_dataset}
    batch = trainer.args.train_batch_size * run.world.size
    for name, dataset in sets.items():
        if trainer.args.dataloader_drop_last and dataset is not None and len(dataset) < batch:
            raise UserError(
                f"trl: 'dataloader_drop_last' drops all {len(dataset)} {name}, since a batch is {batch}. Leave it "
                "out, or lower per_device_train_batch_size"
            )

    prepare_trainer(trainer, lora_dropout)
    count_training(trainer, callback.budget)
    callback.trainer = trainer
    run.open_tracker()
    begun = run.resumed.step if run.resumed else 0
    try:
        trainer.train(resume_from_checkpoint=str(run.resumed.folder) if run.resumed else None)
    except AlreadyFinished:
        trainer._finalize_training(None, 0, time.time())
    except Exception as error:
        # some values under `trl:` are read in the first step only
        is_first = trainer.state.global_step <= begun + 1
        if not (run.config.trl and is_first) or is_no_refusal(error):
            raise
        raise UserError(
            f"trl: {', '.join(run.config.trl)}: TRL fails with these options in the first step "
            f"({type(error).__name__}: {first_line(error)}). Leave them out, or see where with --debug"
        ) from error
    if callback.stopped:
        raise run.interrupted_error(trainer.state.global_step)


def held_out_loss(trainer: Trainer, run: Run) -> dict[str, float]:
    """Return the trainer's own evaluation on its held-out rows, under our names; its callbacks log
    it.

    Raises EarlyExit if the loss is not finite: such a model is no result.
    """
    named = rename_trl(trainer.evaluate(), run.program)
    if not math.isfinite(named["eval/loss/total"]):
        raise not_finite(run, trainer.state.global_step, "the loss on held-out rows is not finite")
    found = {}
    for name, value in named.items():
        # how long it took is no result
        if name.startswith("eval/") and "eval/time" not in name:
            found[name] = value
    return found


def reference_context(model: Any, name: str) -> Callable | None:
    """Return the context of the reference policy: the adapter `name` where there is one, else the
    bare base. None for a model that is trained whole.
    """
    if not hasattr(model, "peft_config"):
        return None
    adapter = name if name in model.peft_config else None
    return lambda: use_adapter(model, adapter)


def save_policy(run: Run, model: Any, initial: InitialModel, *, merge: bool = False) -> None:
    """Write weights (the adapter, or whole weights), tokenizer and rlhf.json to the output_dir;
    call on all ranks.

    Raises UserError, and writes nothing, if weights are not finite.
    """
    state = None
    if not hasattr(model, "peft_config") and any(map(is_divided, model.parameters())):
        state = whole_state(model, kept=run.world.is_main)
    with whole(_saved(model, merge=merge)):
        if run.world.is_main:
            _write_policy(run, model, initial, merge, state)
    run.world.barrier()


def _saved(model: Any, *, merge: bool) -> list[torch.nn.Parameter]:
    """Return the parameters that have to be whole to be written: with adapters, these."""
    if not hasattr(model, "peft_config"):
        return []
    if merge:
        return list(model.parameters())
    saved = [parameter for name, parameter in model.named_parameters() if is_adapter(name)]
    # PEFT saves embeddings beside an adapter of theirs
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            saved += module.parameters()
    return saved


def _write_policy(
    run: Run,
    model: Any,
    initial: InitialModel,
    merge: bool,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a policy on the main rank; `state` are its weights, where they are not the model's own."""
    has_adapter = hasattr(model, "peft_config")
    if has_adapter and merge:
        model.set_adapter("default")
        # what the adapter was trained on, rounding included
        dequantize(model)
        model = model.merge_and_unload(adapter_names=["default"])
        has_adapter = False
    weights = model.named_parameters() if state is None else state.items()
    check_finite(weights, f"{run.folder}: not saved")
    how = {"selected_adapters": ["default"]} if has_adapter else {"state_dict": state}
    model.save_pretrained(run.folder, **how)
    initial.tokenizer.save_pretrained(run.folder)
    if has_adapter:
        write_identity(run.folder, initial, program=run.program)
