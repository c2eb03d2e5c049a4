"""Bytes that ranks exchange in a step, counted by wrapping torch.distributed on two gloo ranks.

    python -m benchmarks.ranks.communication        # 13 runs of a tiny model, about 5 CPU minutes; resumes by run

Writes benchmarks/results/communication.json; scaling_estimate.py makes its page from it. Ranks are started
by torchrun, under which DeepSpeed sums CPU tensors through torch.distributed too, as it does on GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.paths import RESULTS, ROOT

RESULT = RESULTS / "communication.json"
PROGRAMS = ("sft", "dpo", "ppo")
# Under ZeRO-3 DeepSpeed keeps up to 10^9 gathered numbers from the forward to the backward pass: all of a tiny
# model, and next to nothing of a large one. So it is measured without, and once as it is.
NOTHING_KEPT = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
STAGES = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    # a tiny model would not be divided at all
    "3": {"stage": 3, "stage3_param_persistence_threshold": 0, **NOTHING_KEPT},
    "3, all kept": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
# of the tiny model: tokens, and the width of its states
VOCABULARY, WIDTH = 320, 128
EMBEDDINGS = VOCABULARY * WIDTH
# the step after this one is counted: by then nothing is set up any more
SETTLED = 3
# smaller messages carry counts and losses
CONTROL_BYTES = 1024
# where each collective has its whole message: the longer of its input and output
MESSAGE = {
    "all_reduce": ("tensor",),
    "broadcast": ("tensor",),
    "reduce": ("tensor",),
    "all_gather_into_tensor": ("output_tensor",),
    "all_gather": ("tensor_list",),
    "reduce_scatter_tensor": ("input",),
    "reduce_scatter": ("input_list",),
    "all_to_all_single": ("input",),
}


def count_collectives(seen: dict[str, list[int]]) -> None:
    """Wrap the collectives of torch.distributed so that `seen` adds up calls and bytes of each."""
    import inspect

    import torch
    from torch.distributed import distributed_c10d

    def size(message: Any) -> int:
        parts = message if isinstance(message, (list, tuple)) else [message]
        return sum(part.numel() * part.element_size() for part in parts)

    def counted(name: str, call: Any) -> Any:
        signature = inspect.signature(call)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            message = size(given[MESSAGE[name][0]])
            key = name if message > CONTROL_BYTES else "control"
            seen[key][0] += 1
            seen[key][1] += message
            return call(*args, **kwargs)

        return wrapper

    for name in MESSAGE:
        wrapped = counted(name, getattr(distributed_c10d, name))
        # objects are gathered through the module's own names
        setattr(distributed_c10d, name, wrapped)
        setattr(torch.distributed, name, wrapped)


def worker(program: str, out: str, argv: list[str]) -> None:
    """Run a program on this rank and write what the step after SETTLED has sent."""
    seen: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    # before DeepSpeed looks these functions up
    count_collectives(seen)
    from importlib import import_module

    from rlhf.runs.run import Run

    snapshots = []
    interrupted = Run.interrupted

    def end_of_step(run: Run) -> bool:
        snapshots.append({name: list(counts) for name, counts in seen.items()})
        return interrupted(run)

    Run.interrupted = end_of_step
    import_module(f"launch.{program}").main(argv)
    before, after = snapshots[SETTLED - 1], snapshots[SETTLED]
    step = {}
    for name, (calls, sent) in after.items():
        old = before.get(name, [0, 0])
        if calls > old[0]:
            step[name] = {"calls": calls - old[0], "bytes": sent - old[1]}
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(step))


def flags_of(program: str, stage: str, folder: Path, base: str) -> list[str]:
    """Return the flags of five steps of one micro-batch a rank, with LoRA."""
    settings = folder / f"zero{stage}.json"
    settings.write_text(json.dumps({"zero_optimization": STAGES[stage]}))
    data = "instructions" if program == "sft" else "pairs"
    flags = ["--model_name_or_path", base, "--data", str(folder / f"{data}.jsonl")]
    flags += ["--output_dir", str(folder / f"{program}{stage}"), "--deepspeed", str(settings)]
    flags += ["--eval_prompts", "0", "--save_steps", "1000", "--logging_steps", "1"]
    flags += ["--max_prompt_length", "64", "--max_response_length", "12", "--lora_r", "4"]
    flags += ["--per_device_train_batch_size", "4", "--validation_fraction", "0"]
    if program != "ppo":
        return [*flags, "--max_steps", str(SETTLED + 2)]
    scorer = folder / "scorer.py"
    scorer.write_text(
        "def score(samples):\n    return [float(len(t)) for t in samples.responses]\n"
    )
    steps = 8 * (SETTLED + 2)
    flags += ["--reward", "[{function: 'scorer:score'}]", "--total_episodes", str(steps)]
    # one pass and one optimizer step a rollout, to be counted alone
    flags += ["--rollout_batch_size", "8", "--num_ppo_epochs", "1", "--num_mini_batches", "1"]
    return [*flags, "--missing_eos_score", "none"]


def parameters(folder: Path) -> int:
    """Return the numbers in the safetensors files of a folder."""
    from safetensors import safe_open

    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                shape = tensors.get_slice(name).get_shape()
                size = 1
                for length in shape:
                    size *= length
                count += size
    return count


def measure(program: str, stage: str, folder: Path, base: str) -> dict[str, Any]:
    """Return the traffic of one step of a program under a ZeRO stage on two ranks."""
    out = folder / "step.json"
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "benchmarks.ranks.communication"]
    command += ["worker", program, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"HF_HUB_OFFLINE": "1", "RLHF_CACHE": str(folder / "cache")}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [*command, *flags_of(program, stage, folder, base)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    if done.returncode:
        raise SystemExit(f"{program} under ZeRO {stage}: {(done.stdout + done.stderr)[-3000:]}")
    run = folder / f"{program}{stage}"
    trained = parameters(run) + (parameters(run / "value") if (run / "value").is_dir() else 0)
    return {
        "program": program,
        "stage": stage,
        "trainable": trained,
        "base": parameters(Path(base)),
        "step": json.loads(out.read_text()),
    }


def main() -> None:
    """Measure what is missing in the results file."""
    from tests.conftest import make_model, make_tokenizer
    from tests.launch.conftest import write_data

    found = json.loads(RESULT.read_text()) if RESULT.exists() else []
    have = {(row["program"], row["stage"]) for row in found}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = str(folder / "base")
        tokenizer = make_tokenizer()
        sizes = (VOCABULARY, tokenizer.pad_token_id, tokenizer.eos_token_id)
        make_model(*sizes, hidden=WIDTH, layers=4).save_pretrained(base)
        tokenizer.save_pretrained(base)
        files = write_data(folder)
        Path(files["instructions"]).rename(folder / "instructions.jsonl")
        Path(files["pairs"]).rename(folder / "pairs.jsonl")
        for program in PROGRAMS:
            for stage in STAGES:
                is_extra = "kept" in stage and program != "sft"
                if is_extra or (program, stage) in have:
                    continue
                found.append(measure(program, stage, folder, base))
                RESULT.write_text(json.dumps(found, indent=1) + "\n")
                print(json.dumps(found[-1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main()
