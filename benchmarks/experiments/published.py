"""Published results, repeated on the sandbox: `make experiments`, or

    python -m benchmarks.experiments.published [NAME ...]

    sandbox     PPO, DPO and best of n: frontier, over-optimisation, the ladders of kl_coef and beta
    ablations   PPO without the EOS rule, and without the critic from the reward model
    threestate  the example of 2404.10719, exactly
    polite      PPO and DPO on a real model and real pairs, by a referee (needs RLHF_DATA)

Each is made by the programs themselves (rlhf experiment run), resumes where it was cut off, and
writes its page in docs/experiments/, its figures in docs/images/experiments/ and a small JSON in
benchmarks/results/ when it is done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments.published_pages import write_ablations, write_polite, write_sandbox
from benchmarks.paths import ROOT
from benchmarks.programs import finished

RUNS = Path("runs/compare")
DEEPSPEED = ["deepspeed", "--num_accelerators", "1"]


def main() -> None:
    asked = sys.argv[1:] or [
        name for name in EXPERIMENTS if name != "polite" or os.environ.get("RLHF_DATA")
    ]
    for name in asked:
        if name not in EXPERIMENTS:
            sys.exit(f"unknown experiment '{name}', expected one of {', '.join(EXPERIMENTS)}")
    for name in asked:
        EXPERIMENTS[name]()


def sandbox() -> None:
    shop()
    compare("configs/experiments/sandbox.yaml")
    write_sandbox(RUNS / "sandbox")


def ablations() -> None:
    shop()
    compare("configs/experiments/ablations.yaml")
    write_ablations(RUNS / "ablations")


def threestate() -> None:
    run([sys.executable, "-m", "benchmarks.experiments.three_state"])


def polite() -> None:
    data = os.environ.get("RLHF_DATA") or sys.exit(
        "set RLHF_DATA to the folder with models/stories260K and the pairs"
    )
    if not finished(RUNS / "polite-sft"):
        options = [
            *("--model_name_or_path", f"{data}/models/stories260K", "--use_peft", "false"),
            *("--data", f"{data}/sft_rasbt_instruct.jsonl", "--on_error", "skip"),
            *("--max_prompt_length", "128", "--max_response_length", "192"),
            *("--validation_fraction", "0.1", "--test_fraction", "0.15"),
            *("--learning_rate", "2e-3", "--warmup_steps", "10", "--num_train_epochs", "4"),
            *("--per_device_train_batch_size", "16", "--deepspeed", "zero0", "--eval_prompts", "0"),
        ]
        run([*DEEPSPEED, "launch/sft.py", *options, "--output_dir", f"{RUNS}/polite-sft"])
    pairs = f"{data}/pref_rasbt_polite.jsonl"
    own = ["--pairs", json.dumps({"data": [pairs]}), "--prompts", pairs]
    compare("configs/experiments/polite.yaml", *own)
    write_polite(RUNS / "polite")


def shop() -> None:
    """Make the small world and the SFT policy that the experiments on it start from."""
    configs = "rlhf/sandbox/configs"
    build = ["rlhf", "sandbox", "build", "--config", f"{configs}/sandbox.yaml"]
    run([*build, "--output_dir", "runs/sandbox"])
    if not finished(RUNS / "sft"):
        options = ["--model_name_or_path", "runs/sandbox/base", "--output_dir", f"{RUNS}/sft"]
        options += ["--config", f"{configs}/sft.yaml", "--data", "runs/sandbox/instructions.jsonl"]
        run([*DEEPSPEED, "launch/sft.py", *options])


def compare(config: str, *more: str) -> None:
    run(["rlhf", "experiment", "run", config, *more])


def run(command: Sequence[str]) -> None:
    """Run a command from the root of the repository; its failure ends this program with its code."""
    print(f"$ {' '.join(command)}", flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    words = list(command)
    if words[0] == "rlhf":
        words[:1] = [sys.executable, "-m", "rlhf.cli"]
    code = subprocess.run(words, cwd=ROOT, env={**os.environ, "PATH": path}).returncode
    if code:
        sys.exit(code)


EXPERIMENTS = {
    "sandbox": sandbox,
    "ablations": ablations,
    "threestate": threestate,
    "polite": polite,
}

if __name__ == "__main__":
    main()
