"""Tokens per CPU second of generation: `transformers`' generate, our plain engine and our fast one,
in turn on one thread.

    OMP_NUM_THREADS=1 python benchmarks/generation.py          # both models, some minutes
    OMP_NUM_THREADS=1 python benchmarks/generation.py --models 4M --rounds 5

Random Llama-shaped models with an unmerged LoRA adapter of rank 16 on every linear layer, prompts
of 32 to 64 tokens, at most 64 new ones, 64 rows together. Responses are

    ragged    of 64 prompts, and end after 40 % of the maximum on average, by a set of stop ids
    fixed     of 64 prompts, and none ends before the maximum
    samples   ragged, four of each of 16 prompts
    queue     ragged, of 256 prompts, of which 64 are computed together
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.engines import batched, hf
from rlhf.engines.sampling import Sampling, sample_key

SHAPES = {
    "4M": {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 2048},
    "42M": {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 32000},
}
KINDS = ("ragged", "fixed", "samples", "queue")
ROWS, LONGEST, NEW_TOKENS, SHARE = 64, 64, 64, 0.4
PAD = 0


def make_model(name: str) -> nn.Module:
    """Return the model with an adapter that changes it, as training leaves one."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    width = shape["hidden_size"]
    config = LlamaConfig(
        **shape,
        intermediate_size=width * 8 // 3,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=512,
        pad_token_id=PAD,
        tie_word_embeddings=True,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora).eval()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.02)
    return model


def make_prompts(vocabulary: int, count: int = ROWS) -> list[list[int]]:
    draw = random.Random(0)
    lengths = [draw.randint(LONGEST // 2, LONGEST) for _ in range(count)]
    return [[draw.randrange(1, vocabulary) for _ in range(length)] for length in lengths]


def stop_set(vocabulary: int) -> list[int]:
    """Return random ids of such a number that a uniform draw ends after SHARE of NEW_TOKENS.

    With probability p of ending at each token the mean length is (1 - (1 - p)^n) / p.
    """
    wanted, low, high = SHARE * NEW_TOKENS, 1e-6, 1.0
    for _ in range(60):
        p = (low + high) / 2
        mean = (1 - (1 - p) ** NEW_TOKENS) / p
        low, high = (p, high) if mean > wanted else (low, p)
    return random.Random(1).sample(range(1, vocabulary), round(low * vocabulary))


def by_transformers(model, prompts, keys, stops) -> int:
    """Return the number of tokens that `generate` gave, up to each row's stop token."""
    if len(prompts) > ROWS:
        rest = by_transformers(model, prompts[ROWS:], keys, stops)
        return rest + by_transformers(model, prompts[:ROWS], keys, stops)
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    done = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        pad_token_id=PAD,
        eos_token_id=stops or None,
    )[:, width:]
    lengths = [
        next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        for row in done.tolist()
    ]
    return sum(lengths)


def by_engine(generate: Callable) -> Callable:
    def run(model, prompts, keys, stops) -> int:
        done = generate(model, prompts, keys, Sampling(NEW_TOKENS), stops, PAD, ROWS)
        return sum(map(len, done.response_ids))

    return run


ENGINES = {
    "transformers": by_transformers,
    "hf": by_engine(hf.generate),
    "batched": by_engine(batched.generate),
}


def measure(name: str, kinds: list[str], rounds: int) -> None:
    """Print the rows of the table for one model."""
    model = make_model(name)
    vocabulary = model.config.vocab_size
    stop_ids = stop_set(vocabulary)
    workloads = {
        "ragged": (make_prompts(vocabulary), stop_ids),
        "fixed": (make_prompts(vocabulary), []),
        "samples": ([p for p in make_prompts(vocabulary, ROWS // 4) for _ in range(4)], stop_ids),
        "queue": (make_prompts(vocabulary, 4 * ROWS), stop_ids),
    }
    for kind in kinds:
        prompts, stops = workloads[kind]
        rates: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        tokens: dict[str, int] = {}
        for turn in range(rounds + 1):
            keys = [sample_key(turn, "bench", prompt, i) for i, prompt in enumerate(prompts)]
            torch.manual_seed(turn)
            for engine, run in ENGINES.items():
                began = time.process_time()
                tokens[engine] = run(model, prompts, keys, stops)
                rates[engine].append(tokens[engine] / (time.process_time() - began))
        for engine, found in rates.items():
            # the first turn tries caches and fills allocators
            found, base = found[1:], rates["transformers"][1:]
            ratios = sorted(a / b for a, b in zip(found, base, strict=True))
            print(
                f"| {name} | {kind} | {engine} | {statistics.median(found):,.0f} | "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) | "
                f"{tokens[engine] / len(prompts):.1f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--responses", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | responses | engine | tokens / CPU s | times transformers | mean length |")
    print("|---|---|---|---:|---:|---:|")
    for name in options.models:
        measure(name, options.responses, options.rounds)


if __name__ == "__main__":
    main()
