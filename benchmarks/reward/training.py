"""What the options of reward training do: best model, folds, ties and length, on small real sets and
on the sandbox, where the true reward is known.

    RLHF_DATA=FOLDER python -m benchmarks.reward.training runs/reward-training [polite pandalm sandbox rows]

One process on one thread; every training leaves a file of numbers, and is not made again. `rows` writes
benchmarks/results/reward.json from them.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.paths import RESULTS
from benchmarks.programs import make_sandbox, rlhf
from benchmarks.result_rows import add_rows, row_of
from launch.reward import main as train_reward
from reward.compose import build_scorer
from reward.model import load_reward
from rlhf.data.encode import encode
from rlhf.data.load import load
from rlhf.data.records import Preference
from rlhf.data.store import Store
from rlhf.experiment import cross_validate as cv
from rlhf.jobs.state import PlanState
from rlhf.sandbox import CONFIGS
from rlhf.sandbox.annotators import Annotator, choose, gold_scores

SEEDS = (0, 1, 2)
# logits for each ten words more, and half the width of a tie in logits
PLANTED, TIES = 1.5, 0.5
COMMAND = "python -m benchmarks.reward.training runs/reward-training"
# of a reward model of the sandbox
MEASURED = (
    "accuracy_gold", "length_correlation", "length_correlation_given_gold", "gold_length_correlation",
    "log_loss", "accuracy", "mean_gap_of_ties", "mean_gap_of_others", "tie_parameter",
)  # fmt: skip
STORIES = {
    "use_peft": False, "on_error": "skip", "max_dropped": 1.0, "learning_rate": 1e-3,
    "per_device_train_batch_size": 8, "deepspeed": "zero0", "validation_fraction": 0.15,
    "test_fraction": 0.0,
}  # fmt: skip


def flags(values: dict[str, Any]) -> list[str]:
    words = []
    for name, value in values.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def once(file: Path, make) -> Any:
    """Return what `make()` returns, from the file where it was made before; with CPU seconds."""
    if not file.is_file():
        start = time.process_time()
        found = make()
        found["cpu_seconds"] = time.process_time() - start
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found) + "\n")
    found = json.loads(file.read_text())
    print(f"{file.stem}: { ({k: v for k, v in found.items() if k != 'folds'}) }", flush=True)
    return found


def folds_here(out: Path, name: str, options: dict[str, Any], folds: int) -> dict[str, Any]:
    """Cross-validate as the command does, in this process: it saves the import in each fold."""
    file = out / f"{name}.yaml"
    values = options | {"output_dir": str(out / name)}
    file.write_text(json.dumps(values))
    config = cv.CrossValidateConfig(reward_config=str(file), folds=folds)
    reward, folder = cv.reward_options(config)
    pairs = cv.read_pairs(reward, folder)
    fold_of = cv.deal_folds([pair.group for pair in pairs], folds)
    state = PlanState(folder)
    jobs = [cv.write_fold(reward, folder, pairs, fold_of, fold) for fold in range(folds)]
    state.set_jobs(jobs)
    rows, results = [], []
    for fold, job in enumerate(jobs):
        result = Path(job.outputs[0])
        if not result.is_file():
            train_reward(job.arguments)
        held_out = [pair for pair in pairs if fold_of[pair.group] == fold]
        rows += cv.fold_scores(reward, state, job, fold, held_out, load_reward)
        results.append(json.loads(result.read_text()))
    summary = cv.summarise(rows, results)
    losses = {}
    for row in rows:
        gap = row["chosen_score"] - row["rejected_score"]
        # the share of the votes for a side, whether ties were used or not
        p, half = row.get("label_prob", 1.0), row.get("tie_prob", 0.0) / 2
        p = (p - half) / (1 - 2 * half)
        losses[row["metadata"]["id"]] = p * np.logaddexp(0, -gap) + (1 - p) * np.logaddexp(0, gap)
    groups = {row["metadata"]["id"]: row["group"] for row in rows}
    return summary | {
        "losses": losses,
        "group_of": groups,
        "last_step": [r["held_out_losses"][-1:] for r in results],
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the mean difference in log-loss over pairs that both have, with its interval over groups."""
    shared = sorted(one["losses"].keys() & other["losses"].keys())
    values = np.array([one["losses"][i] - other["losses"][i] for i in shared])
    groups = np.array([one["group_of"][i] for i in shared])
    return cv.mean_over_groups(values, groups)


def mean_loss(one: dict[str, Any]) -> dict[str, Any]:
    """Return the mean log-loss over pairs, with its interval over groups."""
    return difference(one, one | {"losses": dict.fromkeys(one["losses"], 0.0)})


def polite(out: Path) -> None:
    """k-fold, and the best model against the last of five epochs, on 300 pairs of one house style."""
    data = f"{os.environ['RLHF_DATA']}/pref_rasbt_polite.jsonl"
    options = STORIES | {
        "model_name_or_path": f"{os.environ['RLHF_DATA']}/models/stories260K",
        "data": [data], "limit": 300, "max_prompt_length": 128, "max_response_length": 96,
        "num_train_epochs": 6, "eval_steps": 10, "lr_scheduler_type": "constant",
    }  # fmt: skip
    once(out / "polite-last.json", lambda: folds_here(out, "polite-last", options, 5))
    stopped = options | {"early_stopping_patience": 3}
    once(out / "polite-best.json", lambda: folds_here(out, "polite-best", stopped, 5))


def pandalm(out: Path) -> None:
    """Votes of three people with ties: dropped, a chance of one half, a third outcome."""
    data = Path(os.environ["RLHF_DATA"]) / "pref_pandalm_human.jsonl"
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for kind in ("dropped", "used"):
        rows = []
        for line in lines:
            if not line["chosen"].strip() or not line["rejected"].strip():
                continue
            count = Counter(line["votes"])
            # the file's chosen answer is that of the majority
            winner = 1 if count[1] > count[2] else 2
            votes = {"chosen": count[winner], "rejected": count[3 - winner]}
            if kind == "used":
                votes["tie"] = count[0]
            keys = ("prompt", "chosen", "rejected", "id")
            rows.append({key: line[key] for key in keys} | {"votes": votes})
        out.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"pandalm-{kind}.jsonl").write_text(text)
    options = STORIES | {
        "model_name_or_path": f"{os.environ['RLHF_DATA']}/models/stories260K",
        "max_prompt_length": 192, "max_response_length": 192, "num_train_epochs": 2,
        "eval_steps": 10, "load_best_model_at_end": True,
    }  # fmt: skip
    for name, kind, ties in (
        ("dropped", "dropped", "drop"),
        ("soft", "used", "soft"),
        ("davidson", "used", "davidson"),
    ):
        own = options | {"data": [str(out / f"pandalm-{kind}.jsonl")], "ties": ties}
        once(
            out / f"pandalm-{name}.json",
            lambda o=own, n=name: folds_here(out, f"pandalm-{n}", o, 3),
        )
    own = options | {"data": [str(out / "pandalm-dropped.jsonl")], "load_best_model_at_end": False}
    once(out / "pandalm-last.json", lambda: folds_here(out, "pandalm-last", own, 3))


def sandbox(out: Path) -> None:
    """Length planted in the votes and not, learnt plainly and corrected; ties dropped and used."""
    pairs = sandbox_pairs(out)
    for seed in SEEDS:
        for bias in (0.0, PLANTED):
            data = vote(out, pairs, seed, bias)
            for corrected in (False, True):
                name = f"sandbox-{'planted' if bias else 'clean'}-{'corrected' if corrected else 'plain'}-{seed}"
                more = {"length_correction": corrected, "seed": seed}
                once(
                    out / f"{name}.json",
                    lambda n=name, d=data, m=more: sandbox_run(out, n, d, m, pairs),
                )
        for ties in ("soft", "davidson"):
            data = vote(out, pairs, seed, 0.0)
            name, more = f"sandbox-ties-{ties}-{seed}", {"ties": ties, "seed": seed}
            once(
                out / f"{name}.json",
                lambda n=name, d=data, m=more: sandbox_run(out, n, d, m, pairs),
            )


def sandbox_pairs(out: Path) -> list[dict[str, Any]]:
    """Return pairs of answers of the sandbox's SFT policy with the true score of both."""
    make_sandbox(out)
    world, store = out / "world", out / "pairs.db"
    if not (out / "sampled").is_file():
        for file in out.glob("pairs.db*"):
            file.unlink()
        source = ["--model_name_or_path", f"{out}/sft", "--data", f"{world}/prompts.jsonl"]
        options = ["--config", f"{CONFIGS}/sample.yaml", "--store", str(store)]
        rlhf("collect", "sample", *source, *options)
        (out / "sampled").touch()
    with Store.open(store, readonly=True) as opened:
        pairs = list(opened.at().pairs().values())
    gold = gold_scores(pairs, build_scorer([{"voice": str(world / "voice.yaml")}]))
    for pair in pairs:
        pair["gold"] = gold[pair["id"]]
    return [pair for pair in pairs if pair["text_a"].strip() and pair["text_b"].strip()]


def vote(out: Path, pairs: list[dict[str, Any]], seed: int, bias: float) -> str:
    """Write one vote a pair by an annotator with this length bias, ties among them."""
    annotator = Annotator("one", length_bias=bias, ties=TIES, skips=0.0, strict=-1.0)
    lines = []
    for pair in pairs:
        texts = {side: pair[f"text_{side}"] for side in "ab"}
        if texts["a"] == texts["b"]:
            continue
        words = (len(texts["a"].split()), len(texts["b"].split()))
        rng = random.Random(f"{seed} {pair['id']}")
        choice = choose(annotator, pair["gold"], words, "a", 0.2, rng).choice
        winner, loser = ("b", "a") if choice == "b" else ("a", "b")
        row = {"prompt": pair["messages"], "chosen": texts[winner], "rejected": texts[loser]}
        row |= {"id": pair["id"], "winner": winner, "group": pair["metadata"]["group"]}
        if choice == "tie":
            row["tie_prob"] = 1.0
        lines.append(json.dumps(row) + "\n")
    file = out / f"votes-{bias:g}-{seed}.jsonl"
    file.write_text("".join(lines))
    return str(file)


def sandbox_run(
    out: Path, name: str, data: str, more: dict[str, Any], pairs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Train one reward model, and measure it on held-out pairs against votes and the true reward."""
    folder = out / name
    if not (folder / "result.json").is_file():
        start = {"model_name_or_path": str(out / "sft"), "data": [data], "output_dir": str(folder)}
        held_out = {"validation_fraction": 0.25, "test_fraction": 0.0, "max_dropped": 1.0}
        train_reward(["--config", str(CONFIGS / "reward.yaml"), *flags(start | held_out | more)])
    records = load(
        data, Preference, split="validation", validation_fraction=0.25, test_fraction=0.0
    )
    model = load_reward(str(folder), "cpu")
    rows, _ = encode(records, model.tokenizer, 64, 48)
    ids = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
    scores = np.array(model.score_ids(ids)) / model.scale
    chosen, rejected = scores[: len(rows)], scores[len(rows) :]
    gold_of = {pair["id"]: pair["gold"] for pair in pairs}
    # a less b, not chosen less rejected: which one is called chosen depends on the votes
    sign = np.array([1.0 if row["record"].metadata["winner"] == "a" else -1.0 for row in rows])
    gap = sign * (chosen - rejected)
    length = sign * np.array([len(r["chosen_ids"]) - len(r["rejected_ids"]) for r in rows])
    gold = np.array([gold_of[r["record"].metadata["id"]] for r in rows])
    gold = gold[:, 0] - gold[:, 1]
    decided = np.array([row["record"].has_winner for row in rows])
    losses = np.logaddexp(0, -(chosen - rejected))[decided]
    clear = gold != 0
    right = (np.sign(gap) == np.sign(gold))[clear]
    result = json.loads((folder / "result.json").read_text())
    return {
        "accuracy_gold": float(right.mean()),
        "length_correlation": correlation(gap, length),
        "length_correlation_given_gold": partial(gap, length, gold),
        "gold_length_correlation": correlation(gold, length),
        "log_loss": float(losses.mean()),
        "accuracy": float(((chosen - rejected)[decided] > 0).mean()),
        "mean_gap_of_ties": float(np.abs(gap[~decided]).mean()),
        "mean_gap_of_others": float(np.abs(gap[decided]).mean()),
        "ties": int((~decided).sum()),
        "pairs": len(rows),
        "tie_parameter": result["tie_parameter"],
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def partial(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> float:
    """Return the correlation of x and y once the straight line in z is taken out of both."""
    design = np.column_stack([z, np.ones_like(z)])
    rest = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    return correlation(*rest)


class Rows:
    """Rows of results from the files of numbers in a folder."""

    def __init__(self, out: Path):
        self.out = out
        self.rows: list[dict[str, Any]] = []

    def read(self, name: str) -> dict[str, Any]:
        return json.loads((self.out / f"{name}.json").read_text())

    def over_seeds(self, kind: str, key: str) -> np.ndarray:
        return np.array([self.read(f"sandbox-{kind}-{seed}")[key] for seed in SEEDS])

    def change(self, kind: str, other: str, key: str) -> float:
        """Return the mean over seeds of one kind less another."""
        return float((self.over_seeds(kind, key) - self.over_seeds(other, key)).mean())

    def add(self, id: str, what: str, value: float, bound: str) -> None:
        self.rows.append(row_of(f"training-{id}", what, value, bound, COMMAND))


def polite_rows(found: Rows) -> None:
    last, best = found.read("polite-last"), found.read("polite-best")
    gain = difference(best, last)
    for name, part in (("last", last), ("best", best)):
        print("polite", name, part["log_loss"], part["accuracy"], part["last_step"], part["folds"])
    print("polite, best less last", gain)
    text = "300 polite pairs, 5 folds, out of fold"
    found.add(
        "early-stopping",
        f"{text}: log-loss, best model less last, upper end of 95 %",
        gain["high"],
        "< 0",
    )
    found.add(
        "folds-accuracy", f"{text}: accuracy, lower end of 95 %", best["accuracy"]["low"], "> 0.5"
    )
    spread = best["log_loss"]["spread"] / best["log_loss"]["expected_spread"]
    found.add(
        "folds-spread",
        f"{text}: spread of log-loss between folds over that of their pairs alone",
        spread,
        "<= 2",
    )


def pandalm_rows(found: Rows) -> None:
    dropped, last = found.read("pandalm-dropped"), found.read("pandalm-last")
    for name, part in (("dropped", dropped), ("last", last)):
        print("pandalm", name, mean_loss(part), part["accuracy"])
    gain = difference(dropped, last)
    print("pandalm, best less last", gain)
    text = "PandaLM, 3 folds, out of fold: log-loss, best model less last, upper end of 95 %"
    found.add("best-pandalm", text, gain["high"], "< 0")
    for ties in ("soft", "davidson"):
        used = found.read(f"pandalm-{ties}")
        change = difference(used, dropped)
        print("pandalm", ties, mean_loss(used), used["accuracy"], change)
        text = f"PandaLM, out-of-fold log-loss, ties {ties} less dropped, upper end of 95 %"
        found.add(f"ties-pandalm-{ties}", text, change["high"], "< 0")


def sandbox_rows(found: Rows) -> None:
    kinds = [f"{data}-{how}" for data in ("clean", "planted") for how in ("plain", "corrected")]
    for kind in (*kinds, "ties-soft", "ties-davidson"):
        print(kind, {key: found.over_seeds(kind, key).tolist() for key in MEASURED})
    given = "length_correlation_given_gold"
    sizes = [
        abs(found.over_seeds(f"planted-{how}", given).mean()) for how in ("corrected", "plain")
    ]
    text = f"sandbox, {PLANTED} logits for ten words planted, 3 seeds"
    found.add("length-planted", f"{text}: |partial correlation of score and length|, corrected over plain",
              float(sizes[0] / sizes[1]), "<= 0.5")  # fmt: skip
    for data, bound in (("planted", ">= 0"), ("clean", ">= -0.01")):
        text = f"sandbox, {data}, 3 seeds: accuracy by the true reward, corrected less plain"
        change = found.change(f"{data}-corrected", f"{data}-plain", "accuracy_gold")
        found.add(f"length-{data}-accuracy", text, change, bound)
    for ties in ("soft", "davidson"):
        change = found.change(f"ties-{ties}", "clean-plain", "log_loss")
        text = f"sandbox, log-loss of held-out votes for a side, ties {ties} less dropped, 3 seeds"
        found.add(f"ties-sandbox-{ties}", text, change, "< 0")


def write_rows_of_results(out: Path) -> None:
    """Print the tables, and write the rows of what has been measured."""
    found = Rows(out)
    for add in (polite_rows, pandalm_rows, sandbox_rows):
        try:
            add(found)
        except FileNotFoundError as missing:
            print(f"not measured yet: {missing.filename}")
    add_rows(RESULTS / "reward.json", found.rows)


STAGES = {"polite": polite, "sandbox": sandbox, "pandalm": pandalm, "rows": write_rows_of_results}


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for name in sys.argv[2:] or STAGES:
        STAGES[name](out)


if __name__ == "__main__":
    main()
