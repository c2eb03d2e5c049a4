"""Does an ensemble keep PPO from exploiting a reward model that has learnt from noisy labels?

    python -m benchmarks.reward.ensembles FOLDER [--seeds 5]   # resumes; writes benchmarks/results/ensembles.json

One SFT policy of the sandbox and its answers, judged by the true (gold) score. Each seed turns
a quarter of the labels round, trains MEMBERS reward models on them that differ in their seed, and
MEMBERS that each learn from a bootstrap sample of the pairs; then PPO against the first one, and
against the members in each way that is compared. Everything but the scorer is equal: prompts,
seed, episodes. Gold at the end is that of test prompts which no stage has seen. Differences are
paired by seed, with Student's interval over seeds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path

from benchmarks.paths import RESULTS
from benchmarks.programs import finished, folder_and_seeds, make_sandbox, paired, rlhf
from benchmarks.result_rows import add_rows, row_of
from rlhf.sandbox import CONFIGS

COMMAND = "python -m benchmarks.reward.ensembles FOLDER"
NOISE = 0.25
MEMBERS = 3
PAIRS = 800
# steps from whose mean gold is read, since single rollouts are noisy
WINDOW = 4
ONE = "one"
# way -> the reward models it takes, and how
WAYS = {
    "worst": ("reward", "how: worst"),
    "uncertainty": ("reward", "how: uncertainty, penalty: 1.0"),
    "worst of resampled": ("resampled", "how: worst"),
}
# no KL penalty and a large step size: with them PPO exploits a single reward model within 26 steps
PPO = {
    "total_episodes": "1664",
    "rollout_batch_size": "64",
    "learning_rate": "3e-3",
    "lr_scheduler_type": "constant",
    "kl_coef": "0",
    "eval_prompts": "128",
    "save_steps": "0",
    "guards": "{hacking: off, disagreement: {threshold: 1.5}}",
}


def main() -> None:
    folder, count = folder_and_seeds(__doc__)
    seeds = {}
    for seed in range(count):
        with contextlib.chdir(folder):
            make_answers()
            make_seed(seed)
            seeds[str(seed)] = read_seed(seed)
    result = summarise(seeds)
    (RESULTS / "ensembles.json").write_text(json.dumps(result | {"seeds": seeds}, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    write_rows(result)


def make_answers() -> None:
    """Make the world, the SFT policy, and two of its answers to each prompt with true labels."""
    if Path("answers.db").is_file():
        return
    make_sandbox(Path())
    source = ["--model_name_or_path", "sft", "--data", "world/prompts.jsonl"]
    options = ["--config", f"{CONFIGS}/sample.yaml", "--prompts", str(PAIRS), "--store", "new.db"]
    rlhf("collect", "sample", *source, *options)
    # the lesser answer is never preferred
    exactly = ["--habits", "false", "--noise", "1e-6"]
    rlhf("sandbox", "annotate", "--store", "new.db", "--voice", "world/voice.yaml", *exactly)
    os.replace("new.db", "answers.db")


def run_program(name: str, *flags: str) -> None:
    """Run a program of launch/ in this process, which spares its imports."""
    from importlib import import_module

    began = time.process_time()
    import_module(f"launch.{name}").main(list(flags))
    with Path("cpu.jsonl").open("a") as file:
        line = {"program": name, "cpu_seconds": time.process_time() - began, "flags": flags}
        file.write(json.dumps(line) + "\n")


def write_pairs(path: Path, seed: int, sample: str = "") -> None:
    """Write the pairs with a quarter of the labels turned round, drawn by the seed.

    sample: names a draw of as many pairs with replacement; how often one was drawn is its weight.
    """
    from rlhf.data.load import load
    from rlhf.data.records import Preference

    draw = random.Random(f"labels {seed}")
    resample = random.Random(f"{sample} {seed}")
    records = load(["answers.db"], Preference)
    counts = Counter(resample.choices(range(len(records)), k=len(records)))
    lines = []
    for number, record in enumerate(records):
        sides = [(record.chosen, record.chosen_ended), (record.rejected, record.rejected_ended)]
        if draw.random() < NOISE:
            sides.reverse()
        (chosen, chosen_ended), (rejected, rejected_ended) = sides
        row = {
            "prompt": record.prompt,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_ended": chosen_ended,
            "rejected_ended": rejected_ended,
            "metadata": record.metadata,
        }
        if sample and not counts[number]:
            continue
        if sample:
            # with a mean of 1 over those that were drawn
            row["weight"] = counts[number] * len(counts) / len(records)
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


def make_seed(seed: int) -> None:
    """Train the reward models of a seed, then PPO in each way; what is there is not made again."""
    place = Path(f"seed-{seed}")
    place.mkdir(exist_ok=True)
    pairs = place / "pairs.jsonl"
    if not pairs.is_file():
        write_pairs(pairs, seed)
    for number in range(MEMBERS):
        own = place / f"pairs-{number}.jsonl"
        if not own.is_file():
            write_pairs(own, seed, sample=f"member {number}")
        train_member(f"{place}/reward-{number}", pairs, MEMBERS * seed + number)
        train_member(f"{place}/resampled-{number}", own, MEMBERS * seed + number)
    run_ppo(place, ONE, f"model: {place}/reward-0", seed)
    for way, (kind, how) in WAYS.items():
        members = ", ".join(f"{place}/{kind}-{number}" for number in range(MEMBERS))
        run_ppo(place, way, f"ensemble: [{members}], {how}", seed)


def train_member(folder: str, pairs: Path, seed: int) -> None:
    if finished(folder):
        return
    run_program(
        *("reward", "--config", str(CONFIGS / "reward.yaml"), "--model_name_or_path", "sft"),
        *("--normalise", "mean_std", "--reference_data", "world/instructions.jsonl"),
        *("--data", str(pairs), "--output_dir", folder, "--seed", str(seed)),
    )


def run_ppo(place: Path, way: str, scorer: str, seed: int) -> None:
    folder = place / way.replace(" ", "-")
    if finished(folder):
        return
    gold = "{voice: world/voice.yaml, name: gold, weight: 0}"
    flags = []
    for option, value in PPO.items():
        flags += [f"--{option}", value]
    run_program(
        *("ppo", "--config", str(CONFIGS / "ppo.yaml"), "--model_name_or_path", "sft", *flags),
        *("--reward", f"[{{{scorer}, name: proxy}}, {gold}]", "--data", f"{place}/pairs.jsonl"),
        *("--eval_data", "world/prompts.jsonl", "--seed", str(seed), "--output_dir", str(folder)),
    )


def read_seed(seed: int) -> dict[str, dict[str, float]]:
    """Return what the PPO run of each way measured, as far as it has ended."""
    found = {}
    for way in (ONE, *WAYS):
        folder = Path(f"seed-{seed}") / way.replace(" ", "-")
        if not finished(folder):
            continue
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        steps = [row for row in rows if "score/gold" in row]
        curve = [row["score/gold"] for row in steps]
        means = [statistics.fmean(curve[i : i + WINDOW]) for i in range(len(curve) - WINDOW + 1)]
        evaluated = [row["eval/score/gold"] for row in rows if "eval/score/gold" in row]
        found[way] = {
            "gold_start": evaluated[0],
            "gold_end": evaluated[-1],
            "rollout_gold_late": statistics.fmean(curve[len(curve) // 2 :]),
            "rollout_gold_end": means[-1],
            "rollout_gold_peak": max(means),
            "peak_step": means.index(max(means)) + WINDOW,
            "proxy_start": statistics.fmean(row["score/proxy"] for row in steps[:WINDOW]),
            "proxy_end": statistics.fmean(row["score/proxy"] for row in steps[-WINDOW:]),
            "kl_end": steps[-1]["kl/sequence"],
        }
        if way != ONE:
            spreads = [row["score/proxy/spread"] for row in steps]
            found[way]["spread_largest"] = max(spreads) / statistics.fmean(spreads[:WINDOW])
            found[way]["spread_start"] = statistics.fmean(spreads[:WINDOW])
            found[way]["spread_end"] = statistics.fmean(spreads[-WINDOW:])
    return found


def summarise(seeds: dict[str, dict[str, dict[str, float]]]) -> dict:
    """Return means over seeds; gold of each way less that of one reward model, paired by seed, at
    the end and in the rollouts of the second half; and how far gold has fallen from its peak.
    """
    means: dict[str, dict[str, float]] = {}
    falls: dict[str, dict] = {}
    differences: dict[str, dict] = {"gold_end": {}, "rollout_gold_late": {}}
    for way in (ONE, *WAYS):
        pairs = [(found[way], found[ONE]) for found in seeds.values() if way in found]
        if len(pairs) < 2:
            continue
        runs = [run for run, _ in pairs]
        means[way] = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
        falls[way] = paired([run["rollout_gold_peak"] - run["rollout_gold_end"] for run in runs])
        if way == ONE:
            continue
        for key, by_way in differences.items():
            by_way[way] = paired([run[key] - one[key] for run, one in pairs])
    return {"means": means, "fall_from_peak": falls, "less_one": differences}


def write_rows(result: dict) -> None:
    """Write the lower ends of the intervals: above 0, an ensemble keeps more gold than one model."""
    rows = []
    places = {"gold_end": "at the end of PPO", "rollout_gold_late": "in the second half of PPO"}
    for key, place in places.items():
        for way, found in result["less_one"][key].items():
            what = (
                f"gold {place}, {way} of {MEMBERS} less one reward model, 25 % of labels turned round: "
                f"lower end of the interval over {len(found['values'])} seeds (mean {found['mean']:+.3f})"
            )
            rows.append(row_of(f"ensemble/{key}/{way}", what, found["low"], "> 0", COMMAND))
    add_rows(RESULTS / "reward.json", rows)


if __name__ == "__main__":
    main()
