"""What can be known to be wrong before anything is started: every planned command, scorer and judge is looked at."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.config import UserError, parse
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.plan import plan

LONG = 10_000  # steps: a length that every program accepts, where the real one is not known yet


def check_programs(config: ExperimentConfig) -> dict[str, tuple[str, Any]]:
    """Read every planned command as its program will; return part of the file -> (training program, its options).

    Raises UserError naming the part that is refused.
    """
    from rlhf.collect.sample import SampleConfig
    from rlhf.sandbox.annotators import AnnotateConfig

    classes: dict[str, type] = {"rlhf collect sample": SampleConfig, "rlhf sandbox annotate": AnnotateConfig}
    started: dict[str, tuple[str, Any]] = {}
    for job in plan(config, {name: LONG for name in config.trained}):
        trains = job.command[0].startswith("launch/")
        program = Path(job.command[0]).stem if trains else " ".join(job.command[:3])
        if trains and program not in classes:
            classes[program] = options_class(program)
        if program not in classes:
            continue
        method = job.trial[0] if job.trial else job.name.removeprefix("pilot/")
        part = f"methods: '{method}'" if method in config.methods else re.sub(r"^seed-\d+/", "", job.name)
        where = f"deepspeed launch/{program}.py" if trains else program
        try:
            options = parse(classes[program], job.command[1 if trains else 3 :], where)
        except UserError as error:
            raise UserError(f"{part}: {str(error).removeprefix('the command line: ')}") from None
        if trains:
            started.setdefault(part, (program, options))
    return started


def check_starts(
    config: ExperimentConfig, started: dict[str, tuple[str, Any]], check_scorers: Callable[..., None]
) -> None:
    """Raise UserError where a program would refuse its start, or a split or half that is used is left without rows.

    `started`: what `check_programs` returns. `check_scorers(specs, made_later)` refuses scorers that cannot be made.
    Models are built without weights, of which it is only seen whether the files are whole.
    """
    for name in ("gold", "referee", "others"):
        specs = [{"name": f"{name}{i}", **spec} for i, spec in enumerate(getattr(config, name))]
        if specs:
            check_scorers(specs)
    seen: dict[str, set[str]] = {}  # the rows that were looked at, and the prompts that they train on
    for part, (program, options) in started.items():
        try:
            made = {f"{config.output_dir}/seed-{seed}/reward" for seed in config.seeds}
            for specs in (getattr(options, "reward", None), getattr(options, "eval_scorers", None)):
                if specs:
                    check_scorers(specs, made)
            check_model(program, options)
            check_rows(program, options, config.pairs.get("prompts"), seen)
        except UserError as error:
            raise UserError(f"{part}: {error}") from None
    check_measured(config, set().union(*seen.values()))


def check_model(program: str, options: Any) -> None:
    """Raise UserError where the start and the options do not fit each other, the libraries or the machine."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf.adapters import adapter_base, adapter_settings, add_adapter
    from rlhf.deepspeed_config import read_deepspeed_config
    from rlhf.distributed import DistributedContext
    from rlhf.files import check_weights
    from rlhf.models import InitialModel
    from rlhf.offline.trainers import trl_arguments
    from rlhf.runs.run import Run
    from rlhf.stages import check_start, new_lora
    from rlhf.tokenizer import load_tokenizer

    path = options.model_name_or_path
    tokenizer = load_tokenizer(path)
    adapter = path if (Path(path) / "adapter_config.json").is_file() else None
    if adapter:
        adapter_settings(adapter)
    base = adapter_base(adapter) if adapter else path
    for folder in {path, base}:
        check_weights(folder)
    try:
        with torch.device("meta"):
            settings = AutoConfig.from_pretrained(base)
            model = AutoModelForCausalLM.from_config(settings, attn_implementation=options.attn_implementation)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{base}: no model could be built ({str(error).strip().splitlines()[0]})") from None
    check_start(program, options, model, adapter)
    # whether the row of EOS was ever trained cannot be seen without weights
    run = Run(program, replace(options, train_eos="never"), DistributedContext())
    lora = new_lora(run, InitialModel(model, tokenizer, path, base, adapter, ""))
    if lora and not adapter:
        add_adapter(model, lora)
    read_deepspeed_config(options.deepspeed, DistributedContext(launched=True), options)
    if program != "ppo":
        import trl

        cls = {"sft": trl.SFTConfig, "reward": trl.RewardConfig, "dpo": trl.DPOConfig}[program]
        trl_arguments(cls, run, True)


def check_rows(program: str, options: Any, sampled_from: list[str] | None, seen: dict[str, set[str]]) -> None:
    """Raise UserError where training or validation is left without rows, in the half that the program reads.

    `sampled_from`: the prompts, where the pairs are still to be sampled.
    """
    from rlhf.data.records import Instruction, Preference, Prompt
    from rlhf.distributed import DistributedContext
    from rlhf.runs.rows import RunData
    from rlhf.tokenizer import load_tokenizer

    kind = Prompt if program == "ppo" or sampled_from else Preference
    wanted = [(kind, "train", sampled_from), (kind, "validation", sampled_from)]
    if getattr(options, "ptx_data", None):
        wanted.append((Instruction, "train", options.ptx_data))
    tokenizer = load_tokenizer(options.model_name_or_path)
    for kind, split, data in wanted:
        if split == "validation" and not options.validation_fraction:
            continue
        what = kind.__name__.lower()
        key = f"{what} {split} {options.half} {data or options.data} {options.model_name_or_path}"
        if key in seen:
            continue
        with tempfile.TemporaryDirectory() as folder:  # a store is frozen there
            # without a log: the program itself will say what it drops
            read = RunData(replace(options, output_dir=folder), DistributedContext(), log=lambda text: None)
            rows = read.rows(kind, split, tokenizer, data)
        seen[key] = read.trained_on
        if not rows:  # of train they are required already
            half = "" if options.half == "all" else f" of half {options.half}"
            raise UserError(
                f"{', '.join(data or options.data)}: no {what} is left for the {split} split{half}. Give more data or "
                "a larger validation_fraction, or 0 to do without"
            )


def check_measured(config: ExperimentConfig, trained_on: set[str]) -> None:
    """Raise UserError where too little is left to measure on: test prompts that no method trains on, texts."""
    from rlhf.compare.measure import hashes
    from rlhf.data.encode import encode
    from rlhf.data.load import load
    from rlhf.data.records import Instruction, Prompt, prompt_group
    from rlhf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.foundation)
    given = {"split": "test", "on_error": config.on_error, "validation_fraction": config.validation_fraction}

    def rows(kind: type, data: list[str], longest: int | None) -> list[dict[str, Any]]:
        records = load(data, kind, **given, test_fraction=config.test_fraction)
        return encode(records, tokenizer, config.max_prompt_length, longest, config.on_error)[0]

    known = trained_on | hashes(config.foundation)
    prompts = [row["record"] for row in rows(Prompt, config.prompts, None)]
    groups = {record.group for record in prompts if prompt_group(record.prompt) not in known}
    if len(groups) < 2:
        raise UserError(
            f"prompts {', '.join(config.prompts)}: {len(groups)} groups of the test split are short enough and trained "
            "on by no method, and intervals need at least 2. Give more prompts, or a larger test_fraction"
        )
    for name, data in config.perplexity.items():
        if not rows(Instruction, data, config.max_response_length):
            raise UserError(f"perplexity: '{name}' has no row in the test split that is short enough (split: test)")


def check_decisions(config: ExperimentConfig) -> None:
    """Raises UserError if what is to decide is what a method learns from, or cannot be asked, or nothing can start."""
    from rlhf.compare.measure import identities

    learnt: dict[Any, str] = {}
    for name in config.trained:
        for spec in config.methods[name].get("options", {}).get("reward") or []:
            if spec.get("weight", 1.0):
                learnt |= {identity: name for identity in identities(spec)}
    for option in ("gold", "referee"):
        for spec in getattr(config, option):
            taken = [learnt[identity] for identity in identities(spec) if identity in learnt]
            if taken:
                raise UserError(
                    f"{option} {spec}: '{taken[0]}' learns from it, so it cannot decide; list it in 'others'"
                )
    if config.judge:
        from rlhf.compare.judge import load_judge

        load_judge(config.judge)
    first = shlex.split(config.launcher)[0]
    beside = Path(sys.executable).parent / first  # where a virtual environment that is not active keeps it
    if first != "python" and not beside.is_file() and shutil.which(first) is None:
        raise UserError(f"launcher: there is no program '{first}' here; for example: deepspeed --num_accelerators 1")


def options_class(program: str) -> type:
    """Return the options class of the program launch/PROGRAM.py."""
    from rlhf.options.offline import DPORunConfig, RewardRunConfig, SFTRunConfig
    from rlhf.options.ppo import PPOConfig

    return {"sft": SFTRunConfig, "reward": RewardRunConfig, "dpo": DPORunConfig, "ppo": PPOConfig}[program]
