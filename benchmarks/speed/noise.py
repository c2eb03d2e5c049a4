"""What drawing a token costs beside the step that made its logits, on one CPU thread.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.noise

A step of 64 rows: the layers without attention to earlier tokens and the output head, random
weights, float32, a few layers measured and multiplied. Two kinds of logits: "flat" as random
weights give them, "peaked" with a normal spread of 2 and some tokens 12 above. CPU milliseconds,
the median of the rounds, in which all that is compared is measured in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from rlhf.engines import sampling
from rlhf.engines.sampling import TokenNoise

ROWS = 64
# width, layers, heads and their width, width of the feed-forward layers, vocabulary
SHAPES = {
    "Qwen3-0.6B": (1024, 28, 16, 128, 3072, 151_936),
    "42 M": (512, 8, 8, 64, 1365, 32_000),
    "4 M": (256, 4, 4, 64, 682, 2_048),
}
MEASURED_LAYERS = 4


def decode_step(name: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor], float]:
    """Return a pass through some layers, one through the output head, and how often the layers
    count.
    """
    width, layers, heads, head_width, inner, vocabulary = SHAPES[name]
    config = Qwen3Config(
        hidden_size=width,
        num_hidden_layers=MEASURED_LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=head_width,
        intermediate_size=inner,
        vocab_size=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = Qwen3Model(config).eval()
    hidden = torch.randn(ROWS, 1, width)
    head = torch.randn(vocabulary, width) * 0.02
    positions = torch.zeros(ROWS, 1, dtype=torch.long)
    return (
        lambda: model(inputs_embeds=hidden, position_ids=positions, use_cache=False),
        lambda: hidden[:, 0] @ head.T,
        layers / MEASURED_LAYERS,
    )


def milliseconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median CPU time of each function, measured in turn."""
    seen: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            started = time.process_time()
            function()
            # the first round warms up
            if number:
                seen[name].append(1000 * (time.process_time() - started))
    return {name: statistics.median(values) for name, values in seen.items()}


def logits_of(kind: str, vocabulary: int) -> Tensor:
    logits = torch.randn(ROWS, vocabulary) * (2.0 if kind == "peaked" else 0.6)
    if kind == "peaked":
        logits += 12 * (torch.rand(ROWS, vocabulary) < 3 / vocabulary)
    return logits


def measure(name: str, kind: str, rounds: int) -> dict[str, float]:
    """Return the milliseconds of a step and of what follows on it."""
    vocabulary = SHAPES[name][-1]
    layers, head, times = decode_step(name)
    keys = torch.randint(2**62, (ROWS,))
    logits = logits_of(kind, vocabulary)
    tokens = logits.argmax(-1)
    found = milliseconds(
        {
            "layers": layers,
            "head": head,
            "noise": lambda: sampling._race(logits, 1.0, TokenNoise(keys, 3, vocabulary)),
            "logprobs": lambda: sampling._logprobs(logits, tokens, 1.0),
        },
        rounds,
    )
    return found | {"step": found["layers"] * times + found["head"]}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| shape | logits | step | log-probability | noise | of a step |")
    print("|---|---|---:|---:|---:|---:|")
    for name in SHAPES:
        for kind in ("flat", "peaked"):
            ms = measure(name, kind, rounds)
            share = f"{100 * ms['noise'] / ms['step']:.1f} %"
            cells = [f"{ms['step']:.1f}", f"{ms['logprobs']:.2f}", f"{ms['noise']:.2f}", share]
            print(f"| {name} | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
