"""Does `rlhf plan` know how much memory a run takes? The peak of the programs beside the plan.

    python -m benchmarks.memory.plan            # all cells, three minutes of one core; resumes by cell
    python -m benchmarks.memory.plan CELL ...   # these again

Each cell is a whole program on a model of 1.8 million weights, on rows that all have the greatest
length. Measured are the bytes that torch's allocator has given out at most (its events, by
torch.profiler), from the loaded model to the end of training, with the model's own. The process's
resident set would count libraries, Python's objects and what the heap keeps free, which are no part
of a plan and as large as such a model; the allocator counts the tensors alone, so that a small
model shows what a large one does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.paths import RESULTS

RESULT = RESULTS / "plan-memory.json"
PAGE = RESULTS / "2026-11-29-plan.md"
BOUND = 0.1
WORDS = ("lamp", "chair", "parcel", "refund", "order", "team", "help", "today", "red", "blue")
SHAPE = {
    "vocab_size": 4000, "hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 4,
    "num_attention_heads": 10, "num_key_value_heads": 5, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "bos_token_id": None,
}  # fmt: skip
SHARED = {"eval_prompts": 4, "max_steps": 2, "save_steps": 1000, "logging_steps": 1, "limit": 60}
WHOLE = {"use_peft": False, "learning_rate": 1e-5}
CHECKPOINTED = {"gradient_checkpointing": True}
PPO = {
    "rollout_batch_size": 16, "total_episodes": 32, "num_ppo_epochs": 1, "save_steps": 1000,
    "eval_prompts": 4, "limit": 60,
    "generation_batch_size": 16, "missing_eos_score": None,
}  # fmt: skip
RULE = {"reward": [{"rule": "length", "low": 5, "high": 60}]}
MODEL_SCORES = {"reward": [{"model": "RUNS/reward lora"}]}

# name -> program, ranks, kind of model, options; those that others start from come first
CELLS: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "sft lora": ("sft", 1, "llama", {"per_device_train_batch_size": 6}),
    "sft lora checkpointing": (
        "sft", 1, "llama", {"per_device_train_batch_size": 12, **CHECKPOINTED}
    ),
    "sft lora dropout": (
        "sft", 1, "llama", {"per_device_train_batch_size": 4, "lora_dropout": 0.1, "lora_r": 64}
    ),
    "sft lora 4 bits": ("sft", 1, "llama", {"per_device_train_batch_size": 6, "load_in_4bit": True}),
    "sft lora bfloat16": (
        "sft", 1, "llama", {"per_device_train_batch_size": 12, "dtype": "bfloat16"}
    ),
    "sft whole": ("sft", 1, "llama", {"per_device_train_batch_size": 4, **WHOLE}),
    "sft whole checkpointing accumulation": (
        "sft", 1, "llama",
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, **WHOLE,
         **CHECKPOINTED},
    ),
    "sft gpt2 eager": (
        "sft", 1, "gpt2", {"per_device_train_batch_size": 4, "attn_implementation": "eager"}
    ),
    "sft whole two ranks ZeRO 2": (
        "sft", 2, "llama", {"per_device_train_batch_size": 4, "deepspeed": "FOLDER/zero2.json", **WHOLE}
    ),
    "sft lora two ranks ZeRO 3": (
        "sft", 2, "llama", {"per_device_train_batch_size": 4, "deepspeed": "FOLDER/zero3.json"}
    ),
    "reward lora": ("reward", 1, "llama", {"per_device_train_batch_size": 4}),
    "reward whole checkpointing": (
        "reward", 1, "llama", {"per_device_train_batch_size": 6, **WHOLE, **CHECKPOINTED}
    ),
    "dpo lora": ("dpo", 1, "llama", {"per_device_train_batch_size": 3}),
    "dpo whole": ("dpo", 1, "llama", {"per_device_train_batch_size": 2, **WHOLE}),
    "dpo lora checkpointing qwen3": (
        "dpo", 1, "qwen3", {"per_device_train_batch_size": 6, **CHECKPOINTED}
    ),
    "ppo own critic": ("ppo", 1, "llama", {**PPO, **RULE}),
    "ppo reward critic": ("ppo", 1, "llama", {**PPO, **MODEL_SCORES, "micro_batch_tokens": 1600}),
    "ppo own critic checkpointing": (
        "ppo", 1, "llama", {**PPO, **RULE, "micro_batch_tokens": 3200, **CHECKPOINTED}
    ),
    "ppo sampling": (
        "ppo", 1, "llama",
        {**PPO, **RULE, "micro_batch_tokens": 128, "rollout_batch_size": 64,
         "total_episodes": 128, "generation_batch_size": 64},
    ),
    "ppo two ranks ZeRO 2": (
        "ppo", 2, "llama", {**PPO, **RULE, "deepspeed": "FOLDER/zero2.json"}
    ),
    "ppo whole": ("ppo", 1, "llama", {**PPO, **RULE, **WHOLE, "micro_batch_tokens": 1600}),
    "ppo whole bfloat16": (
        "ppo", 1, "llama",
        {**PPO, **RULE, **WHOLE, "micro_batch_tokens": 1600, "dtype": "bfloat16"},
    ),
    "ppo whole two ranks ZeRO 2": (
        "ppo", 2, "llama",
        {**PPO, **RULE, **WHOLE, "micro_batch_tokens": 1600, "deepspeed": "FOLDER/zero2.json"},
    ),
    "ppo whole two ranks ZeRO 3": (
        "ppo", 2, "llama",
        {**PPO, **RULE, **WHOLE, "micro_batch_tokens": 1600, "deepspeed": "FOLDER/zero3.json"},
    ),
}  # fmt: skip
LENGTHS = {"max_prompt_length": 96, "max_response_length": 32}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}  # fmt: skip
os.environ |= ENVIRONMENT

# they read the environment
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.result_rows import add_rows  # noqa: E402
from rlhf import stages  # noqa: E402
from rlhf.model.quantized import weight_memory  # noqa: E402
from rlhf.offline import trainers  # noqa: E402
from rlhf.plan.ledger import size_of  # noqa: E402
from rlhf.text import markdown_table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cells", nargs="*", metavar="CELL")
    parser.add_argument("--results", type=Path, default=RESULT)
    parser.add_argument("--page", action="store_true", help="write the page and rows, no more")
    options = parser.parse_args()
    found = json.loads(options.results.read_text()) if options.results.is_file() else {}
    if options.page:
        write_page(found)
        return
    wanted = options.cells or [name for name in CELLS if name not in found]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RLHF_CACHE"] = str(Path(folder) / "cache")
        write_inputs(Path(folder))
        for name in wanted:
            found[name] = run_cell(name, Path(folder)) | planned(name, Path(folder))
            options.results.write_text(json.dumps(found, indent=1) + "\n")
            print(line(name, found[name]), flush=True)


def line(name: str, cell: dict[str, Any]) -> str:
    measured, plan = cell["measured"], cell["planned"]
    parts = {name: round(sum(p.values()) / 2**20, 1) for name, p in cell["phases"].items()}
    return (
        f"{name}: planned {plan / 2**20:.1f} MiB, measured {measured / 2**20:.1f}, "
        f"{plan / measured - 1:+.1%}; {parts}; {cell['cpu']:.0f} CPU s"
    )


def write_page(found: dict[str, Any]) -> None:
    """Write the table of plan and measurement, and its rows of results."""
    lines = []
    for name, cell in found.items():
        plan, measured = cell["planned"], cell["measured"]
        sizes = {phase: sum(parts.values()) for phase, parts in cell["phases"].items()}
        fullest = max(sizes, key=sizes.__getitem__)
        error = plan / measured - 1
        held = "yes" if abs(error) <= BOUND else "**no**"
        numbers = (f"{plan / 2**20:.1f}", f"{measured / 2**20:.1f}", f"{error:+.1%}")
        lines.append((name, fullest, *numbers, held))
    names = ("program and options", "fullest phase", "planned, MiB", "measured", "error", "held")
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition("<!-- table -->")
    table = "\n".join(markdown_table(names, lines, right=[2, 3, 4]))
    PAGE.write_text(
        f"{head}<!-- table -->\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    )
    errors = [abs(cell["planned"] / cell["measured"] - 1) for cell in found.values()]
    command = "python -m benchmarks.memory.plan"
    within = sum(error <= BOUND for error in errors)
    whats = {
        "largest": ("largest error of the planned peak memory, of whole programs on a CPU",
                    max(errors), f"<= {BOUND}"),
        "cells": ("programs and options whose planned peak memory is within 10 % of the measured one",
                  within, ">= 12"),
    }  # fmt: skip
    rows = [
        {
            "id": f"plan/memory/{key}",
            "what": what,
            "value": value,
            "bound": bound,
            "command": command,
        }
        for key, (what, value, bound) in whats.items()
    ]
    add_rows(RESULTS / "ranks.json", rows)


# what the programs read


def write_inputs(folder: Path) -> None:
    """Write the models, and rows whose prompts and responses all have the greatest length."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    for kind in ("llama", "qwen3", "gpt2"):
        shape = dict(SHAPE)
        if kind == "gpt2":
            shape = {"vocab_size": 4000, "n_embd": 160, "n_layer": 4, "n_head": 10,
                     "n_positions": 1024}  # fmt: skip
        config = AutoConfig.for_model(
            kind,
            **shape,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)

    # buckets that do not hide everything else
    for stage in (2, 3):
        zero = {"stage": stage, "reduce_bucket_size": 1_000_000}
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))

    draw = random.Random(0)
    empty = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True, tokenize=True
    )
    beside = len(empty["input_ids"] if hasattr(empty, "keys") else empty)

    def text(tokens: int) -> str:
        words: list[str] = []
        while len(tokenizer("".join(words))["input_ids"]) < tokens:
            words.append(" " + draw.choice(WORDS))
        ids = tokenizer("".join(words))["input_ids"][:tokens]
        return tokenizer.decode(ids)

    instructions, pairs = [], []
    for _ in range(80):
        prompt = text(LENGTHS["max_prompt_length"] - beside)
        # and EOS
        answers = [text(LENGTHS["max_response_length"] - 1) for _ in range(2)]
        said = {"role": "assistant", "content": answers[0]}
        instructions.append({"messages": [{"role": "user", "content": prompt}, said]})
        pairs.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    for name, rows in (("instructions", instructions), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def options_of(name: str, folder: Path) -> dict[str, Any]:
    program, _, kind, options = CELLS[name]
    data = "pairs" if program in ("reward", "dpo") else "instructions"
    every = PPO if program == "ppo" else SHARED
    every = {k: v for k, v in every.items() if program != "reward" or k != "eval_prompts"}
    given = every | LENGTHS | options
    given |= {
        "model_name_or_path": str(folder / kind),
        "data": [str(folder / f"{data}.jsonl")],
        "output_dir": str(folder / "runs" / name),
        "max_dropped": 1.0,
    }
    if program != "ppo" or given.get("use_peft", True):
        # which PPO on whole weights has not
        given["train_eos"] = "never"
    return json.loads(
        json.dumps(given).replace("RUNS", str(folder / "runs")).replace("FOLDER", str(folder))
    )


# measuring


def run_cell(name: str, folder: Path) -> dict[str, Any]:
    """Run a cell, several ranks in processes of their own; return what was measured on the rank with
    most.
    """
    ranks = CELLS[name][1]
    shutil.rmtree(folder / "runs" / name, ignore_errors=True)
    if ranks == 1:
        return measure(name, folder)
    port, children = str(20_000 + os.getpid() % 10_000), []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
            found = measure(name, folder)
            (folder / f"{name}-{rank}.json").write_text(json.dumps(found))
            os._exit(0)
        children.append(child)
    if any([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]):
        raise SystemExit(f"{name}: failed")
    files = [folder / f"{name}-{rank}.json" for rank in range(ranks)]
    found = [json.loads(file.read_text()) for file in files]
    return max(found, key=lambda one: one["measured"])


def run_program(name: str, folder: Path) -> None:
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(options_of(name, folder)))
    program = importlib.import_module(f"launch.{CELLS[name][0]}").main
    with contextlib.suppress(SystemExit):
        program(["--config", str(file)])
    assert (folder / "runs" / name / "result.json").is_file(), "the run has not finished"


def own_size(model: Any) -> int:
    """Return the bytes of a model's weights and buffers on this rank."""
    tensors = [*model.parameters(), *model.buffers()]
    # ZeRO-3 leaves an empty tensor in the place of a weight, beside this rank's part of it
    return size_of(getattr(tensor, "ds_tensor", tensor) for tensor in tensors)


class Allocated:
    """Counts what torch's allocator gives out from when a program has its model."""

    def __init__(self, learning_models: int) -> None:
        """learning_models: models that the program loads beside its base (PPO on whole weights)."""
        activities = [ProfilerActivity.CPU]
        self.profile = profile(activities=activities, profile_memory=True)
        self.base = 0
        self.learning_models = learning_models

    def loaded(self, initial: Any) -> Any:
        # before TRL or Roles put anything on it
        self.base = own_size(initial.model)
        if initial.quantization:
            self.base = weight_memory(initial.model)[0]
        if self.learning_models:
            # now, and by their size: the profiler does not see the threads that read weights
            ready = [initial.another() for _ in range(self.learning_models)]
            self.base += sum(map(own_size, ready))
            initial = dataclasses.replace(initial, another=ready.pop)
        self.profile.__enter__()
        return initial

    def close(self) -> int:
        self.profile.__exit__(None, None, None)
        alive = most = 0
        for event in self.profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                most = max(most, alive)
        return self.base + most


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Run the program of a cell in this process; return its peak."""
    program, _, _, options = CELLS[name]
    # policy and critic
    learning_models = 2 if program == "ppo" and not options.get("use_peft", True) else 0
    allocated, started = Allocated(learning_models), time.process_time()
    load, save = stages.load_initial_model, trainers.save_policy
    found = {}

    def saved(*args: Any, **kwargs: Any) -> None:
        # saving is no part of the plan
        found.setdefault("measured", allocated.close())
        save(*args, **kwargs)

    stages.load_initial_model = lambda run: allocated.loaded(load(run))
    trainers.save_policy = saved
    try:
        run_program(name, folder)
    finally:
        stages.load_initial_model, trainers.save_policy = load, save
    if not found:
        found["measured"] = allocated.close()
    return found | {"cpu": time.process_time() - started}


def planned(name: str, folder: Path) -> dict[str, Any]:
    """Return what the plan says of a cell."""
    from rlhf.config import parse
    from rlhf.options.programs import PROGRAMS
    from rlhf.plan.estimate import estimate, setup_of
    from rlhf.plan.roles import Start
    from rlhf.plan.shape import read_shape

    program, ranks, kind, _ = CELLS[name]
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(options_of(name, folder) | {"overwrite_output_dir": True}))
    config = parse(PROGRAMS[program], ["--config", str(file)])
    shape = read_shape(str(folder / kind))
    found = estimate(
        program, config, Start(shape), setup_of(program, config, ranks, "cpu", launched=ranks > 1)
    )
    phases = {phase.name: phase.parts for phase in found.phases}
    return {"planned": found.peak.total, "phases": phases}


if __name__ == "__main__":
    main()
