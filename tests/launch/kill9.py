"""Kill each program with SIGKILL at random moments, start it again until it is done, and compare
with a run left alone.

    python -m tests.launch.kill9 --kills 10 --programs sft reward dpo ppo ppo@2 dpo@2

`ppo@2` is two ranks under the DeepSpeed launcher (ZeRO-2). A kill comes a random while (up to 0.4
s) after the run has got zero to three checkpoints further than it was at its start, or now and then
while it is still loading. Equal means the same weights, metrics, samples and headline to the last
bit, times and memory excepted.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlhf.startup import free_port
from tests.conftest import ROOT, make_model, make_tokenizer, random_adapter
from tests.launch.conftest import SMALL, differences, flags_of, ppo_flags, write_data

PATIENCE = 300.0  # seconds that one start may take
LAST = ["--save_steps", "1", "--save_total_limit", "2"]
SIZE = {"sft": "40", "reward": "40", "dpo": "40"}  # steps


def world(folder: Path) -> dict[str, str]:
    """Base, SFT adapter, reward model and data, as the tests make them."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    base, tokenizer = folder / "base", make_tokenizer()
    make_model(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id).save_pretrained(base)
    tokenizer.save_pretrained(base)
    sft = random_adapter(str(base), folder / "sft", seed=1)
    reward = Path(random_adapter(str(base), folder / "reward", seed=2))
    weights = load_file(reward / "adapter_model.safetensors")
    torch.manual_seed(3)
    save_file(
        weights | {"base_model.model.score.weight": torch.randn(1, 32)},
        reward / "adapter_model.safetensors",
    )
    (reward / "reward.json").write_text(json.dumps({"scale": 0.5, "bias": -0.25}))
    return {"base": str(base), "sft": sft, **write_data(folder)}


def command_of(program: str, made: dict[str, str], folder: Path, output: Path) -> list[str]:
    name, _, ranks = program.partition("@")
    data = made["instructions" if name == "sft" else "pairs"]
    flags = [*flags_of(name, made["base" if name == "sft" else "sft"], data, output), *LAST]
    if name == "ppo":
        flags += [
            *ppo_flags(folder),
            "--total_episodes",
            "320",
            "--missing_eos_score",
            "none",
            "--eval_steps",
            "7",
        ]
    else:
        flags += [
            *SMALL[:2],
            "--max_steps",
            SIZE[name],
            *SMALL[4:],
            "--num_train_epochs",
            "1",
            "--eval_steps",
            "7",
        ]
        flags += ["--logging_steps", "3"]
    program_file = str(ROOT / "launch" / f"{name}.py")
    if not ranks:
        return [sys.executable, program_file, *flags]
    launcher = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators",
        ranks,
        "--no_local_rank",
    ]
    return [
        *launcher,
        "--master_port",
        str(free_port()),
        program_file,
        *flags,
        "--deepspeed",
        "zero2",
    ]


def reached(output: Path) -> int:
    """The step of the newest folder among the checkpoints, whole or in the writing; 0 if there is
    none.
    """
    names = [p.name for p in (output / "checkpoints").glob("*-*")]
    return max((int(n.rpartition("-")[2]) for n in names if not n.startswith("aside")), default=0)


def cache_of(log: Path) -> Path:
    """Return the cache of a run, which no other fills."""
    return log.with_suffix(".cache")


def start(command: list[str], log: Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "RLHF_CACHE": str(cache_of(log)),
    }
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True, cwd=ROOT
        )


def kill(process: subprocess.Popen) -> None:
    """The whole group at once, launcher and ranks; nobody gets to say a last word."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.2)


def torture(command: list[str], output: Path, kills: int, rng: random.Random) -> tuple[int, str]:
    """Start and kill until `kills` are made, then let it end. Returns the kills made and what went
    wrong, if at all.
    """
    log, made, left = output.with_suffix(".log"), 0, 40 * kills
    while True:
        if not reached(output):
            # it begins as the run that nothing interrupts
            shutil.rmtree(cache_of(log), ignore_errors=True)
        goal, began = reached(output) + rng.randint(0, 3), time.monotonic()
        process = start(command, log)
        loading = rng.random() < 0.15  # some die before they have done anything
        delay = rng.uniform(1.0, 6.0) if loading else rng.uniform(0.0, 0.4)
        alive = None
        while process.poll() is None and time.monotonic() - began < PATIENCE:
            now = time.monotonic()
            if alive is None and (loading or reached(output) > goal):
                alive = began if loading else now
            if made < kills and alive is not None and now - alive >= delay:
                kill(process)
                made += 1
                break
            time.sleep(0.005)
        else:
            if process.poll() is None:
                kill(process)
                return made, f"a start took more than {PATIENCE:.0f} s, see {log}"
            return (
                made,
                "" if process.returncode == 0 else f"exit code {process.returncode}, see {log}",
            )
        left -= 1
        if not left:
            return made, "it does not come to its end"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="for each program")
    parser.add_argument(
        "--programs", nargs="+", default=["sft", "reward", "dpo", "ppo", "dpo@2", "ppo@2"]
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, wrong = random.Random(options.seed), 0
    print(
        "| program | ranks | kills | steps | resumed from | equal to the last bit |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for program in options.programs:
        folder = Path(tempfile.mkdtemp(prefix="kill9-"))
        made = world(folder)
        name, _, ranks = program.partition("@")
        calm, killed = folder / f"{name}-calm", folder / f"{name}-killed"
        process = start(command_of(program, made, folder, calm), calm.with_suffix(".log"))
        if process.wait(timeout=PATIENCE):
            sys.exit(
                f"{program} ends with code {process.returncode}, see {calm.with_suffix('.log')}"
            )
        count, problem = torture(
            command_of(program, made, folder, killed), killed, options.kills, rng
        )
        problems = [problem] if problem else differences(calm, killed)
        from rlhf.runs.tracking import read_metrics

        steps = max(row["step"] for row in read_metrics(calm / "metrics.jsonl"))
        log = killed.with_suffix(".log").read_text()
        starts = {
            line.split("after step ")[1] for line in log.splitlines() if ": resuming from" in line
        }
        equal = "yes" if not problems else "NO: " + "; ".join(problems[:3])
        wrong += bool(problems)
        spread = ", ".join(sorted(starts, key=int)) or "none"
        print(f"| {name} | {ranks or 1} | {count} | {steps} | {spread} | {equal} |", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
