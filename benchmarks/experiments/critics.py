"""Compare three designs of PPO's critic on the sandbox: gold score, KL, explained variance, time.

    python -m benchmarks.experiments.critics FOLDER [--seeds 5]     # resumes; writes benchmarks/results/critics.json

Each seed is a whole quickstart in FOLDER (annotators, SFT, reward model, DPO, PPO), whose PPO fits its
critic to the reward model's hidden states. The same PPO then runs with a critic adapter of its own
and with a head on the policy's trunk: the same episodes, prompts, seed and step sizes. One report over
all of them gives the true score on test prompts that no stage has seen. Differences are paired by
seed, with a t interval over seeds.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from pathlib import Path

from benchmarks.paths import RESULTS
from benchmarks.programs import finished, folder_and_seeds, paired, rlhf, run
from rlhf.sandbox import CONFIGS

RESULT = RESULTS / "critics.json"
# name of the run -> options beside the quickstart's; the first is what the others are held against
OWN = "ppo-own"
DESIGNS = {
    OWN: {"critic_trunk": "own", "value_learning_rate": "4e-3"},
    "ppo": {},
    "ppo-policy": {"critic_trunk": "policy"},
}


def make_seed(seed: int) -> dict[str, dict[str, float]]:
    """Return what each design measured with one seed; what is there already is not made again."""
    place = Path("runs") / f"seed-{seed}"
    if not (place / "report" / "report.json").is_file():
        where = ["--run", str(place), "--world", "runs/world"]
        rlhf("sandbox", "quickstart", "--seed", str(seed), *where)
    voice, prompts = "runs/world/voice.yaml", "runs/world/prompts.jsonl"
    for name, options in DESIGNS.items():
        if finished(place / name):
            continue
        flags = []
        for option, value in options.items():
            flags += [f"--{option}", value]
        run(
            *("launch.ppo", "--config", str(CONFIGS / "ppo.yaml")),
            *("--model_name_or_path", f"{place}/sft", "--data", f"{place}/preferences.db"),
            *("--eval_data", prompts, "--eval_scorers", f"[{{voice: {voice}, name: gold}}]"),
            *("--reward", f"[{{model: {place}/reward}}]", "--seed", str(seed)),
            *("--output_dir", f"{place}/{name}", *flags),
        )
    if not (place / "critics" / "report.json").is_file():
        runs = [f"{place}/{name}" for name in ("sft", "dpo", *DESIGNS)]
        rlhf(
            *("compare", *runs, "--config", str(CONFIGS / "compare.yaml")),
            *("--gold", f"[{{voice: {voice}}}]", "--prompts", prompts),
            *("--output_dir", f"{place}/critics", "--seed", str(seed)),
        )
    return read_seed(place)


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
    folder, count = folder_and_seeds(__doc__)
    seeds = {}
    for seed in range(count):
        with contextlib.chdir(folder):
            seeds[str(seed)] = make_seed(seed)
        result = summarise(seeds) | {"seeds": seeds}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
        print(f"seed {seed}:", json.dumps(seeds[str(seed)]), flush=True)
    print(json.dumps(summarise(seeds), indent=2))


if __name__ == "__main__":
    main()
