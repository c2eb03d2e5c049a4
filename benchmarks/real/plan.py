"""What `make real` will cost, before anything is started: FLOPs of each stage from the configs, and hours.

FLOPs are those of the matrix products, as the programs count them (rlhf/runs/budget.py); attention,
3 % at these lengths, is left out. The lengths of texts are means over the brand's data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from benchmarks.paths import ROOT
from benchmarks.speed.gpu_shapes import QwenShape
from benchmarks.speed.required_flops import Products
from rlhf.config import parse
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.plan import PILOT_STEPS
from rlhf.text import markdown_table

DATA = ROOT / "rlhf" / "brand_data" / "outdoor"

# a Llama with the head of its embeddings, as Qwen3 is but for norms
MODEL = QwenShape(
    "SmolLM2-135M", 576, 30, 1536, heads=9, kv_heads=3, head_width=64, vocabulary=49_152
)
# tokens by its tokenizer, with its chat template: of a question, of an answer, of a dialogue
QUESTION, ANSWER, DIALOGUE = 55, 50, 230
# FLOPs that a core makes in a second, over whole programs: in bfloat16 on a CPU with AVX512-BF16, and in
# float32 on one with AVX2 alone
RATES = {"bfloat16": 120e9, "float32": 40e9}
# of the pairs that are judged: one vote in eight says neither, and one pair in eight is held out
TRAINED_ON = 0.77
CORES = 2


@dataclass(frozen=True)
class Stage:
    """One kind of work: what, how many positions (tokens of prompt and response), its FLOPs."""

    name: str
    what: str
    positions: float
    flops: float


def forward(positions: float, head: float, rank: int) -> float:
    """Return the FLOPs of a pass over `positions`, of which `head` get logits."""
    return Products.of(MODEL, rank).forward(positions, 0, head, adapted=True)


def learning(positions: float, head: float, rank: int) -> float:
    """Return the FLOPs of a pass forth and back; of the weights the adapter alone has gradients."""
    back = Products.of(MODEL, rank).backward_lora(positions, 0, head)
    return forward(positions, head, rank) + back


def plan(config: ExperimentConfig, sft: dict) -> list[Stage]:
    """Return the stages of SFT and of an experiment with one swept value a method."""
    rank, seeds = sft["lora_r"], len(config.seeds)
    pairs, reward = pairs_stage(config, rank), reward_stage(config, rank)
    stages = [sft_stage(sft), pairs, reward]
    for method in config.method_specs.values():
        options = options_of(method) if method.program else {}
        if method.program == "dpo":
            left = config.budget["total"] - pairs.flops / seeds
            stages += [dpo_stage(left, pair_count(config), reference_count(config), seeds, rank)]
            stages += [dpo_pilot(options, rank)]
        elif method.program == "ppo":
            left = config.budget["total"] - (pairs.flops + reward.flops) / seeds
            stages += [ppo_stage(left, options, seeds, rank), ppo_pilot(options, rank)]
    return [*stages, measuring_stage(config, rank)]


def pairs_stage(config: ExperimentConfig, rank: int) -> Stage:
    """Return the sampling of the answers to be judged; it passes over each position once."""
    prompts, samples = sampled(config)
    answers, seeds = prompts * samples, len(config.seeds)
    positions = answers * (QUESTION + ANSWER)
    flops = forward(positions, answers * ANSWER, rank)
    return Stage("pairs", f"{answers} answers a seed", positions * seeds, flops * seeds)


def reward_stage(config: ExperimentConfig, rank: int) -> Stage:
    options, pairs, seeds = options_of(config.reward), pair_count(config), len(config.seeds)
    positions = pairs * options["num_train_epochs"] * 2 * (QUESTION + ANSWER)
    flops = learning(positions, 0, rank)
    return Stage("reward model", f"{pairs} pairs a seed", positions * seeds, flops * seeds)


def sampled(config: ExperimentConfig) -> tuple[int, int]:
    """Return of how many prompts how many answers each are judged, two and two."""
    sample = read(config.pairs["sample"])
    every = rows("questions", "train") + rows("questions", "validation")
    return sample.get("prompts", every), sample["samples_per_prompt"]


def pair_count(config: ExperimentConfig) -> int:
    """Return about how many pairs of a seed are trained on."""
    prompts, samples = sampled(config)
    return round(prompts * samples * (samples - 1) / 2 * TRAINED_ON)


def reference_count(config: ExperimentConfig) -> int:
    """Return about how many pairs of a seed need a pass of DPO's reference: all answers but the
    first to a prompt are new in one, held-out pairs included.
    """
    prompts, samples = sampled(config)
    return prompts * (samples - 1)


def options_of(part: Any) -> dict[str, Any]:
    """Return the options of a method, or of the reward model, from its file and its own."""
    spec = part if isinstance(part, dict) else {"config": part.config, "options": part.options}
    return read(spec["config"]) | spec.get("options", {})


def sft_stage(sft: dict) -> Stage:
    single, dialogues = rows("answers", "train"), rows("dialogues", "train")
    positions = sft["num_train_epochs"] * (single * (QUESTION + ANSWER) + dialogues * DIALOGUE)
    # of a dialogue about half the tokens are the brand's
    head = sft["num_train_epochs"] * (single * ANSWER + dialogues * DIALOGUE / 2)
    what = f"{single} answers, {dialogues} dialogues, {sft['num_train_epochs']} epochs"
    return Stage("SFT", what, positions, learning(positions, head, sft["lora_r"]))


def dpo_stage(left: float, count: int, references: int, seeds: int, rank: int) -> Stage:
    """Return DPO on `count` pairs, as long as the FLOPs that are left to a run allow.

    A run of a whole pass computes the reference of `references` pairs once, a shorter one in each
    step.
    """
    learnt, reference = dpo_pair_flops(rank)
    seen = (left - references * reference) / learnt
    if seen < count:
        seen = left / (learnt + reference)
    what = f"{seen:.0f} pairs a seed, {seen / count:.1f} epochs"
    return Stage("DPO", what, seeds * seen * 2 * (QUESTION + ANSWER), seeds * left)


def dpo_pilot(options: dict, rank: int) -> Stage:
    batch = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    pairs = PILOT_STEPS["dpo"] * batch
    flops = pairs * sum(dpo_pair_flops(rank))
    return Stage("DPO's pilot", f"{pairs} pairs", pairs * 2 * (QUESTION + ANSWER), flops)


def dpo_pair_flops(rank: int) -> tuple[float, float]:
    """Return the FLOPs of learning from one pair, and those of the reference's pass over it."""
    positions, head = 2 * (QUESTION + ANSWER), 2 * ANSWER
    # TRL's head makes its logits once more on the way back
    return learning(positions, 1.5 * head, rank), forward(positions, head, rank)


def ppo_stage(left: float, options: dict, seeds: int, rank: int) -> Stage:
    """Return PPO, as long as the FLOPs that are left to a run allow."""
    one, answers = ppo_update_flops(options, rank), options["rollout_batch_size"]
    updates = int(left // one)
    positions = updates * answers * (QUESTION + ANSWER)
    what = f"{updates} updates of {answers} answers a seed"
    return Stage("PPO", what, positions * seeds, updates * one * seeds)


def ppo_pilot(options: dict, rank: int) -> Stage:
    updates = PILOT_STEPS["ppo"]
    positions = updates * options["rollout_batch_size"] * (QUESTION + ANSWER)
    flops = updates * ppo_update_flops(options, rank)
    return Stage("PPO's pilot", f"{updates} updates", positions, flops)


def ppo_update_flops(options: dict, rank: int) -> float:
    """Return the FLOPs of one update: sampling, reference, reward model, and the epochs."""
    answers = options["rollout_batch_size"]
    positions, head = answers * (QUESTION + ANSWER), answers * ANSWER
    measured = 2 * forward(positions, head, rank) + forward(positions, 0, rank)
    return measured + options["num_ppo_epochs"] * learning(positions, head, rank)


def measuring_stage(config: ExperimentConfig, rank: int) -> Stage:
    """Return the measuring of all policies: sampling, KL by two passes, the reward model."""
    seeds, prompts = len(config.seeds), config.n_prompts or rows("questions", "test")
    trials = len(config.trained) * seeds * config.checkpoints
    answers = prompts * trials * config.samples_per_prompt
    pool = prompts * config.pool
    positions = (answers + pool) * (QUESTION + ANSWER)
    sampled = 3 * forward(positions, (answers + pool) * ANSWER, rank)
    # each seed's reward model scores the initial policy's answers
    scored = forward((answers + seeds * pool) * (QUESTION + ANSWER), 0, rank)
    what = f"{trials} policies, {answers + pool} answers"
    return Stage("measuring", what, positions, sampled + scored)


def read(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text())


def rows(name: str, split: str) -> int:
    """Return how many rows of a file of the brand are in a split."""
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["split"] == split for line in lines)


def hours(flops: float, dtype: str = "bfloat16") -> float:
    return flops / (RATES[dtype] * CORES) / 3600


def table(stages: list[Stage]) -> list[str]:
    """Return the plan as a Markdown table with its sum."""
    total = sum(stage.flops for stage in stages)
    cells = [
        (stage.name, stage.what, f"{stage.positions:,.0f}", *cost_cells(stage.flops))
        for stage in stages
    ]
    cells.append(("all", "", "", *cost_cells(total)))
    times = (f"hours on {CORES} cores, {dtype}" for dtype in RATES)
    return markdown_table(
        ("stage", "what", "tokens", "TFLOP", *times), cells, right=range(2, 4 + len(RATES))
    )


def cost_cells(flops: float) -> list[str]:
    return [f"{flops / 1e12:,.0f}", *(f"{hours(flops, dtype):.2f}" for dtype in RATES)]


def planned() -> list[Stage]:
    """Return the plan of configs/experiments/real.yaml."""
    file = str(ROOT / "configs" / "experiments" / "real.yaml")
    config = parse(ExperimentConfig, ["--config", file])
    return plan(config, read("configs/real/sft.yaml"))
