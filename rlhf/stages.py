"""What the programs share: their common options, how a run begins and ends, and how it drives TRL's trainers."""

from __future__ import annotations

import json
import math
import random
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rlhf import config as options
from rlhf.config import UserError, did_you_mean, option
from rlhf.data.records import Prompt, Record, Scorer, prompt_group


@dataclass(kw_only=True)
class RunConfig:
    """Options of every program."""

    model_name_or_path: str = option(help="where learning starts: a Hub name, a folder of weights, or an adapter")
    data: list[str] = option(help="files (.jsonl .json .csv .parquet), preference stores (.db) or Hub names")
    output_dir: str = option(help="the folder for weights, metrics, configuration and result")
    overwrite_output_dir: bool = option(False, "begin anew in a folder that holds a finished run", resume="free")
    seed: int = option(0, "run seed: data order, initial adapters, sampling")
    half: Literal["all", "a", "b"] = option(
        "all", "train on one half of the groups, so that a referee can have the other"
    )
    validation_fraction: float = option(0.05, "share of groups held out for evaluation while training")
    test_fraction: float = option(0.1, "share of groups held out for `rlhf compare`; no program reads them")
    limit: int | None = option(None, "read only so many rows of the data")
    on_bad: Literal["stop", "skip"] = option("stop", "what to do with rows that cannot be used")
    max_prompt_length: int = option(512, "tokens; rows with longer prompts are dropped and counted")
    max_response_length: int = option(
        512, "tokens with EOS; longer responses are dropped and counted, or cut off in PPO"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = option(
        "auto", "of the base model; auto is bfloat16 on a GPU and float32 elsewhere. PPO's adapters stay in float32"
    )
    attn_implementation: str | None = option(None, "sdpa (default), eager, flash_attention_2, ...")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, about a third more time")
    deepspeed: str = option("zero2", "DeepSpeed JSON or the name of one in configs/deepspeed, used under `deepspeed`")
    learning_rate: float = option(1e-4, "peak step size of AdamW")
    max_grad_norm: float = option(1.0, "gradients are clipped to this joint norm")
    per_device_train_batch_size: int = option(8, "rows in one forward and backward pass on each device")
    logging_steps: int = option(10, "write metrics every so many steps", resume="free")
    eval_steps: int = option(0, "evaluate every so many steps; 0: at the start and the end alone", resume="free")
    report_to: Literal["none", "wandb"] = option("none", "wandb: offline when no key is set", resume="free")
    project: str = option("rlhf", "W&B project", resume="free")
    run_name: str | None = option(None, "W&B name; default: the output_dir", resume="free")

    def validate(self) -> None:
        if not 0 <= self.validation_fraction < 1 or not 0 <= self.test_fraction < 1:
            raise UserError("validation_fraction and test_fraction must lie in [0, 1)")
        if self.validation_fraction + self.test_fraction >= 1:
            raise UserError("validation_fraction and test_fraction leave nothing to train on")
        for name in ("max_prompt_length", "max_response_length", "per_device_train_batch_size", "logging_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"'{name}' is {getattr(self, name)}, expected at least 1")
        if getattr(self, "lora_r", 1) < 1:
            raise UserError(f"'lora_r' is {self.lora_r}, expected at least 1")
        if self.learning_rate <= 0:
            raise UserError(f"'learning_rate' is {self.learning_rate}, expected more than 0")


@dataclass(kw_only=True)
class SamplingConfig(RunConfig):
    """Options of the programs that train a policy, which is evaluated by sampling from it."""

    eval_data: list[str] | None = option(
        None, "prompts for evaluation by sampling; default: those of the data", resume="free"
    )
    eval_prompts: int = option(64, "sample answers to so many validation prompts; 0: never", resume="free")
    eval_scorers: list[dict] = option(
        [], "scorers that only look, e.g. [{voice: configs/voices/shop.yaml}]", resume="free"
    )
    temperature: float = option(1.0, "of sampling, in training and evaluation")
    generation_batch_size: int = option(64, "responses generated together on each device", resume="free")

    def validate(self) -> None:
        super().validate()
        if self.temperature <= 0:
            raise UserError(f"'temperature' is {self.temperature}, expected more than 0")


@dataclass(kw_only=True)
class AdapterConfig:
    """Options of a new LoRA adapter."""

    lora_r: int = option(16, "rank of a new adapter; one that is continued keeps its own")
    lora_alpha: int = option(32, "its scale is alpha / r")
    lora_dropout: float = option(0.0, "dropout on its input (off in PPO)")
    lora_target_modules: list[str] = option(["all-linear"], "modules that get one")


@dataclass(kw_only=True)
class TrainerConfig(AdapterConfig):
    """Options of the stages that stand on TRL's trainers, under TRL's names."""

    use_peft: bool = option(True, "train LoRA adapters; false: train the whole model")
    num_train_epochs: float = option(1.0, "passes over the data", resume="free")
    max_steps: int = option(-1, "stop after so many steps; -1: by epochs", resume="free")
    gradient_accumulation_steps: int = option(1, "forward and backward passes before each step")
    lr_scheduler_type: str = option("linear", "linear, cosine, constant, ... as in transformers")
    warmup_steps: float = option(0.0, "steps of rising step size; below 1: a share of all steps")
    weight_decay: float = option(0.0, "of AdamW")
    trl: dict = option({}, "any further option of TRL's config for this stage, by its name")


STORES = (".db", ".sqlite", ".sqlite3")
TRAINED_ON = "trained_on.txt"  # hashes of the first user turns that a run was trained on


class Run:
    """One run of a program: its ranks, its folder, its tracker. `begin` makes one."""

    def __init__(self, program: str, config: RunConfig, world, tracker):
        self.program, self.config, self.world, self.tracker = program, config, world, tracker
        self.fingerprints: dict[str, str] = {}
        self.freezes: set[str] = set()
        self.trained_on: set[str] = set()

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(f"{self.program}: {text}", flush=True)

    def load(self, kind: type[Record], split: str | None, data: list[str] | None = None) -> list[Any]:
        """Records of one split; their fingerprint is kept for result.json."""
        from rlhf.data.load import fingerprint, load

        config = self.config
        records = load(
            self.frozen(data or config.data, kind),
            kind,
            split=split,
            half=config.half,
            validation_fraction=config.validation_fraction,
            test_fraction=config.test_fraction,
            limit=config.limit,
            on_bad=config.on_bad,
        )
        self.fingerprints[f"{kind.__name__.lower()}/{split or 'all'}"] = fingerprint(records)
        if split == "train":
            self.trained_on |= {prompt_group(record.prompt) for record in records}
            if self.world.is_main:  # `rlhf compare` leaves these prompts out, whatever it is asked to read
                text = "".join(f"{name}\n" for name in sorted(self.trained_on))
                (Path(config.output_dir) / TRAINED_ON).write_text(text)
        return records

    @property
    def torch_dtype(self) -> str:
        if self.config.dtype != "auto":
            return self.config.dtype
        if not getattr(self.config, "use_peft", True):
            return "float32"  # what is trained is kept in float32; the trainer computes in bfloat16 on a GPU
        return "bfloat16" if self.world.device.type == "cuda" else "float32"

    def frozen(self, sources: list[str], kind: type[Record]) -> list[str]:
        """The sources, each preference store as the file of pairs that it is now: votes that come in meanwhile change
        nothing. The main rank writes the file to output_dir/data/ once, and all ranks read that.

        Prompts of a store are those of its pairs, so that PPO learns on the prompts that DPO learns on; a store
        without votes gives all its prompts.
        """
        from rlhf.data.store import freeze, frozen

        result = []
        for source in sources:
            if Path(source).suffix in STORES:
                file = Path(self.config.output_dir) / "data" / f"{Path(source).stem}.jsonl"
                if source not in self.freezes:
                    if self.world.is_main:
                        freeze(source, file)
                    self.freezes.add(source)
                    self.world.barrier()
                if kind is not Prompt or frozen(file)["rows"]:
                    source = str(file)
            result.append(source)
        return result

    def finish(self, headline: dict[str, Any], budget: dict[str, float], **more: Any) -> None:
        """Write result.json and the model card, and close the tracker."""
        from rlhf.tracking import write_card

        result = {
            "program": self.program,
            "seed": self.config.seed,
            "headline": headline,
            "budget": budget,
            "data": self.fingerprints,
            **more,
        }
        if self.world.is_main:
            result = self.tracker.result(result)
            provenance = {"start": self.config.model_name_or_path, "data": ", ".join(self.config.data)}
            write_card(self.config.output_dir, self.program, options_dict(self.config), result, provenance)
        self.tracker.finish()
        self.world.barrier()
        self.say(f"done: {in_short(headline)} -> {self.config.output_dir}")


def begin(program: str, config: RunConfig) -> Run:
    """Join the ranks, claim the output folder, save the resolved options, seed everything, open the tracker.

    Raises UserError if the folder holds a finished run and overwrite_output_dir is not set.
    """
    from rlhf.models import quiet

    quiet()
    folder = Path(config.output_dir)
    if finished(folder) and not config.overwrite_output_dir:
        raise UserError(
            f"{folder} holds a finished run. Choose another --output_dir, or begin anew with "
            "--overwrite_output_dir true"
        )
    import numpy
    import torch

    from rlhf.distributed import start
    from rlhf.tracking import Tracker

    world = start()
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        options.save(config, folder / "config.yaml")
    random.seed(config.seed)
    numpy.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    tracker = Tracker(
        config.output_dir,
        report_to=config.report_to,
        project=config.project,
        run_name=config.run_name or config.output_dir,
        config={"program": program, **options_dict(config)},
        is_main=world.is_main,
    )
    return Run(program, config, world, tracker)


def finished(folder: Path) -> bool:
    file = folder / "result.json"
    try:
        return bool(json.loads(file.read_text()).get("finished"))
    except (OSError, ValueError):
        return False


def options_dict(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config)}


def load_start(run: Run):
    """The foundation that this run starts from. Raises UserError where it and the options do not fit."""
    from rlhf.models import load_foundation

    config = run.config
    foundation = load_foundation(config.model_name_or_path, run.torch_dtype, config.attn_implementation)
    if foundation.adapter_path and not getattr(config, "use_peft", True):
        raise UserError(
            f"use_peft is false, but {config.model_name_or_path} is an adapter. Train its whole weights from a merged "
            "run: launch/sft.py --merge true"
        )
    return foundation


def trl_arguments(cls: type, run: Run, held_out: bool, **fixed: Any) -> Any:
    """TRL's config for this run; `held_out` says whether there are rows to evaluate on. Raises UserError on an unknown
    name under `trl:`."""
    from rlhf.distributed import read_deepspeed_config

    config = run.config
    known = {f.name for f in fields(cls)}
    for name in config.trl:
        if name not in known:
            raise UserError(f"trl: '{name}' is no option of {cls.__name__}.{did_you_mean(name, known)}")
    values = {
        "output_dir": str(Path(config.output_dir) / "checkpoints"),
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": run.world.device.type == "cpu",
        "bf16": run.world.device.type == "cuda" and config.dtype in ("auto", "bfloat16"),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "deepspeed": read_deepspeed_config(config.deepspeed, run.world),
        "dataloader_pin_memory": run.world.device.type == "cuda",
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "eval_strategy": "steps" if config.eval_steps and held_out else "no",
        "eval_steps": config.eval_steps or None,
        "max_length": None,  # rows that are too long were dropped when they were encoded
    }
    shared = ("learning_rate", "max_grad_norm", "per_device_train_batch_size", "logging_steps", "num_train_epochs")
    shared += ("max_steps", "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay")
    values |= {name: getattr(config, name) for name in (*shared, "gradient_checkpointing")}
    values |= fixed | config.trl
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"TRL refuses these options: {error}") from None


def new_lora(config: AdapterConfig, task_type: str = "CAUSAL_LM"):
    """The LoRA settings of a new adapter, or None when the whole model is trained."""
    from rlhf.models import lora_config

    if not getattr(config, "use_peft", True):
        return None
    return lora_config(task_type, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules)


def evaluation(run: Run, foundation, scorer: Scorer | None, prompts: list[Prompt] | None = None):
    """The evaluation by sampling of this run on its validation prompts, or None when switched off or without any."""
    from rlhf.data.encode import encode_prompts
    from rlhf.engines.hf import Sampling
    from rlhf.evaluate import Evaluation
    from rlhf.models import head_is_plain, stop_ids

    config = run.config
    if config.eval_prompts < 1:
        return None
    prompts = run.load(Prompt, "validation", config.eval_data) if prompts is None else prompts
    prompts = sorted(prompts, key=lambda p: (p.group, str(p.prompt)))[: config.eval_prompts]
    if not prompts:
        run.say("no validation prompts: evaluation by sampling is off")
        return None
    return Evaluation(
        prompts=encode_prompts(prompts, foundation.tokenizer, config.max_prompt_length),
        tokenizer=foundation.tokenizer,
        stop_ids=stop_ids(foundation.tokenizer, foundation.model),
        sampling=Sampling(max_new_tokens=config.max_response_length, temperature=config.temperature),
        scorer=scorer,
        seed=config.seed,
        batch_size=config.generation_batch_size,
        plain_head=head_is_plain(foundation.model),
    )


def attach(trainer, budget, reference=None) -> None:
    """Count every training forward pass of the trainer's model in the budget (the reference's as forward only, also
    that of a `reference` model of its own), and take away the trainer's own printing: the tracker's console line
    stands for it."""
    import torch
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)

    def count(module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is None or not module.training or kwargs.get("past_key_values") is not None:
            return  # evaluation and generation are not what the run is made of
        (budget.train if torch.is_grad_enabled() else budget.forward)(int(mask.sum()))

    def count_reference(module, args, kwargs):
        if trainer.model.training and kwargs.get("attention_mask") is not None:
            budget.forward(int(kwargs["attention_mask"].sum()))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    if reference is not None:
        reference.register_forward_pre_hook(count_reference, with_kwargs=True)


def sampling_callback(run: Run, evaluate, policy, reference, budget=None):
    """A TRL callback: evaluates by sampling at step 0, every eval_steps and at the end; adds `budget/*` to each log.

    `policy` and `reference` are as `Evaluation.run` takes them. The last metrics stand in its `.last`.
    """
    from transformers import TrainerCallback

    from rlhf.distributed import gathered, peak_memory
    from rlhf.evaluate import sample_table, summarise

    class Sampler(TrainerCallback):
        def __init__(self):
            self.last: dict[str, float] = {}
            self.step = -1

        def _run(self, model, step: int) -> None:
            if evaluate is None or step == self.step:
                return
            self.step = step
            with gathered(model):
                rows = evaluate.run(model, policy, reference, run.world)
            self.last = summarise(rows)
            run.tracker.log(self.last, step)
            run.tracker.table("samples", sample_table(rows), step)
            run.say(f"step {step}: {in_short(self.last)}")

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self._run(model, state.global_step)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if run.config.eval_steps and state.global_step % run.config.eval_steps == 0:
                self._run(model, state.global_step)

        def on_train_end(self, args, state, control, model=None, **kwargs):
            self._run(model, state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if budget is not None and logs is not None:
                logs.update(total_budget(budget, run.world) | {"memory/peak": peak_memory(run.world.device)})

    return Sampler()


def total_budget(budget, world) -> dict[str, float]:
    """`budget/*` summed over ranks (seconds are the clock's)."""
    metrics = budget.metrics()
    for name in metrics:
        if name != "budget/seconds":
            metrics[name] = float(world.sum(float(metrics[name])))
    return metrics


def held_out_loss(trainer, run: Run) -> dict[str, float]:
    """The trainer's own evaluation on its held-out rows, under our names; logged by its callbacks."""
    from rlhf.tracking import rename_trl

    named = rename_trl(trainer.evaluate(), run.program)
    return {k: v for k, v in named.items() if k.startswith("eval/") and not k.startswith("eval/time")}


def frozen_copy(model, name: str):
    """Add adapter `name` as a frozen copy of the trainable one; a reference for a policy that goes on from it."""
    model.add_adapter(name, model.peft_config["default"])
    for parameter_name, parameter in list(model.named_parameters()):
        if ".default." in parameter_name:
            model.get_parameter(parameter_name.replace(".default.", f".{name}.")).data.copy_(parameter.data)


def reference_context(model, name: str = "reference"):
    """The context of the reference policy: the frozen copy where there is one, the bare base under a new adapter,
    None for a model trained whole."""
    from rlhf.models import use_adapter

    if not hasattr(model, "peft_config"):
        return None
    return lambda: use_adapter(model, name if name in model.peft_config else None)


def save_policy(run: Run, model, foundation, merge: bool = False) -> None:
    """Write weights (the adapter, or whole weights), tokenizer and rlhf.json to the output_dir; call on all ranks."""
    from rlhf.distributed import gathered
    from rlhf.models import write_identity

    folder = Path(run.config.output_dir)
    with gathered(model):
        if run.world.is_main:
            is_adapter = hasattr(model, "peft_config")
            if is_adapter and merge:
                model.set_adapter("default")
                model.merge_and_unload(adapter_names=["default"]).save_pretrained(folder)
            elif is_adapter:
                model.save_pretrained(folder, selected_adapters=["default"])
            else:
                model.save_pretrained(folder)
            foundation.tokenizer.save_pretrained(folder)
            if is_adapter and not merge:
                write_identity(folder, foundation, program=run.program)
    run.world.barrier()


def in_short(metrics: dict[str, Any]) -> str:
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


no_context = nullcontext  # the policy's context where the model already is the policy
