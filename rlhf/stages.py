"""What the programs share: their common options, and how a run begins, reads, evaluates and ends."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rlhf import config as options
from rlhf.config import UserError, option
from rlhf.data.records import Prompt, Record, Scorer, digest, prompt_group


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
        counts = ("max_prompt_length", "max_response_length", "per_device_train_batch_size", "logging_steps")
        for name in (*counts, "generation_batch_size"):
            if getattr(self, name, 1) < 1:
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
                name = f"{Path(source).stem}-{digest(str(Path(source).resolve()))[:6]}.jsonl"  # stores may share a name
                file = Path(self.config.output_dir) / "data" / name
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


def total_budget(budget, world) -> dict[str, float]:
    """`budget/*` summed over ranks (seconds are the clock's)."""
    metrics = budget.metrics()
    for name in metrics:
        if name != "budget/seconds":
            metrics[name] = float(world.sum(float(metrics[name])))
    return metrics


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
