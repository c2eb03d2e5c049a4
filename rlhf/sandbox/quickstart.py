"""`rlhf sandbox quickstart`: every stage on the sandbox through the real doors, ending in the comparison.

Each step is a command that can be typed by hand (it is printed). A step that already ran with the same command,
configuration and code is not run again; a step that changed is, and so are those after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import rlhf
from rlhf.config import SEED, UserError, option
from rlhf.files import lock_folder
from rlhf.sandbox import CONFIGS, shown_path


@dataclass(kw_only=True)
class QuickstartConfig:
    """The whole pipeline in a small world with a known true reward: minutes on two CPU cores."""

    run: str = option("runs/quickstart", "the folder of the run")
    world: str = option("runs/sandbox", "the folder of the small world, built when missing and shared by runs")
    seed: int = option(
        0, "run seed: annotators, sampling, training (the world has its own in the sandbox's config)", **SEED
    )


@dataclass
class Step:
    """One command of the pipeline and the files it must leave."""

    name: str
    why: str
    command: list[str]
    leaves: list[str]


def steps(config: QuickstartConfig) -> list[Step]:
    """The pipeline, in order. Paths and seed are flags; everything else stands in rlhf/sandbox/configs/."""
    run, seed = config.run, ["--seed", str(config.seed)]
    world = config.world
    store, prompts = f"{run}/preferences.db", f"{world}/prompts.jsonl"
    voice = f"{{voice: {world}/voice.yaml, name: gold}}"

    def configured(name: str) -> list[str]:
        return ["--config", shown_path(CONFIGS / f"{name}.yaml")]

    def door(name: str, start: str, data: str, *more: str) -> list[str]:
        program = ["deepspeed", "--num_accelerators", "1", "--module", f"launch.{name}", *configured(name)]
        program += ["--model_name_or_path", start, "--data", data, "--output_dir", f"{run}/{name}"]
        program += [] if name == "reward" else ["--eval_data", prompts, "--eval_scorers", f"[{voice}]"]
        return [*program, "--overwrite_output_dir", "true", *seed, *more]

    def weights(name: str) -> list[str]:
        return [f"{run}/{name}/result.json", f"{run}/{name}/adapter_model.safetensors"]

    sandbox = ["rlhf", "sandbox", "build", *configured("sandbox"), "--output_dir", world]
    sample = ["rlhf", "collect", "sample", *configured("sample"), "--model_name_or_path", f"{run}/sft"]
    sample += ["--data", prompts, "--store", store, *seed]
    annotate = [
        "rlhf",
        "sandbox",
        "annotate",
        *configured("annotate"),
        "--store",
        store,
        "--voice",
        f"{world}/voice.yaml",
    ]
    annotate += seed
    compare = ["rlhf", "compare", f"{run}/sft", f"{run}/dpo", f"{run}/ppo", *configured("compare")]
    compare += [
        "--gold",
        f"[{{voice: {world}/voice.yaml}}]",
        "--prompts",
        prompts,
        "--votes",
        store,
        "--output_dir",
        f"{run}/report",
        *seed,
    ]
    reward = ["--reward", f"[{{model: {run}/reward}}]"]
    return [
        Step("sandbox", "a world, its shop and a base model", sandbox, [f"{world}/base/model.safetensors", prompts]),
        Step(
            "sft",
            "imitate the shop's answers",
            door("sft", f"{world}/base", f"{world}/instructions.jsonl"),
            weights("sft"),
        ),
        Step("sample", "two answers of the SFT policy to each prompt", sample, [store]),
        Step("annotate", "simulated annotators choose the better one", annotate, [store]),
        Step("reward", "learn to judge from their votes", door("reward", f"{run}/sft", store), weights("reward")),
        Step("dpo", "learn from the same votes directly", door("dpo", f"{run}/sft", store), weights("dpo")),
        Step("ppo", "learn from the reward model", door("ppo", f"{run}/sft", store, *reward), weights("ppo")),
        Step("compare", "both against SFT by the true reward", compare, [f"{run}/report/report.json"]),
    ]


def quickstart(config: QuickstartConfig) -> None:
    """Run what is not done; raises UserError naming the log when a step fails."""
    run = Path(config.run)
    lock_folder(run)
    (run / "logs").mkdir(exist_ok=True)
    record_file = run / "steps.json"
    record = json.loads(record_file.read_text()) if record_file.is_file() else {}
    began, stale, todo = time.monotonic(), False, steps(config)
    reused = []
    if record.get("annotate", {}).get("fingerprint") != fingerprint(todo[3]):
        record.pop("sample", None)  # new votes need a store without the old ones
    for number, step in enumerate(todo, 1):
        mark = fingerprint(step)
        done = record.get(step.name, {}).get("fingerprint") == mark and all(Path(f).exists() for f in step.leaves)
        head = f"[{number}/{len(todo)}] {step.name}: {step.why}"
        if done and not stale:
            print(f"{head} - done before, reused ({record[step.name]['seconds']:.0f} s saved)", flush=True)
            reused.append(step.name)
            continue
        if step.name == "sample":  # responses of another policy, and votes on them, would stay in the store
            for suffix in ("", "-wal", "-shm"):
                Path(f"{step.leaves[0]}{suffix}").unlink(missing_ok=True)
        stale = True
        record.pop(step.name, None)
        print(f"\n{head}  (at {time.monotonic() - began:.0f} s)\n$ {' '.join(map(quoted, step.command))}", flush=True)
        seconds = execute(step, run / "logs" / f"{step.name}.log")
        record[step.name] = {"fingerprint": mark, "seconds": seconds}
        record_file.write_text(json.dumps(record, indent=2) + "\n")
    if reused:
        print(f"\nreused: {', '.join(reused)}. To begin anew: rm -r {config.run} (and {config.world} for the world)")
    if "compare" in reused:
        show_table(run / "report")
    total = sum(record[s.name]["seconds"] for s in todo)
    print(
        f"\nquickstart: {time.monotonic() - began:.0f} s now, {total:.0f} s for all steps. Report: {config.run}/report/"
    )
    for name in ("report.md", "report.json", "frontier.png"):
        print(f"  {config.run}/report/{name}")


def execute(step: Step, log: Path) -> float:
    """Run the command, show its output as it comes and keep it in `log`; returns the seconds it took."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    began = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(step.command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        for line in iter(lambda: process.stdout.read1(4096), b""):
            file.write(line)
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        code = process.wait()
    if code:
        raise UserError(f"step '{step.name}' ended with exit code {code}; its output stands in {log}")
    return time.monotonic() - began


def fingerprint(step: Step) -> str:
    """Changes with the command, the files it is configured by, and the code."""
    digest = hashlib.sha256(json.dumps(step.command).encode())
    package = Path(rlhf.__file__).parent.parent
    files = [Path(word) for word in step.command if word.endswith(".yaml")]
    for folder in ("rlhf", "reward", "launch"):
        files += sorted((package / folder).rglob("*.py"))
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:16]


def show_table(report: Path) -> None:
    from rlhf.compare.report import print_report

    print_report(json.loads((report / "report.json").read_text()), report)


def quoted(word: str) -> str:
    return f"'{word}'" if any(c in word for c in " {}[]") else word
