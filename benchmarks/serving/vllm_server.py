"""Hold a vLLM server that runs against the plain engine: is it the same policy, and how fast?

    python -m benchmarks.serving.vllm_server --url http://localhost:8000 --model runs/sft

docs/models.md has the flags of the server, which serves the base of the adapter `--model`. The
adapter is handed over through the folder `--folder`, which both have to see. Rates are of wall
clock, and of client and server together where they share a machine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from rlhf.engines import hf
from rlhf.engines.sampling import Completions, Sampling
from rlhf.engines.vllm import VllmEngine, logprob_gap
from rlhf.model.adapters import load_adapter
from rlhf.model.loading import load_model
from rlhf.text import markdown_table

ROWS, NEW_TOKENS, DRAWS = 32, 32, 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", required=True, help="the folder of an adapter")
    parser.add_argument("--folder", default="runs/vllm_check", help="where adapters are written")
    given = parser.parse_args()

    initial = load_model(given.model, "bfloat16" if torch.cuda.is_available() else "float32")
    model = load_adapter(initial.model, given.model).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    engine = VllmEngine(given.url, Path(given.folder), initial.base_path)
    vocabulary = initial.model.config.get_text_config().vocab_size
    luck = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (ROWS, 16), generator=luck).tolist()

    rows = [
        [
            "greedy tokens equal to the plain engine's, up to the first other",
            greedy(engine, model, prompts),
        ]
    ]
    for temperature in (1.0, 0.7):
        done = run(engine, model, prompts, Sampling(NEW_TOKENS, temperature))
        columns = zip(prompts, done.response_ids, done.logprobs, strict=True)
        gap = logprob_gap(model, list(columns), temperature)
        rows.append(
            [f"mean gap of log-probabilities at temperature {temperature}, nats", f"{gap:.1e}"]
        )
    rows.append(
        [
            f"chi-square of {DRAWS} first tokens (degrees of freedom)",
            chi_square(engine, model, prompts[0]),
        ]
    )
    for batch_size in (1, 8, 64):
        rows.append(
            [f"tokens/s, {batch_size} requests in flight", rate(engine, model, prompts, batch_size)]
        )
    print("\n".join(markdown_table(["", given.url], rows, right=[1])))


def run(
    engine, model, prompts: list[list[int]], sampling: Sampling, batch_size: int = 64
) -> Completions:
    """Sample without stop tokens, so that all responses have one length."""
    return engine(model, prompts, list(range(len(prompts))), sampling, [], 0, batch_size)


def greedy(engine, model, prompts) -> str:
    """Return the share of tokens before the first one that is not the plain engine's."""
    sampling = Sampling(NEW_TOKENS, 0.0)
    found = run(engine, model, prompts, sampling).response_ids
    expected = run(hf.generate, model, prompts, sampling).response_ids
    equal = 0
    for own, other in zip(found, expected, strict=True):
        differs = [a != b for a, b in zip(own, other, strict=True)]
        equal += differs.index(True) if True in differs else NEW_TOKENS
    return f"{equal / (NEW_TOKENS * len(prompts)):.1%}"


def chi_square(engine, model, prompt) -> str:
    """Compare how often each token comes first with its probability; tokens that are expected less
    than 5 times are one class.
    """
    found = run(engine, model, [prompt] * DRAWS, Sampling(1, 1.0)).response_ids
    counts = torch.bincount(torch.tensor(found).flatten(), minlength=1)
    with torch.no_grad():
        ids = torch.tensor([prompt], device=next(model.parameters()).device)
        expected = DRAWS * model(ids).logits[0, -1].float().softmax(-1).cpu()
    counts = torch.nn.functional.pad(counts, (0, len(expected) - len(counts))).float()
    is_common = expected >= 5
    rest = expected[~is_common].sum()[None], counts[~is_common].sum()[None]
    expected, counts = (
        torch.cat([expected[is_common], rest[0]]),
        torch.cat([counts[is_common], rest[1]]),
    )
    value = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return f"{float(value):.1f} ({len(expected) - 1})"


def rate(engine, model, prompts, batch_size: int) -> str:
    began = time.monotonic()
    run(engine, model, prompts, Sampling(NEW_TOKENS, 1.0), batch_size)
    return f"{len(prompts) * NEW_TOKENS / (time.monotonic() - began):,.0f}"


if __name__ == "__main__":
    main()
