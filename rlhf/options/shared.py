"""The options that the programs share."""

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rlhf.config import SEED, option
from rlhf.data.split import check_fractions
from rlhf.errors import UserError, did_you_mean
from rlhf.http_client import check_url

# optimizers of bitsandbytes with moments in 8 bits, by transformers' names
EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit")


@dataclass(kw_only=True)
class ModelOptions:
    """The model and its precision."""

    model_name_or_path: str = option(
        help="the model to start from: a Hub name, a folder of weights, a GGUF file, or an adapter"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = option(
        "auto",
        "dtype of the base model; auto is bfloat16 on a GPU and float32 elsewhere. PPO's adapters stay in float32",
    )
    attn_implementation: str | None = option(
        None,
        "sdpa, eager, flash_attention_2, ...; default: that of the initial model, else sdpa where the model has it",
    )
    load_in_4bit: bool = option(
        False,
        "keep the frozen base in 4 bits (NF4) under the adapter: about a quarter of the memory of bfloat16, and slower",
    )
    load_in_8bit: bool = option(
        False, "keep the frozen base in 8 bits under the adapter: half the memory of bfloat16"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations: less memory, about a third more time"
    )
    deepspeed: str = option(
        "zero2",
        "DeepSpeed JSON, or zero0, zero2, zero3, zero3_offload; used under the `deepspeed` launcher",
    )
    hang_timeout: float = option(
        1200.0,
        "of several ranks: seconds at one place after which a rank counts as hanging, is named, and all end with exit "
        "code 4; 0: never",
        resume="free",
        low=0,
    )


@dataclass(kw_only=True)
class DataOptions:
    """The data."""

    data: list[str] = option(
        help="files (.jsonl .json .csv .parquet), preference stores (.db) or Hub names"
    )
    aggregate: Literal["each", "majority", "skill"] = option(
        "each",
        "how votes in a store become pairs: each vote for a side, or one label a pair by majority or by skill",
    )
    half: Literal["all", "a", "b"] = option(
        "all", "train on one half of the groups, so that a referee can learn from the other"
    )
    validation_fraction: float = option(
        0.05, "share of groups held out for evaluation while training", low=0, high=1
    )
    test_fraction: float = option(
        0.1, "share of groups held out for `rlhf compare`; no program reads them", low=0, high=1
    )
    limit: int | None = option(
        None, "read only this many rows of the data, selected by the hash of their group", low=1
    )
    on_error: Literal["stop", "skip"] = option(
        "stop", "what to do with rows that cannot be used", old_name="on_bad"
    )
    max_dropped: float = option(
        0.5,
        "stop if more than this share of the training rows is dropped; 1: never",
        resume="free",
        low=0,
        high=1,
    )
    max_prompt_length: int = option(
        512, "tokens; rows with longer prompts are dropped and counted", low=1
    )
    max_response_length: int = option(
        512, "tokens with EOS; longer responses are dropped and counted, or cut off in PPO", low=1
    )


@dataclass(kw_only=True)
class OptimizerOptions:
    """Optimization."""

    seed: int = option(0, "run seed: data order, initial adapters, sampling", **SEED)
    learning_rate: float = option(1e-4, "peak step size of AdamW", above=0, high=1)
    optim: str = option(
        "adamw",
        "adamw, or adamw_8bit: moments in 8 bits (bitsandbytes); through TRL also any of transformers' optimizers",
    )
    max_grad_norm: float = option(1.0, "gradients are clipped to this joint norm", above=0)
    per_device_train_batch_size: int = option(
        8, "rows in one forward and backward pass on each device", low=1
    )


@dataclass(kw_only=True)
class OutputOptions:
    """Output and checkpoints."""

    output_dir: str = option(
        help="the folder for weights, metrics, configuration and result", resume="free"
    )
    overwrite_output_dir: bool = option(
        False, "start over in a folder that holds a run", resume="free"
    )
    resume: str = option(
        "auto",
        "auto: from the newest complete checkpoint in output_dir; never; or the folder of one",
        resume="free",
    )
    save_steps: int = option(
        100,
        "save a checkpoint every this many steps, with each evaluation and at the end",
        resume="free",
        low=0,
    )
    save_total_limit: int = option(
        2, "keep this many of the newest checkpoints, and the best", resume="free", low=1
    )


@dataclass(kw_only=True)
class LoggingOptions:
    """Evaluation and logging."""

    eval_steps: int = option(
        0, "evaluate every this many steps; 0: only at the start and the end", resume="free", low=0
    )
    logging_steps: int = option(10, "write metrics every this many steps", resume="free", low=1)
    report_to: Literal["none", "wandb"] = option(
        "none", "wandb: offline when no key is set", resume="free"
    )
    project: str | None = option(
        None, "W&B project; default: WANDB_PROJECT, else rlhf", resume="free"
    )
    run_name: str | None = option(
        None, "W&B name; default: WANDB_NAME, else the last part of output_dir", resume="free"
    )


@dataclass(kw_only=True)
class RunConfig(ModelOptions, DataOptions, OptimizerOptions, OutputOptions, LoggingOptions):
    """Options of every program."""

    def validate(self) -> None:
        check_fractions(self.validation_fraction, self.test_fraction)
        check_output_dir(self.output_dir)
        check_quantization(self)
        check_attention(self.attn_implementation)
        require_bitsandbytes(self.optim in EIGHT_BIT, f"optim {self.optim}")
        if self.optim in EIGHT_BIT and self.dtype == "float64":
            raise UserError(f"'optim' {self.optim} does not go with dtype float64. Take float32")
        for name, value in vars(self).items():
            if name not in ("output_dir", "resume", "run_name", "project"):
                check_apart(name, value, self.output_dir)


def quantization_of(config: Any) -> str | None:
    """Return how a program's options keep the base: "nf4", "int8", or None for whole weights."""
    if config.load_in_4bit:
        return "nf4"
    return "int8" if config.load_in_8bit else None


def check_quantization(config: Any) -> None:
    """Raise UserError where options ask for a quantised base and for what it cannot be."""
    if config.load_in_4bit and config.load_in_8bit:
        raise UserError("'load_in_4bit' and 'load_in_8bit' are both true. Set one of them")
    method = quantization_of(config)
    if method is None:
        return
    name = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
    if not getattr(config, "use_peft", True):
        raise UserError(
            f"'{name}' is true and 'use_peft' false: a quantised base is frozen, so its whole weights cannot be "
            "trained. Set one of them otherwise"
        )
    if config.dtype == "float64":
        raise UserError(f"'{name}' does not go with dtype float64. Take float32 or bfloat16")
    require_bitsandbytes(method == "nf4", name)


def require_bitsandbytes(is_needed: bool, option: str) -> None:
    """Raise UserError where an option needs bitsandbytes and it is not installed."""
    if is_needed and find_spec("bitsandbytes") is None:
        raise UserError(
            f"'{option}' needs bitsandbytes, which is not installed. Install it with: pip install 'rlhf[quant]'"
        )


# transformers' own kinds of attention, and the packages that one needs
ATTENTION = {
    **dict.fromkeys(("sdpa", "eager", "flex_attention")),
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn",
}


def check_attention(name: str | None) -> None:
    """Raise UserError for a kind of attention that transformers does not have, or lacks a package for.

    A name with a slash is a kernel on the Hub.
    """
    if name is None or "/" in name:
        return
    if name not in ATTENTION:
        near = did_you_mean(name, ATTENTION)
        raise UserError(
            f"'attn_implementation' is '{name}', expected one of {', '.join(ATTENTION)}.{near}"
        )
    package = ATTENTION[name]
    # transformers takes its kernels from the Hub instead
    if package and not any(map(find_spec, (package, "kernels"))):
        raise UserError(
            f"'attn_implementation' {name} cannot be used here: the package {package} is not installed. Choose "
            "another, for example: --attn_implementation sdpa"
        )


def check_output_dir(path: str) -> None:
    """Raise UserError unless `path` is a folder that can be written, or can become one."""
    folder = Path(path).resolve()
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not existing.is_dir():
        raise UserError(
            f"output_dir '{path}': {existing} is not a folder. Choose another --output_dir"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir '{path}': {existing} cannot be written. Choose another --output_dir"
        )


def check_apart(name: str, value: Any, output_dir: str) -> None:
    """Raise UserError if option `name` reads, anywhere in `value`, the output_dir or something
    inside it.

    A run replaces what is in its output_dir, and inputs are never written.
    """
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            check_apart(name, item, output_dir)
    if not isinstance(value, str):
        return
    # a preference store may be named at one of its events: votes.db@118
    file = re.sub(r"@\d+$", "", value)
    if os.path.exists(file) and Path(file).resolve().is_relative_to(Path(output_dir).resolve()):
        raise UserError(
            f"'{name}' reads {value}, which is inside output_dir {output_dir}: the run would overwrite its own input. "
            "Choose another --output_dir"
        )


# Which sampling noise a token is drawn with (rlhf.engines.sampling): 1 until 2026-11. Raise it with
# any change that gives a token another noise. A run records it and does not go on with another.
NOISE_VERSION = 2


@dataclass(kw_only=True)
class SamplingConfig(RunConfig):
    """Evaluation by sampling."""

    eval_data: list[str] | None = option(
        None, "prompts for evaluation by sampling; default: those of the data", resume="free"
    )
    eval_prompts: int = option(
        64,
        "sample responses to this many validation prompts, selected by the hash of their group; 0: never",
        resume="free",
        low=0,
    )
    eval_scorers: list[dict] = option(
        [], "evaluation-only scorers, e.g. [{voice: configs/voices/outdoor.yaml}]", resume="free"
    )
    temperature: float = option(1.0, "sampling temperature, in training and evaluation", above=0)
    generation_batch_size: int = option(
        64, "responses generated together on each device", resume="free", low=1
    )
    vllm_url: str | None = option(
        None,
        "sample from a vLLM server, e.g. http://localhost:8000 (experimental, see docs/models.md); "
        "default: in this process",
        resume="free",
    )

    def validate(self) -> None:
        super().validate()
        if self.vllm_url is None:
            return
        check_url(self.vllm_url, "'vllm_url'")
        if not getattr(self, "use_peft", True):
            raise UserError(
                "'vllm_url': adapters are handed over to the server, not whole weights. Set use_peft: true, or sample "
                "in this process"
            )


@dataclass(kw_only=True)
class AdapterConfig:
    """The LoRA adapter."""

    lora_r: int = option(
        16, "rank of a new adapter; an adapter that is trained further keeps its own", low=1
    )
    lora_alpha: int = option(32, "the adapter is scaled by alpha / r", low=1)
    lora_dropout: float = option(
        0.0,
        "dropout on the adapter's input in SFT and reward model, and on a new adapter in DPO; PPO has none",
        low=0,
        below=1,
    )
    lora_target_modules: list[str] = option(["all-linear"], "modules that get an adapter")
    train_eos: Literal["auto", "always", "never"] = option(
        "auto",
        "train the EOS token's row of the output head beside LoRA; auto: where it was never trained, by the row itself "
        "and, in SFT and DPO, by P(EOS) where given answers end",
    )
