"""Compare three designs of PPO's critic on the sandbox: gold score, KL, explained variance, time.

    python -m benchmarks.experiments.critics FOLDER [--seeds 5]     # resumes; writes benchmarks/results/critics.json

Each seed is a whole quickstart in FOLDER (annotators, SFT, reward model, DPO, PPO), whose PPO fits its
critic to the reward model's hidden states. The same PPO then runs with a critic adapter of its own
and with a head on the policy's trunk: the same episodes, prompts, seed and step sizes. One report over
all of them gives the true score on test prompts that no stage has seen. Differences are paired by
seed, with a t interval over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

from scipy import stats

from benchmarks.paths import RESULTS, ROOT

CONFIGS = ROOT / "rlhf" / "sandbox" / "configs"
RESULT = RESULTS / "critics.json"
# name of the run -> options beside the quickstart's; the first is what the others are held against
OWN = "ppo-own"
DESIGNS = {
    OWN: {"critic_trunk": "own", "value_learning_rate": "4e-3"},
    "ppo": {},
    "ppo-policy": {"critic_trunk": "policy"},
}


def run(folder: Path, *command: str) -> None:
    """Run a command of the project in `folder`; its output goes to log.txt there."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    with (folder / "log.txt").open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, stdout=log, stderr=log
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {folder}/log.txt")


def make_seed(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Return what each design measured with one seed; what is there already is not made again."""
    place = f"runs/seed-{seed}"
    if not (folder / place / "report" / "report.json").is_file():
        run(
            folder,
            *("-m", "rlhf.cli", "sandbox", "quickstart", "--seed", str(seed)),
            *("--run", place, "--world", "runs/world"),
        )
    voice, prompts = "runs/world/voice.yaml", "runs/world/prompts.jsonl"
    for name, options in DESIGNS.items():
        if (folder / place / name / "result.json").is_file():
            continue
        flags = []
        for option, value in options.items():
            flags += [f"--{option}", value]
        run(
            folder,
            *("-m", "launch.ppo", "--config", str(CONFIGS / "ppo.yaml")),
            *("--model_name_or_path", f"{place}/sft", "--data", f"{place}/preferences.db"),
            *("--eval_data", prompts, "--eval_scorers", f"[{{voice: {voice}, name: gold}}]"),
            *("--reward", f"[{{model: {place}/reward}}]", "--seed", str(seed)),
            *("--output_dir", f"{place}/{name}", *flags),
        )
    if not (folder / place / "critics" / "report.json").is_file():
        runs = [f"{place}/{name}" for name in ("sft", "dpo", *DESIGNS)]
        run(
            folder,
            *("-m", "rlhf.cli", "compare", *runs, "--config", str(CONFIGS / "compare.yaml")),
            *("--gold", f"[{{voice: {voice}}}]", "--prompts", prompts),
            *("--output_dir", f"{place}/critics", "--seed", str(seed)),
        )
    return read_seed(folder / place)


def read_seed(place: Path) -> dict[str, dict[str, float]]:
    """Return gold, KL, explained variance (mean of the second half) and seconds of each run."""
    report = json.loads((place / "critics" / "report.json").read_text())
    found = {}
    for point in report["points"]:
        scores = point["scores"]["gold"]
        found[point["method"]] = {
            "gold": scores["mean"]["estimate"],
            "gold_over_sft": scores["difference"]["estimate"],
            "kl": point["kl"]["estimate"],
        }
    for name in DESIGNS:
        rows = [json.loads(line) for line in (place / name / "metrics.jsonl").open()]
        steps = [row for row in rows if "value/explained_variance" in row]
        late = steps[len(steps) // 2 :]
        found[name]["explained_variance"] = statistics.fmean(
            row["value/explained_variance"] for row in late
        )
        found[name]["learn_seconds"] = sum(row["time/learn"] for row in steps)
    return found


def paired(differences: list[float]) -> dict[str, float | None]:
    """Return the mean difference over seeds and its 95 % t interval."""
    count, mean = len(differences), statistics.fmean(differences)
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    error = statistics.stdev(differences) / math.sqrt(count)
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def summarise(seeds: dict[str, dict[str, dict[str, float]]]) -> dict:
    """Return means over seeds, and each design's gold score less that of the own adapter, paired."""
    means = {}
    for name in next(iter(seeds.values())):
        rows = [found[name] for found in seeds.values()]
        means[name] = {}
        for key in rows[0]:
            means[name][key] = statistics.fmean(row[key] for row in rows)
    differences = {}
    for name in list(DESIGNS)[1:]:
        gaps = [found[name]["gold"] - found[OWN]["gold"] for found in seeds.values()]
        differences[name] = paired(gaps)
    return {"means": means, "gold_less_own": differences}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    seeds = {}
    for seed in range(arguments.seeds):
        seeds[str(seed)] = make_seed(arguments.folder.resolve(), seed)
        result = summarise(seeds) | {"seeds": seeds}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        print(f"seed {seed}:", json.dumps(seeds[str(seed)]), flush=True)
    print(json.dumps(summarise(seeds), indent=2))


if __name__ == "__main__":
    main()
