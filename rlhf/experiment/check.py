"""What can be known to be wrong before anything is started: files, planned commands, scorers,
models, rows, judges.
"""

import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.collect.sample import SampleConfig
from rlhf.compare.runs import hashes, identities
from rlhf.config import parse
from rlhf.data.encode import encode
from rlhf.data.records import Instruction, Preference, Prompt, prompt_group
from rlhf.data.sources import is_path, split_event
from rlhf.errors import UserError, near_file
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.measure import load_test_split
from rlhf.experiment.plan import plan
from rlhf.jobs.job import Job
from rlhf.judge.judges import load_judge
from rlhf.model.adapters import adapter_settings, add_adapter
from rlhf.model.files import adapter_base
from rlhf.model.from_gguf import as_folder
from rlhf.model.loading import InitialModel
from rlhf.model.tokenizer import load_tokenizer
from rlhf.model.weight_files import check_weights
from rlhf.offline.trainers import trl_arguments
from rlhf.options.programs import PROGRAMS
from rlhf.ranks.deepspeed_config import read_deepspeed_config
from rlhf.ranks.distributed import DistributedContext
from rlhf.runs.rows import RunData
from rlhf.runs.run import Run
from rlhf.sandbox.annotators import AnnotateConfig
from rlhf.stages import check_start, new_lora

# steps: a length that every program accepts, where the real one is not known yet
LONG = 10_000


@dataclass(frozen=True)
class PlannedProgram:
    """A training program of the plan with the options it will read, and the part of the experiment
    it belongs to.
    """

    part: str
    program: str
    options: Any


def check_files(config: ExperimentConfig) -> None:
    """Raise UserError for the first file or folder that is named and not there."""
    initial = Path(config.initial_policy)
    # owner/model is a name on the Hub, unless a folder of that owner is here
    is_hub_name = config.initial_policy.count("/") == 1 and not initial.parent.is_dir()
    if not initial.is_dir() and not is_hub_name:
        raise UserError(f"initial_policy {initial}: no such run{near_file(initial)}")

    sources = [
        *config.pairs.get("data", []),
        *config.pairs.get("prompts", []),
        *config.prompts,
        *chain.from_iterable(config.perplexity.values()),
    ]
    for source in sources:
        # names on the Hub are checked when their rows are read
        if is_path(source):
            _require_file(source, Path(split_event(source)[0]).expanduser())
    for part in (config.reward, config.train_referee, *config.methods.values()):
        if part.get("config"):
            _require_file(part["config"], Path(part["config"]))
    for name in ("sample", "annotate"):
        if config.pairs.get(name):
            _require_file(config.pairs[name], Path(config.pairs[name]))


def _require_file(name: str, file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{name}: no such file{near_file(name)}")


def check_programs(config: ExperimentConfig) -> list[PlannedProgram]:
    """Read every planned command as its program will; return the training programs, one for each
    part.

    Raises UserError naming the part that is refused.
    """
    by_kind: dict[str, type] = {"sample": SampleConfig, "annotate": AnnotateConfig}
    programs: dict[str, PlannedProgram] = {}
    for job in plan(config, dict.fromkeys(config.trained, LONG)):
        part = part_of(job)
        trains = job.program != "rlhf"
        try:
            if trains:
                program = job.program.removeprefix("launch.")
                options = parse(PROGRAMS[program], job.arguments, f"deepspeed launch/{program}.py")
                programs.setdefault(part, PlannedProgram(part, program, options))
            elif job.kind in by_kind:
                group, command, *flags = job.arguments
                parse(by_kind[job.kind], flags, f"rlhf {group} {command}")
        except UserError as error:
            raise UserError(f"{part}: {str(error).removeprefix('the command line: ')}") from None
    return list(programs.values())


def part_of(job: Job) -> str:
    """Return the part of the experiment's file that a job belongs to."""
    return f"methods: '{job.method}'" if job.method else job.kind


def check_starts(
    config: ExperimentConfig,
    programs: list[PlannedProgram],
    check_scorers: Callable[..., None],
) -> None:
    """Raise UserError where a program would refuse its start, or a split or half that is used is
    left without rows.

    `programs`: what `check_programs` returns. `check_scorers(specs, made_later)` refuses scorers
    that cannot be made. Models are built without weights, and only whether the files are whole is
    checked.
    """
    for name in ("gold", "referee", "others"):
        # those without a name are told apart by their number
        specs = [{"name": f"{name}{i}", **spec} for i, spec in enumerate(getattr(config, name))]
        if specs:
            check_scorers(specs)
    # the reward models of the seeds are there only later
    made_later = {f"{config.output_dir}/seed-{seed}/reward" for seed in config.seeds}
    # the rows that were read, and the prompts among them
    trained_on: dict[str, set[str]] = {}
    for planned in programs:
        try:
            for name in ("reward", "eval_scorers"):
                specs = getattr(planned.options, name, None)
                if specs:
                    check_scorers(specs, made_later)
            check_model(planned.program, planned.options)
            check_rows(planned.program, planned.options, config.pairs.get("prompts"), trained_on)
        except UserError as error:
            raise UserError(f"{planned.part}: {error}") from None
    check_measured(config, set().union(*trained_on.values()))


def check_model(program: str, options: Any) -> None:
    """Raise UserError where the start and the options do not fit each other, the libraries or the
    machine.
    """
    path = options.model_name_or_path
    tokenizer = load_tokenizer(path)
    adapter = path if (Path(path) / "adapter_config.json").is_file() else None
    if adapter:
        adapter_settings(adapter)
    base = adapter_base(adapter) if adapter else path
    # an adapter and its base may lie in two folders
    for folder in {path, base}:
        check_weights(folder)
    try:
        with torch.device("meta"):
            settings = AutoConfig.from_pretrained(as_folder(base))
            model = AutoModelForCausalLM.from_config(
                settings, attn_implementation=options.attn_implementation
            )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{base}: no model could be built ({str(error).strip().splitlines()[0]})"
        ) from None
    check_start(program, options, model, adapter)
    # whether the row of EOS was ever trained cannot be seen without weights
    run = Run(program, replace(options, train_eos="never"), DistributedContext())
    lora = new_lora(run, InitialModel(model, tokenizer, path, base, adapter, ""))
    # a start that is an adapter is trained on, without a second one
    if lora and not adapter:
        add_adapter(model, lora)
    read_deepspeed_config(options.deepspeed, DistributedContext(launched=True), options)
    # TRL checks its own options when they are made
    if program != "ppo":
        cls = {"sft": trl.SFTConfig, "reward": trl.RewardConfig, "dpo": trl.DPOConfig}[program]
        trl_arguments(cls, run, has_held_out=True)


def check_rows(
    program: str, options: Any, sampled_from: list[str] | None, seen: dict[str, set[str]]
) -> None:
    """Raise UserError where training or validation is left without rows, in the half that the
    program reads.

    `sampled_from`: the prompts, where the pairs are still to be sampled.
    """
    # pairs that are still to be sampled can only be judged by their prompts
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
        # trials of a method read the same rows
        if key in seen:
            continue
        # a store is frozen there
        with tempfile.TemporaryDirectory() as folder:
            # without a log: the program itself will say what it drops
            read = RunData(
                replace(options, output_dir=folder), DistributedContext(), log=lambda text: None
            )
            rows = read.rows(kind, split, tokenizer, data)
        seen[key] = read.trained_on
        # of train they are required already
        if not rows:
            half = "" if options.half == "all" else f" of half {options.half}"
            raise UserError(
                f"{', '.join(data or options.data)}: no {what} is left for the {split} split{half}. Give more data or "
                "a larger validation_fraction, or 0 to do without"
            )


def check_measured(config: ExperimentConfig, trained_on: set[str]) -> None:
    """Raise UserError where too little is left to measure on: test prompts that no method trains
    on, texts.
    """
    tokenizer = load_tokenizer(config.initial_policy)

    def rows(kind: type, data: list[str], longest: int | None) -> list[dict[str, Any]]:
        records = load_test_split(config, data, kind)
        return encode(records, tokenizer, config.max_prompt_length, longest, config.on_error)[0]

    # SFT's own prompts count as seen too
    known = trained_on | hashes(config.initial_policy)
    groups = set()
    for row in rows(Prompt, config.prompts, None):
        if prompt_group(row["record"].prompt) not in known:
            groups.add(row["record"].group)
    if len(groups) < 2:
        raise UserError(
            f"prompts {', '.join(config.prompts)}: {len(groups)} groups of the test split are short enough and trained "
            "on by no method, and intervals need at least 2. Give more prompts, or a larger test_fraction"
        )
    for name, data in config.perplexity.items():
        if not rows(Instruction, data, config.max_response_length):
            raise UserError(
                f"perplexity: '{name}' has no row in the test split that is short enough (split: test)"
            )


def check_decisions(config: ExperimentConfig) -> None:
    """Raise UserError if what is to decide is what a method learns from, or cannot be asked, or
    nothing can start.
    """
    learnt: dict[Any, str] = {}
    for name in config.trained:
        for spec in config.method_specs[name].options.get("reward") or []:
            if spec.get("weight", 1.0):
                learnt |= dict.fromkeys(identities(spec), name)
    for option in ("gold", "referee"):
        for spec in getattr(config, option):
            for identity in identities(spec):
                if identity in learnt:
                    raise UserError(
                        f"{option} {spec}: '{learnt[identity]}' learns from it, so it cannot decide; list it in "
                        "'others'"
                    )
    if config.judge:
        load_judge(config.judge)
    first = shlex.split(config.launcher)[0]
    # where a virtual environment that is not active keeps it
    beside = Path(sys.executable).parent / first
    if first != "python" and not beside.is_file() and shutil.which(first) is None:
        raise UserError(
            f"launcher: there is no program '{first}' here; for example: deepspeed --num_accelerators 1"
        )
