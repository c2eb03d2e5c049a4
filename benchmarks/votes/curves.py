"""Which pairs to put to a vote: gold of the policy against simulated votes spent, by rule.

    python -m benchmarks.votes.curves FOLDER [--seeds 5]     # resumes; about 10 CPU minutes

The sandbox, its smallest base and one SFT policy. Each seed samples a pool of answers of its own, and
has every pair of the pool judged once by the simulated annotators: a pair gets the same vote by
whichever rule it is chosen. FIRST random pairs are the first votes. In rounds of ROUND votes each
rule of `rlhf collect sample --select` then chooses, by an ensemble that has learnt from the votes so
far. A vote without a winner (equal, both bad, skipped) is spent too, and teaches nothing.

A reward model here is a linear head on the mean of the SFT policy's last hidden states, fitted by
Bradley and Terry's likelihood with a ridge; of the ensemble, each member to a bootstrap sample of the
votes (Christiano et al. 2017). Heads on a frozen trunk are those of Dwaracherla et al. (2024, arXiv
2402.00396), and so is the policy: the best of SAMPLES answers of the SFT policy by a reward model of
all votes. Its gold is the true score of the answers chosen, on PROMPTS test prompts that nothing
learns from. A seed's curve is the mean of REPEATS that differ in first votes, draws and bootstrap.

Do the votes teach the project's own reward models as much? CHECKED votes that a rule has chosen, in a
seed's first CHECKS repeats, also train an adapter with its head (reward.model).
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.programs import folder_and_seeds, make_sandbox, rlhf
from rlhf.collect.select import choose, worth
from rlhf.files import write_atomic
from rlhf.sandbox import CONFIGS

RULES = ("uncertainty", "disagreement", "margin", "random")
# votes: the first, those of a round, and all
FIRST, ROUND, LAST = 50, 50, 450
REPEATS, MEMBERS = 20, 8
# of the pool of a seed
POOL = {"prompts": 600, "samples_per_prompt": 3}
# of the policy that is measured
PROMPTS, SAMPLES = 128, 8
# found, as the layer was, with random votes on a seed that is not measured
RIDGE = 100.0
# votes and repeats in which an adapter is trained, and how: about the sandbox's reward.yaml
CHECKED, CHECKS = 250, 3
STEPS, BATCH, LEARNING_RATE, WARMUP = 40, 16, 2e-3, 5
MAX_PROMPT, MAX_RESPONSE = 64, 48


@dataclass(frozen=True)
class Pool:
    """The pairs of a seed, all of them judged beforehand; a rule sees the votes that it pays for.

    ids: of A answers, their prompts included. features: (A, D). pairs: (P, 2) numbers of answers.
    prompts: P, of each pair. labels: (P,) 1 where the vote is for the first answer, -1 for the
    second, 0 without a winner. gaps: (P,) |gold of one - gold of the other|.
    """

    ids: list[list[int]]
    features: np.ndarray
    pairs: np.ndarray
    prompts: list[int]
    labels: np.ndarray
    gaps: np.ndarray


@dataclass(frozen=True)
class Answers:
    """SAMPLES answers of the SFT policy to each of PROMPTS test prompts: ids, prompt by prompt;
    features (prompts * samples, D) in units of `spread`, their deviations over these answers; gold
    (prompts, samples).
    """

    ids: list[list[int]]
    features: np.ndarray
    spread: np.ndarray
    gold: np.ndarray


def main() -> None:
    folder, count = folder_and_seeds(__doc__)
    with contextlib.chdir(folder):
        make_sandbox(Path())
        seeds = [{"curves": measure_seed(seed)} for seed in range(count)]
        # a repeat of all seeds before the next, so that a call that was cut off has whole ones
        for number in range(CHECKS):
            for seed in range(count):
                golds = check_adapters(seed, number)
                seeds[seed]["adapters"] = {rule: statistics.fmean(golds[rule]) for rule in RULES}
        gold = test_answers().gold

    from benchmarks.votes.curves_page import write_all

    write_all(seeds, {"mean": float(gold.mean()), "best": float(gold.max(axis=1).mean())})


def measure_seed(seed: int) -> dict[str, list[dict[str, float]]]:
    """Return rule -> its curve, measured once.

    A curve has points {votes, gold, without_winner, gold_gap}, means over repeats; the latter two
    are of the votes that the round added.
    """
    file = Path(f"seed-{seed}") / "curves.json"
    if not file.is_file():
        pool, test = read_pool(seed), test_answers()
        found = {}
        for rule in RULES:
            curves = [grow(pool, rule, f"{seed} {number}", test)[1] for number in range(REPEATS)]
            points = list(map(mean_point, zip(*curves, strict=True)))
            found[rule] = points
            print(f"seed {seed}, {rule}: gold {points[-1]['gold']:.3f}", flush=True)
        write_atomic(file, json.dumps(found) + "\n")
    return json.loads(file.read_text())


def mean_point(points: tuple[dict[str, float], ...]) -> dict[str, float]:
    """Return the mean over repeats of points of as many votes."""
    means = {}
    for name in points[0]:
        means[name] = statistics.fmean(point[name] for point in points)
    return means


def grow(
    pool: Pool, rule: str, name: str, test: Answers
) -> tuple[list[int], list[dict[str, float]]]:
    """Return the pairs put to a vote by a rule, in their order, and the points of its curve.

    name: of seed and repeat; the first votes and all draws depend on it alone, and are the same for
    every rule.
    """
    draw = random.Random(f"votes {name}")
    first = choose([draw.random() for _ in pool.prompts], pool.prompts, FIRST)
    drawn = [draw.random() for _ in pool.prompts]
    chosen, added = list(first), first
    points = []
    while True:
        points.append(point(pool, chosen, added, test))
        if len(chosen) >= LAST:
            return chosen, points
        values = drawn
        if rule != "random":
            values = worth(rule, ensemble_scores(pool, chosen, name), pool.pairs.tolist())
        asked = set(chosen)
        free = [number for number in range(len(pool.prompts)) if number not in asked]
        places = choose(
            [values[number] for number in free],
            [pool.prompts[number] for number in free],
            ROUND,
            Counter(pool.prompts[number] for number in chosen),
        )
        added = [free[place] for place in places]
        chosen += added


def ensemble_scores(pool: Pool, chosen: list[int], name: str) -> np.ndarray:
    """Return (MEMBERS, answers of the pool): scores by heads that each learnt from a bootstrap
    sample of the votes with a winner.
    """
    draw = np.random.default_rng(list(f"{name} {len(chosen)}".encode()))
    votes = differences(pool, chosen)
    scores = []
    for _ in range(MEMBERS):
        sample = votes[draw.integers(0, len(votes), len(votes))]
        scores.append(pool.features @ fit_head(sample, RIDGE))
    return np.array(scores)


def differences(pool: Pool, chosen: list[int]) -> np.ndarray:
    """Return the features of the better answer less those of the other, of the votes with a winner."""
    numbers = np.array(chosen)
    numbers = numbers[pool.labels[numbers] != 0]
    one, other = pool.pairs[numbers].T
    return pool.labels[numbers, None] * (pool.features[one] - pool.features[other])


def fit_head(better: np.ndarray, ridge: float, steps: int = 8) -> np.ndarray:
    """Return the head w (D,) of Bradley and Terry's model, by Newton's method:

        min_w  sum_i log(1 + exp(-x_i . w)) + ridge / 2 |w|^2

    better: (n, D) rows x_i, the features of the better answer less those of the other.
    """
    head = np.zeros(better.shape[1])
    for _ in range(steps):
        wrong = 1 / (1 + np.exp(better @ head))
        gradient = ridge * head - better.T @ wrong
        weighted = better * (wrong * (1 - wrong))[:, None]
        head = head - np.linalg.solve(weighted.T @ better + ridge * np.eye(len(head)), gradient)
    return head


def point(pool: Pool, chosen: list[int], added: list[int], test: Answers) -> dict[str, float]:
    """Return votes, gold of the policy, and what the votes that were added were like."""
    scores = test.features @ fit_head(differences(pool, chosen), RIDGE)
    return {
        "votes": len(chosen),
        "gold": best_gold(scores, test.gold),
        "without_winner": float(np.mean(pool.labels[added] == 0)),
        "gold_gap": float(np.mean(pool.gaps[added])),
    }


def best_gold(scores: np.ndarray, gold: np.ndarray) -> float:
    """Return the mean gold of each prompt's answer of the highest score; gold: (prompts, samples)."""
    best = scores.reshape(gold.shape).argmax(axis=1)
    return float(np.take_along_axis(gold, best[:, None], axis=1).mean())


@functools.cache
def test_answers() -> Answers:
    """Return the answers among which a policy chooses, drawn once for all seeds and rules."""
    from reward.compose import build_scorer
    from rlhf.best_of_n.samples import Drawing, sample_answers, samples_of
    from rlhf.data.encode import encode_prompts
    from rlhf.data.load import load
    from rlhf.data.records import Prompt
    from rlhf.engines.sampling import Sampling
    from rlhf.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("sft")
    records = load(["world/prompts.jsonl"], Prompt, split="test")
    prompts = encode_prompts(records[:PROMPTS], tokenizer, MAX_PROMPT)
    drawing = Drawing("sft", Sampling(MAX_RESPONSE, 1.0), SAMPLES, 0, MAX_PROMPT, 256)
    samples = samples_of(sample_answers(Path("test.jsonl"), drawing, prompts, tokenizer))
    gold = build_scorer([{"voice": "world/voice.yaml"}])(samples).total
    columns = zip(samples.prompt_ids, samples.response_ids, strict=True)
    ids = [prompt + answer for prompt, answer in columns]
    states = mean_states(ids)
    spread = states.std(axis=0)
    return Answers(ids, states / spread, spread, np.reshape(gold, (-1, SAMPLES)))


@functools.lru_cache(maxsize=1)
def read_pool(seed: int) -> Pool:
    """Return the seed's pairs with one simulated vote on each; they are sampled and judged once."""
    from reward.compose import build_scorer
    from rlhf.data.encode import encode_prompt, encode_response
    from rlhf.data.store import Store
    from rlhf.model.tokenizer import load_tokenizer
    from rlhf.sandbox.annotators import gold_scores

    with Store.open(make_store(seed)) as store:
        pairs = store.at().pairs()
        votes = {vote.comparison: vote.choice for vote in store.at().votes()}
    gold = gold_scores(list(pairs.values()), build_scorer([{"voice": "world/voice.yaml"}]))
    tokenizer = load_tokenizer("sft")
    places: dict[tuple[int, str], int] = {}
    ids, both = [], []
    for pair in pairs.values():
        for side in "ab":
            key = (pair["prompt"], pair[f"text_{side}"])
            if key not in places:
                places[key] = len(ids)
                answer = encode_response(tokenizer, key[1], pair[f"ended_{side}"] != 0)
                ids.append(encode_prompt(tokenizer, pair["messages"]) + answer)
            both.append(places[key])
    signs = {"a": 1, "b": -1}
    return Pool(
        ids=ids,
        # a shift would cancel in every difference of two answers
        features=mean_states(ids) / test_answers().spread,
        pairs=np.reshape(both, (-1, 2)),
        prompts=[pair["prompt"] for pair in pairs.values()],
        labels=np.array([signs.get(votes[number], 0) for number in pairs]),
        gaps=np.array([abs(gold[number][0] - gold[number][1]) for number in pairs]),
    )


def make_store(seed: int) -> Path:
    """Return the store of a seed's pool, every pair of it with one simulated vote."""
    folder = Path(f"seed-{seed}")
    store, started = folder / "pool.db", folder / "new.db"
    if not store.is_file():
        folder.mkdir(exist_ok=True)
        started.unlink(missing_ok=True)
        sizes = []
        for name, value in POOL.items():
            sizes += [f"--{name}", str(value)]
        own = ["--store", str(started), "--seed", str(seed)]
        source = ["--model_name_or_path", "sft", "--data", "world/prompts.jsonl"]
        rlhf("collect", "sample", "--config", f"{CONFIGS}/sample.yaml", *source, *sizes, *own)
        rlhf("sandbox", "annotate", "--voice", "world/voice.yaml", *own)
        started.replace(store)
    return store


def mean_states(ids: list[list[int]], batch_size: int = 64) -> np.ndarray:
    """Return (B, D): the mean over all tokens of the SFT policy's last hidden states."""
    import torch

    from rlhf.tensors import pad_right

    model, rows = sft_policy(), []
    with torch.no_grad():
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            mask = pad_right([[1] * len(row) for row in part])
            inputs = {"input_ids": pad_right(part, 0), "attention_mask": mask}
            states = model(**inputs, output_hidden_states=True).hidden_states[-1]
            counts = mask.sum(1, keepdim=True)
            rows.append((states * mask[..., None]).sum(1) / counts)
    return torch.cat(rows).double().numpy()


@functools.cache
def sft_policy() -> Any:
    from rlhf.model.loading import load_model, trainable_policy

    return trainable_policy(load_model("sft", "float32"), None).eval()


def check_adapters(seed: int, number: int) -> dict[str, list[float]]:
    """Return rule -> gold of the policy by an adapter that learnt from its votes, of each repeat up
    to this one; measured once.
    """
    file = Path(f"seed-{seed}") / "adapters.json"
    golds = json.loads(file.read_text()) if file.is_file() else {rule: [] for rule in RULES}
    for rule in RULES:
        if len(golds[rule]) > number:
            continue
        pool = read_pool(seed)
        chosen, _ = grow(pool, rule, f"{seed} {number}", test_answers())
        golds[rule].append(adapter_gold(pool, chosen[:CHECKED], seed + 100 * number))
        write_atomic(file, json.dumps(golds) + "\n")
        print(f"seed {seed}, {number}, {rule}: adapter {golds[rule][-1]:.3f}", flush=True)
    return golds


def adapter_gold(pool: Pool, chosen: list[int], seed: int) -> float:
    """Return the gold of the best of n by the project's reward model, trained on these votes."""
    from reward.model import raw_scores

    rows = []
    for number in chosen:
        pair = pool.pairs[number][:: pool.labels[number] or 1]
        if pool.labels[number]:
            rows.append({"chosen_ids": pool.ids[pair[0]], "rejected_ids": pool.ids[pair[1]]})
    model, pad = train_adapter(rows, seed)
    test = test_answers()
    return best_gold(np.array(raw_scores(model, test.ids, pad, 64)), test.gold)


def train_adapter(rows: list[dict[str, list[int]]], seed: int) -> tuple[Any, int]:
    """Return a reward model from the SFT policy with a fresh head after STEPS steps of AdamW, and
    its padding token.
    """
    import torch

    from reward.model import trainable_reward
    from reward.objective import reward_loss
    from reward.trainer import PairCollator
    from rlhf.model.loading import load_model

    # loaded again, since a reward model grows on the very object
    initial = load_model("sft", "float32")
    model, draw = trainable_reward(initial, None, seed), random.Random(f"batches {seed}")
    trained = [weights for weights in model.parameters() if weights.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    collate = PairCollator(initial.tokenizer.pad_token_id)
    left: list[dict[str, list[int]]] = []
    for step in range(STEPS):
        while len(left) < BATCH:
            left += draw.sample(rows, len(rows))
        batch, left = collate(left[:BATCH]), left[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * (1 - step / STEPS)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        chosen, rejected = model(**inputs, use_cache=False, paired=True).logits.squeeze(-1).chunk(2)
        loss, _ = reward_loss(chosen, rejected, center_coefficient=0.01)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), initial.tokenizer.pad_token_id


if __name__ == "__main__":
    main()
