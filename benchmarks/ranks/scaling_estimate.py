"""What 8, 64 and 512 GPUs would make of a run, on paper: measured traffic, assumed links and rates.

    python -m benchmarks.ranks.scaling_estimate     # seconds; reads benchmarks/results/communication.json

Writes benchmarks/results/2026-11-29-scaling-estimate.md and rows of benchmarks/results/ranks.json. Nothing here has run
on a GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.paths import RESULTS
from benchmarks.ranks.communication import EMBEDDINGS
from benchmarks.result_rows import add_rows
from rlhf.text import markdown_table

PAGE = RESULTS / "2026-11-29-scaling-estimate.md"
COMMAND = "python -m benchmarks.ranks.scaling_estimate"
GPUS = (8, 64, 512)
IN_MACHINE = 8
LAYERS = 36


@dataclass(frozen=True)
class Model:
    """The shape of Qwen3-8B with LoRA of rank 16 on all linear layers."""

    base: float = 8.2e9  # numbers, in bfloat16
    embeddings: float = 151_936 * 4096  # of these
    trainable: float = 43.6e6  # numbers, in float32
    # keys and values of a token: 36 layers, 8 heads of 128, two of them, bfloat16
    cache_bytes: float = LAYERS * 8 * 128 * 2 * 2


@dataclass(frozen=True)
class Machine:
    """8 H100 SXM. The data sheets' rates, times what is assumed to be reached of them."""

    flops: float = 0.4 * 989e12  # model FLOPs utilisation of learning
    memory: float = 0.6 * 3.35e12  # bytes/s while sampling
    nvlink: float = 0.8 * 450e9  # bytes/s each way
    latency_in: float = 5e-6  # seconds a hop
    latency_out: float = 15e-6


# bytes/s between machines, for each machine: as many adapters as GPUs, or one
NETWORKS = {
    "8 x 400 Gb/s": 0.8 * 8 * 50e9,
    "1 x 100 Gb/s": 0.8 * 12.5e9,
}
MODEL, MACHINE = Model(), Machine()
# messages below a kilobyte, and gathered objects
SMALL = ("control", "all_gather")

# how often learning goes through the base for a micro-batch: forward and backward; in PPO policy and critic,
# with an adapter for each
PASSES = {"sft": 2, "dpo": 2, "ppo": 4}
# collectives of such a pass in each layer under ZeRO-3, as measured: 98 in 2 passes over 4 layers, and in PPO
# 427 in 4, less those before sampling
GATHERS = {"sft": 12, "dpo": 12, "ppo": 17}
# of PPO, with one optimizer step each
EPOCHS = 4


def messages(
    program: str,
    stage: str,
    model: Model,
    *,
    number_bytes: int = 2,
    micro_batches: int = 1,
    steps: int = 1,
) -> dict[str, float]:
    """Return the bytes of the messages of `steps` optimizer steps by collective, by formula; in PPO, of
    those of one rollout.

    Gradients and weights of adapters travel in float32. number_bytes: of a number of the base.
    micro_batches: of all steps together.
    """
    gradients = 4 * model.trainable
    everything = number_bytes * model.base + gradients
    if stage in ("0", "1", "2"):
        # ZeRO 2 keeps a part of the gradients, so that it sums them after each backward pass
        sums = micro_batches if stage == "2" else steps
        sent = {"all_reduce": sums * gradients}
        if stage != "0":
            # the parts of the updated weights
            sent["all_gather_into_tensor"] = steps * gradients
        return sent
    if stage == "3, all kept":
        sent = {"all_gather_into_tensor": everything, "reduce_scatter_tensor": gradients}
    else:
        gathered = PASSES[program] * number_bytes * model.base + 2 * gradients
        if program == "ppo":
            # neither backward pass reads them
            gathered -= 2 * number_bytes * model.embeddings
        sent = {"all_gather_into_tensor": gathered, "reduce_scatter_tensor": gradients}

    sent = {name: micro_batches * size for name, size in sent.items()}
    if program == "ppo" and stage == "3":
        # once a rollout, to sample and to measure
        sent["all_gather_into_tensor"] += everything
    return sent


def link_bytes(sent: dict[str, float], ranks: int) -> float:
    """Return what each rank sends and receives of these messages, by rings (NCCL's "bus bandwidth")."""
    share = (ranks - 1) / ranks
    return sum(size * share * (2 if name == "all_reduce" else 1) for name, size in sent.items())


def seconds(sent: dict[str, float], calls: float, ranks: int, network: float) -> float:
    """Return the time of a step's messages, none of it hidden behind computing."""
    machines = ranks // IN_MACHINE
    rate = MACHINE.nvlink if machines == 1 else min(MACHINE.nvlink, network)
    hops = 2 * math.log2(IN_MACHINE) * MACHINE.latency_in
    if machines > 1:
        hops += 2 * math.log2(machines) * MACHINE.latency_out
    return link_bytes(sent, ranks) / rate + calls * hops


def calls_of(program: str, stage: str, micro_batches: int = 1, steps: int = 1) -> int:
    """Return how many collectives `steps` optimizer steps make; in PPO, of policy and critic.

    ZeRO-3 gathers in each layer and pass, without prefetching, and each of 37 parameters of a layer before
    sampling.
    """
    if stage != "3":
        sums = micro_batches if stage == "2" else steps
        return (2 if program == "ppo" else 1) * (sums + steps)
    before_sampling = 37 if program == "ppo" else 0
    return LAYERS * (before_sampling + GATHERS[program] * PASSES[program] * micro_batches)


def learning_seconds(tokens: float, passes: float = 6) -> float:
    """Return the time to learn from tokens on a frozen base.

    A token costs 2 FLOPs a weight forward, 2 backward (no gradient of a frozen weight), and 2 to compute
    activations again.
    """
    return passes * MODEL.base * tokens / MACHINE.flops


def sampling_seconds(rows: float, prompt: int = 512, response: int = 512) -> float:
    """Return the time to sample on one GPU: each token of a batch reads the weights once, and the cache."""
    context = prompt + response / 2
    read = 2 * MODEL.base + rows * context * MODEL.cache_bytes
    return response * read / MACHINE.memory + learning_seconds(rows * prompt, passes=2)


def ppo_seconds(rows: float, ranks: int, stage: str, network: float) -> tuple[float, float]:
    """Return the time of a PPO step of `rows` responses on each GPU: computing, and communicating.

    4 epochs of one minibatch, in micro-batches of 8 rows of 512 + 512 tokens; a reference and a reward model on
    the base; policy and critic have an adapter each.
    """
    tokens = 1024 * rows
    # forward passes of 2 FLOPs a weight: reward model, policy, reference and critic
    scored = learning_seconds(tokens, passes=4 * 2)
    learnt = EPOCHS * 2 * learning_seconds(tokens)
    micro_batches = EPOCHS * math.ceil(rows / 8)
    model = replace(MODEL, trainable=2 * MODEL.trainable)
    sent = messages("ppo", stage, model, micro_batches=micro_batches, steps=EPOCHS)
    spoken = seconds(sent, calls_of("ppo", stage, micro_batches, EPOCHS), ranks, network)
    return sampling_seconds(rows) + scored + learnt, spoken


def efficiencies() -> Iterator[tuple[str, str, str, list[float]]]:
    """Yield program, stage, network and the share of the time that 8, 64 and 512 GPUs compute, at the same
    work for each: 8 rows of 1024 tokens (DPO: 8 pairs), 64 responses in PPO.
    """
    for network, rate in NETWORKS.items():
        for program in ("sft", "dpo", "ppo"):
            for stage in ("2", "3"):
                found = []
                for ranks in GPUS:
                    if program == "ppo":
                        work, spoken = ppo_seconds(64, ranks, stage, rate)
                    else:
                        work = learning_seconds((2 if program == "dpo" else 1) * 8 * 1024)
                        sent = messages(program, stage, MODEL)
                        spoken = seconds(sent, calls_of(program, stage), ranks, rate)
                    found.append(work / (work + spoken))
                yield program, stage, network, found


def strong_ppo() -> list[list[Any]]:
    """Return rows of the time of a PPO step of 512 responses in all, by the number of GPUs."""
    rows = []
    for ranks in GPUS:
        work, spoken = ppo_seconds(512 / ranks, ranks, "2", NETWORKS["8 x 400 Gb/s"])
        sampled = sampling_seconds(512 / ranks)
        rows.append([ranks, 512 // ranks, sampled, work - sampled, spoken, work + spoken])
    for row in rows:
        row.append(rows[0][5] * GPUS[0] / (row[5] * row[0]))
    return rows


def expected_messages(cell: dict[str, Any]) -> dict[str, float]:
    """Return the formula's bytes for a measured cell; the tiny model is in float32."""
    model = Model(cell["base"], EMBEDDINGS, cell["trainable"])
    return messages(cell["program"], cell["stage"], model, number_bytes=4)


def largest_difference(found: list[dict[str, Any]]) -> float:
    """Return the largest difference between measured bytes and the formula, as a share of the formula."""
    worst = 0.0
    for cell in found:
        expected = expected_messages(cell)
        measured = {name: seen["bytes"] for name, seen in cell["step"].items() if name not in SMALL}
        for name in {*expected, *measured}:
            wanted = expected.get(name, 0.0)
            worst = max(worst, abs(measured.get(name, 0.0) - wanted) / max(wanted, 1.0))
    return worst


def measured_table(found: list[dict[str, Any]]) -> list[str]:
    """Return the table of measured traffic beside the formula's."""
    rows = []
    for cell in found:
        expected = expected_messages(cell)
        seen = cell["step"]
        names = [name for name in seen if name not in SMALL]
        collectives = [f"{seen[name]['calls']} {name.removesuffix('_tensor')}" for name in names]
        sent = sum(seen[name]["bytes"] for name in names)

        small = [seen[name] for name in SMALL if name in seen]
        small_calls = sum(part["calls"] for part in small)
        small_bytes = sum(part["bytes"] for part in small)
        rows.append(
            [
                cell["program"],
                cell["stage"],
                ", ".join(collectives),
                f"{sent:,}",
                f"{sum(expected.values()):,.0f}",
                f"{small_calls}, {small_bytes:,}",
            ]
        )
    header = ("program", "ZeRO", "collectives", "bytes", "by formula", "small ones: calls, bytes")
    return markdown_table(header, rows, right=(3, 4, 5))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def page(found: list[dict[str, Any]]) -> str:
    """Return the page."""
    weak = [
        [network, program, stage, *map(percent, shares)]
        for program, stage, network, shares in efficiencies()
    ]
    strong = [
        [ranks, rows, *(f"{time:.2f}" for time in times), percent(share)]
        for ranks, rows, *times, share in strong_ppo()
    ]
    trained = f"{found[0]['trainable']:,} trained numbers (PPO: {found[-1]['trainable']:,})"
    lines = [
        "# Scaling to 8, 64 and 512 GPUs: an estimate",
        "",
        f"`{COMMAND}`. **On paper: none of it has run on a GPU.** Measured is what ranks send; rates are assumed.",
        "",
        "## Measured: what a step sends",
        "",
        f"Two gloo ranks, {found[0]['base']:,} frozen and {trained}",
        "in float32 (LoRA of rank 4), one micro-batch a rank and step; PPO with one epoch of one minibatch. Counted",
        "by wrapping torch.distributed (`benchmarks/ranks/communication.py`), in the fourth step.",
        "",
        *measured_table(found),
        "",
        f"The formula's largest error is {percent(largest_difference(found))}. With T trained numbers and F frozen",
        "ones of b bytes:",
        "",
        "- **ZeRO 0**: an all-reduce of 4T each optimizer step. **1**: also an all-gather of 4T. **2**: the all-reduce",
        "  comes with each micro-batch. F is sent at the start alone.",
        "- **ZeRO 3**: a reduce-scatter of 4T, and an all-gather of bF and of the adapter in use for each pass over",
        "  the base: forward and backward; in PPO of policy and critic, less the embeddings backward, and of all once",
        "  a rollout, to sample and measure. DeepSpeed keeps up to 10^9 gathered numbers between passes",
        '  (`stage3_max_live_parameters`), so that a smaller model is gathered once ("all kept").',
        "- Small ones are counts, losses, signals, parameters of norms, and in PPO what ranks tell each other about",
        "  their responses: they grow with the rows, not with the model.",
        "",
        "## Assumed",
        "",
        "| what | value |",
        "|---|---|",
        "| model | the shape of Qwen3-8B in bfloat16, LoRA of rank 16 on all linear layers: 8.2e9 and 43.6e6 numbers |",
        "| GPU | H100 SXM: 40 % of 989 TFLOP/s in learning; 60 % of 3.35 TB/s in sampling |",
        "| in a machine | 8 GPUs, NVLink: 80 % of 450 GB/s each way; 5 µs a hop |",
        "| between machines | 80 % of 8 adapters of 400 Gb/s a machine, or of one of 100 Gb/s; 15 µs a hop |",
        "| collectives | rings move (N-1)/N of a message, twice for an all-reduce; 2 log2(N) hops of latency each |",
        "| overlap | none: DeepSpeed hides part of it, so these are lower bounds of the efficiency |",
        "| FLOPs | 6 a weight and token in learning (frozen base, activations computed again), 2 to measure |",
        "| left out | loading, checkpoints, evaluation, padding, ranks that wait for the slowest, failures |",
        "",
        "## The same work for each GPU",
        "",
        "Share of the time that is spent computing. SFT and DPO: 8 rows (pairs) of 1024 tokens a GPU and step. PPO:",
        "64 responses of 512 + 512 tokens a GPU; reward model, policy, reference and critic measure them; 4 epochs of",
        "one optimizer step, micro-batches of 8, policy and critic.",
        "",
        *markdown_table(
            ("network", "program", "ZeRO", "8 GPUs", "64", "512"), weak, right=(3, 4, 5)
        ),
        "",
        "Up to ZeRO 2 the network hardly matters where adapters are trained. ZeRO-3 sends the base again and again: it",
        "wants the fast network, or larger micro-batches, or ZeRO 2 with the base in each GPU's memory.",
        "",
        "## The same work in all: PPO with 512 responses a step",
        "",
        "ZeRO 2, 8 x 400 Gb/s. Seconds a step.",
        "",
        *markdown_table(
            (
                "GPUs",
                "responses each",
                "sampling",
                "scoring and learning",
                "sending",
                "step",
                "efficiency",
            ),
            strong,
            right=range(7),
        ),
        "",
        "Sampling hardly gets shorter: each token reads all weights, for one response or for 64. From about 64 GPUs on",
        "give each run fewer of them, or more responses a step (`rollout_batch_size`), which is another algorithm.",
        "",
    ]
    return "\n".join(lines)


def rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of results."""
    shares = {(p, s, n): values for p, s, n, values in efficiencies()}
    fast = next(iter(NETWORKS))
    return [
        {
            "id": "communication-formula",
            "what": f"bytes of a step, measured on two ranks, beside the formula: largest error in {len(found)} cells",
            "value": largest_difference(found),
            "bound": "<= 0.01",
            "command": COMMAND,
        },
        {
            "id": "scaling-sft-zero2-512",
            "what": "on paper: share of the time that 512 GPUs compute, SFT of 8B with LoRA under ZeRO 2",
            "value": shares["sft", "2", fast][2],
            "bound": ">= 0.9",
            "command": COMMAND,
        },
        {
            "id": "scaling-ppo-512-same-batch",
            "what": "on paper: efficiency of 512 GPUs against 8 in PPO of 8B at 512 responses a step in all",
            "value": strong_ppo()[2][-1],
            "bound": ">= 0.5",
            "command": COMMAND,
        },
    ]


def main() -> None:
    found = json.loads((RESULTS / "communication.json").read_text())
    PAGE.write_text(page(found))
    add_rows(RESULTS / "ranks.json", rows(found))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
