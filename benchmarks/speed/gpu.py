"""What the GPU benchmark measures: sampling, learning and whole updates of PPO on Qwen3 shapes.

Models have random weights and are made in memory; everything else is what `launch/ppo.py` uses.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.generation import by_engine, by_transformers
from benchmarks.speed.gpu_shapes import QwenShape, Sizes
from benchmarks.speed.required_flops import Critic, Products, causal_pairs, update_flops
from benchmarks.speed.shapes import FIRST_WORD, PAD, tokenizer_of

LORA_RANK = 16
# dense bfloat16 with sums in float32, FLOP/s, by what is in a device's name (the makers' data
# sheets); the first that fits counts
NOMINAL_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "RTX 4090": 165e12,
    "L4": 121e12,
}


# Clocks


def seconds_of(device: torch.device, call: Callable[[], Any]) -> float:
    """Return the seconds that a call and the work it gives to the device take."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def clean_memory(device: torch.device) -> Iterator[None]:
    """Leave nothing of what was there before or inside on the device, and start counting its peak."""

    def collect() -> None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    collect()
    try:
        yield
    finally:
        collect()


def peak_gib(device: torch.device) -> float:
    """Return the most memory that tensors have taken since counting started, GiB."""
    from rlhf.ranks.distributed import peak_memory

    return round(peak_memory(device), 2)


def measure_device(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Return the device's name, its rate of bfloat16 products, FLOP/s, and of copies, bytes/s."""
    a, b = torch.randn(2, sizes.matrix, sizes.matrix, device=device, dtype=torch.bfloat16)
    source = torch.ones(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def median(call: Callable[[], Any]) -> float:
        call()
        return statistics.median(seconds_of(device, call) for _ in range(9))

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "name": name,
        "matmul_flops": 2 * sizes.matrix**3 / median(lambda: torch.mm(a, b)),
        # each byte is read and written
        "copy_bytes": 2 * sizes.copied / median(lambda: target.copy_(source)),
        "nominal_flops": next((peak for part, peak in NOMINAL_PEAKS.items() if part in name), None),
    }


# The program's own trainer on a model in memory


def reward_adapter(model: torch.nn.Module, shape: QwenShape, folder: Path) -> None:
    """Write a reward model on this base, an adapter with random weights and a head, to `folder`."""
    from safetensors.torch import load_file, save_file

    from rlhf.model.adapters import add_adapter, lora_config

    adapted = add_adapter(model, lora_config(r=LORA_RANK))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    adapted.unload()
    file = folder / "adapter_model.safetensors"
    head = torch.randn(1, shape.width) / shape.width**0.5
    save_file(load_file(file) | {"base_model.model.score.weight": head}, file)


def prompts_of(shape: QwenShape, rows: int, tokens: int) -> list[dict[str, Any]]:
    """Return `rows` prompts of random ids, as rows of `encode_prompts`."""
    from rlhf.data.records import Prompt

    draw = random.Random(0)
    prompts = []
    for number in range(rows):
        ids = [draw.randrange(FIRST_WORD, shape.vocabulary) for _ in range(tokens)]
        record = Prompt(prompt=[{"role": "user", "content": f"prompt {number}"}])
        prompts.append({"prompt_ids": ids, "record": record})
    return prompts


def make_trainer(
    shape: QwenShape,
    device: torch.device,
    prompts: list[dict[str, Any]],
    critic_trunk: str | None = None,
    **options: Any,
) -> Any:
    """Return PPO's trainer; `critic_trunk` None leaves critic and reward model out.

    options: of PPOConfig, and `engine`, which samples in the place of the usual one.
    """
    from rlhf.data.records import Scores
    from rlhf.engines import batched
    from rlhf.model.adapters import lora_config
    from rlhf.model.loading import InitialModel
    from rlhf.options.ppo import PPOConfig
    from rlhf.ppo.batches import TrainingData
    from rlhf.ppo.rollout import role_scorer
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.ranks.distributed import DistributedContext
    from rlhf.roles.one_base import Roles

    engine = options.pop("engine", batched.generate)
    estimator = {"advantage_estimator": "reinforce"} if critic_trunk is None else {}
    config = PPOConfig(
        model_name_or_path=shape.name,
        data=[shape.name],
        output_dir=shape.name,
        reward=[{"model": shape.name}],
        rollout_batch_size=len(prompts),
        generation_batch_size=len(prompts),
        total_episodes=1000 * len(prompts),
        missing_eos_score=None,
        **(estimator | options),
    )
    tokenizer, model = tokenizer_of(shape.vocabulary), shape.model(device)
    initial = InitialModel(model, tokenizer, shape.name, shape.name, None, fingerprint="")
    with tempfile.TemporaryDirectory() as folder:
        reward = None
        if critic_trunk is not None:
            reward = folder
            reward_adapter(model, shape, Path(folder))
        roles = Roles(
            initial,
            lora_config(r=LORA_RANK),
            reward,
            config.gradient_checkpointing,
            critic="auto" if critic_trunk else None,
            critic_trunk=critic_trunk or "own",
        )

    def by_first_token(samples: Any) -> Scores:
        totals = [float(ids[0] % 7) for ids in samples.response_ids]
        return Scores(totals, {"first": totals})

    scorer = by_first_token
    if critic_trunk is not None:
        scorer = role_scorer(roles, PAD, len(prompts), tokens=config.micro_batch_tokens)
    data = TrainingData(prompts, tokenizer, stop_ids=[])
    return PPOTrainer(config, roles, scorer, data, DistributedContext(device=device), engine=engine)


# Sampling


def generation_bytes(shape: QwenShape, rows: int, prompt: int, response: int) -> float:
    """Return the bytes that sampling has to read: at each step every weight, and the keys and values
    of each row up to there, in bfloat16.
    """
    of_token = 2 * 2 * shape.layers * shape.kv_heads * shape.head_width
    # the first step reads the prompt, the last one all but the last token
    tokens = sum(range(prompt, prompt + response))
    return response * 2 * shape.parameters + rows * tokens * of_token


def generation_cell(
    shape: QwenShape, rows: int, device: torch.device, sizes: Sizes, about: dict[str, Any]
) -> dict[str, Any]:
    """Return tokens/s of this project's engine and of transformers' `generate` with the adapter
    beside the weights, and the engine's share of what the memory's bandwidth allows.
    """
    prompts = prompts_of(shape, rows, sizes.prompt)
    trainer = make_trainer(shape, device, prompts, max_response_length=sizes.response)
    trainer.roles.eval()
    found: dict[str, Any] = {"rows": rows, "prompt": sizes.prompt, "response": sizes.response}
    for name, sample in (("engine", by_engine), ("generate", by_transformers)):
        # the first time tries what the model allows and chooses kernels
        sample(trainer, 0)
        seconds = [seconds_of(device, partial(sample, trainer, 1)) for _ in range(sizes.repeats)]
        found[f"{name}_tokens_per_second"] = round(rows * sizes.response / min(seconds), 1)
        if name == "engine":
            found["memory_gib"] = peak_gib(device)
            needed = generation_bytes(shape, rows, sizes.prompt, sizes.response)
            found["step_ms"] = round(1000 * min(seconds) / sizes.response, 3)
            found["bandwidth_share"] = round(needed / about["copy_bytes"] / min(seconds), 4)
    found["ratio"] = round(
        found["engine_tokens_per_second"] / found["generate_tokens_per_second"], 2
    )
    return found


# Learning


def random_engine(response: int) -> Callable[..., Any]:
    """Return an engine that gives random responses of this length at once."""
    from rlhf.engines.sampling import Completions

    def generate(model: Any, prompt_ids: list[list[int]], keys: list[int], *others: Any) -> Any:
        draw, vocabulary = random.Random(0), model.config.vocab_size
        ids = []
        for _ in keys:
            ids.append([draw.randrange(FIRST_WORD, vocabulary) for _ in range(response)])
        return Completions(ids, [False] * len(keys), [[0.0] * response for _ in keys])

    return generate


def where_it_fits(
    device: torch.device, measure: Callable[[bool], dict[str, Any]]
) -> dict[str, Any]:
    """Return what `measure(checkpointing)` finds: with gradient checkpointing only where it does not
    fit without.
    """
    for checkpointing in (False, True):
        with clean_memory(device):
            try:
                return measure(checkpointing) | {"checkpointing": checkpointing}
            except torch.OutOfMemoryError:
                if checkpointing:
                    raise
    raise AssertionError("one of both has returned or raised")


def learning_cell(
    shape: QwenShape,
    tokens: int,
    device: torch.device,
    sizes: Sizes,
    about: dict[str, Any],
    checkpointing: bool,
) -> dict[str, Any]:
    """Return how fast the policy learns from one micro-batch of `tokens`: forward pass, backward pass
    and optimizer step.
    """
    rows, response = tokens // sizes.row, sizes.row // 2
    trainer = make_trainer(
        shape,
        device,
        prompts_of(shape, rows, sizes.row - response),
        max_response_length=response,
        micro_batch_tokens=tokens,
        gradient_checkpointing=checkpointing,
        engine=random_engine(response),
    )
    experience, _ = trainer.estimator.estimate(trainer.collect(0))
    places, rates = torch.arange(rows), trainer.learning_rates(0)
    trainer.update(experience, places, rates)
    seconds = statistics.median(
        seconds_of(device, lambda: trainer.update(experience, places, rates))
        for _ in range(sizes.repeats)
    )

    products = Products.of(shape, LORA_RANK)
    # nothing is predicted from the last token of a row
    positions, pairs = rows * (sizes.row - 1), rows * causal_pairs([sizes.row - 1])
    sizes_of_pass = (positions, pairs, rows * response)
    needed = products.forward(*sizes_of_pass, adapted=True) + products.backward_lora(*sizes_of_pass)
    whole = 6 * shape.parameters * rows * sizes.row + 6 * products.pair * pairs
    return {
        "tokens": rows * sizes.row,
        "row": sizes.row,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(rows * sizes.row / seconds),
        "memory_gib": peak_gib(device),
        **shares("", needed / seconds, about),
        **shares("whole_", whole / seconds, about),
    }


def shares(name: str, rate: float, about: dict[str, Any]) -> dict[str, float | None]:
    """Return a rate as a share of the device's measured rate of products and of its nominal one."""
    nominal = about["nominal_flops"]
    return {
        f"{name}matmul_share": round(rate / about["matmul_flops"], 4),
        f"{name}mfu": None if nominal is None else round(rate / nominal, 4),
    }


# A whole update


def update_cell(
    shape: QwenShape,
    critic: Critic,
    device: torch.device,
    sizes: Sizes,
    about: dict[str, Any],
    checkpointing: bool,
) -> dict[str, Any]:
    """Return the seconds of one rollout of PPO and its updates, by phase."""
    from benchmarks.speed.ours import PHASES

    trunk = "reward" if critic == "reward" else "own"
    prompts = prompts_of(shape, sizes.episodes, sizes.prompt)
    trainer = make_trainer(
        shape,
        device,
        prompts,
        critic_trunk=trunk,
        max_response_length=sizes.response,
        gradient_checkpointing=checkpointing,
    )
    trainer.config.num_ppo_epochs = 1
    trainer.step(0)
    trainer.config.num_ppo_epochs = sizes.epochs
    metrics, rollout = trainer.step(1)
    if metrics["ppo/updates"] != sizes.epochs:
        raise RuntimeError(f"a guard stopped learning: {metrics}")

    responses = rollout.mask.sum(-1).tolist()
    needed = update_flops(
        shape, LORA_RANK, sizes.epochs, [sizes.prompt] * sizes.episodes, responses, critic
    )
    seconds = {name: round(metrics[metric], 3) for name, metric in PHASES.items()}
    return {
        "episodes": sizes.episodes,
        "epochs": sizes.epochs,
        "seconds": seconds | {"all": round(metrics["time/step"], 3)},
        "episodes_per_second": round(sizes.episodes / metrics["time/step"], 2),
        "logprob_gap": metrics["rollout/logprob_gap"],
        "ratio_first": metrics["ppo/ratio_first"],
        "memory_gib": peak_gib(device),
        **shares("", sum(needed.values()) / metrics["time/step"], about),
        **shares("learn_", needed["learn"] / metrics["time/learn"], about),
    }
