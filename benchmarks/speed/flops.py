"""Is `budget/flops` what is computed? A step of each program, counted by us and by torch's
FlopCounterMode.

    nice -n 10 python -m benchmarks.speed.flops          # all shapes, about a minute of one core

Matrix products are counted as torch makes them. Its counter does not know the CPU's fused
attention, so it is given torch's own formulas for the fused attention of GPUs.
"""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    mm_flop,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from benchmarks.speed.shapes import EOS, FIRST_WORD, PAD, llama, tokenizer_of
from rlhf.runs.budget import Budget

UNKNOWN = {  # to torch's counter
    torch.ops.aten.addmm_: lambda total, a, b, *_, **__: mm_flop(a, b),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


@dataclass(frozen=True)
class Shape:
    """A model, and rows of `prompt` + `response` tokens; ragged rows are of all lengths up to
    these.
    """

    vocabulary: int
    width: int
    layers: int
    prompt: int
    response: int
    ragged: bool = False
    rows: int = 16
    rank: int = 8
    attention: str = "sdpa"

    def lengths(self, seed: int) -> list[tuple[int, int]]:
        draw = random.Random(seed)
        if not self.ragged:
            return [(self.prompt, self.response)] * self.rows
        return [
            (draw.randint(2, self.prompt), draw.randint(1, self.response)) for _ in range(self.rows)
        ]


SHAPES = {
    "head 25 % of the weights, 32 + 32 tokens": Shape(4000, 256, 4, 32, 32),
    "the same, 56 + 8": Shape(4000, 256, 4, 56, 8),
    "the same, ragged": Shape(4000, 256, 4, 32, 32, ragged=True),
    "as the sandbox's (1024 x 96), 16 + 28": Shape(1024, 96, 4, 16, 28),
    "the same, ragged 16 + 40": Shape(1024, 96, 4, 16, 40, ragged=True),
    "head 2 %, 64 + 64": Shape(320, 256, 6, 64, 64),
    "head 52 %": Shape(16000, 256, 4, 32, 32),
    "ragged, eager attention": Shape(1024, 96, 4, 16, 40, ragged=True, attention="eager"),
}


def model_of(shape: Shape):
    """Return a Llama of this shape, with fewer heads for keys and values than for queries."""
    model = llama(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=round(8 / 3 * shape.width),
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        attn_implementation=shape.attention,
    )
    return model.eval()


def rows_of(shape: Shape, seed: int = 1) -> list[dict[str, list[int]]]:
    """Return prompts and responses of random ids."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(FIRST_WORD, shape.vocabulary) for _ in range(count)]

    return [{"prompt_ids": tokens(p), "response_ids": tokens(r)} for p, r in shape.lengths(seed)]


def measured(call: Callable[[], Any]) -> float:
    """FLOPs of all matrix products that torch makes in `call`."""
    with (
        FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        call()  # TRL prints its metrics
    return float(counter.get_total_flops())


def ppo_step(shape: Shape, **options: Any) -> tuple[Budget, float]:
    """(what is counted, FLOPs measured) of a PPO step: sampled, scored by the reward role, read by
    all, one epoch.
    """
    from rlhf.data.records import Prompt
    from rlhf.engines.batched import try_cache
    from rlhf.model.adapters import lora_config
    from rlhf.model.loading import InitialModel
    from rlhf.model.packing import try_packing
    from rlhf.options.ppo import PPOConfig
    from rlhf.ppo.rollout import role_scorer
    from rlhf.ppo.trainer import PPOTrainer, TrainingData
    from rlhf.ranks.distributed import DistributedContext
    from rlhf.roles.one_base import Roles
    from rlhf.roles.whole_weights import WholeRoles

    values = {
        "model_name_or_path": "x", "data": ["x"], "output_dir": "x", "reward": [{"model": "x"}],
        "rollout_batch_size": shape.rows, "total_episodes": shape.rows, "per_device_train_batch_size": shape.rows // 2,
        "num_ppo_epochs": 1, "num_mini_batches": 2, "max_response_length": shape.response,
        # equal scores of truncated responses would end the step before it learns
        "missing_eos_score": None,
    }  # fmt: skip
    config = PPOConfig(**values | options)
    initial = InitialModel(
        model_of(shape), None, "x", "x", None, "x", another=lambda: model_of(shape)
    )
    kind, lora = Roles if config.use_peft else WholeRoles, lora_config(r=shape.rank)
    roles = kind(
        initial, lora, critic="fresh" if config.has_critic else None,
        gradient_checkpointing=config.gradient_checkpointing, ema_reference=config.reference_ema is not None,
    )  # fmt: skip
    roles._add("reward", lora, None)
    roles.heads["reward"] = torch.nn.Linear(shape.width, 1)
    roles.score_shifts["reward"] = (1.0, 0.0)
    record = Prompt(prompt=[{"role": "user", "content": "x"}])
    rows = rows_of(shape)
    data = TrainingData(
        [{"prompt_ids": row["prompt_ids"], "record": record} for row in rows],
        tokenizer_of(shape.vocabulary),
        list(range(EOS, shape.vocabulary, 16)) if shape.ragged else [],
        rows if config.ptx_coef else [],
    )
    trainer = PPOTrainer(
        config, roles, role_scorer(roles, PAD, shape.rows // 2), data, DistributedContext()
    )
    # tried once for each model, not counted
    try_cache(roles.model)
    for model in roles.models:
        try_packing(model)
    flops = measured(lambda: trainer.step(0))
    return trainer.budget, flops


def trl_step(
    shape: Shape, program: str, use_peft: bool = True, **options: Any
) -> tuple[Budget, float]:
    """(what is counted, FLOPs measured) of one step of `program`: sft, reward or dpo, by its
    trainer.
    """
    from datasets import Dataset
    from trl import DPOConfig, RewardConfig, SFTConfig, SFTTrainer

    from reward.model import trainable_reward
    from reward.trainer import PairCollator, RewardTrainer
    from rlhf.model.adapters import lora_config
    from rlhf.model.loading import InitialModel, trainable_policy
    from rlhf.offline import trainers
    from rlhf.offline.soft_dpo import EncodedDPOTrainer

    configs = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig}
    with tempfile.TemporaryDirectory() as folder:
        args = configs[program](
            output_dir=folder, use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=shape.rows,
            report_to="none", disable_tqdm=True, save_strategy="no",
            **{"max_length": None, "gradient_checkpointing": False} | options,
        )  # fmt: skip
        rows, others, tokenizer = rows_of(shape), rows_of(shape, 2), tokenizer_of(shape.vocabulary)
        budget, initial = Budget(), InitialModel(model_of(shape), tokenizer, "x", "x", None, "x")
        lora = (
            lora_config("SEQ_CLS" if program == "reward" else "CAUSAL_LM", r=shape.rank)
            if use_peft
            else None
        )
        given: dict[str, Any] = {"args": args, "processing_class": tokenizer}
        whole = [
            (r["prompt_ids"], r["response_ids"], o["response_ids"])
            for r, o in zip(rows, others, strict=True)
        ]
        if program == "sft":
            data = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a, _ in whole]
            model, cls = trainable_policy(initial, lora), SFTTrainer
        elif program == "reward":
            data = [{"chosen_ids": p + a, "rejected_ids": p + b} for p, a, b in whole]
            model, cls = trainable_reward(initial, lora), RewardTrainer
            given["data_collator"] = PairCollator(PAD)
        else:
            data = [{"prompt_ids": p, "chosen_ids": a, "rejected_ids": b} for p, a, b in whole]
            model, cls = trainable_policy(initial, lora), EncodedDPOTrainer
            given["ref_model"] = None if use_peft else model_of(shape)
            if not use_peft:
                budget.watch(given["ref_model"])
        budget.watch(model)

        built = []

        def build() -> None:
            with budget.counting():
                built.append(cls(model=model, train_dataset=Dataset.from_list(data), **given))

        before = measured(build)
        # what it tries of the model is no part of the step
        trainers.prepare_trainer(built[0])
        trainers.count_training(built[0], budget)
        return budget, before + measured(built[0].train)


def main() -> None:
    torch.set_num_threads(1)
    print(
        "| shape | PPO, with sampling | DPO | reward model | SFT |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for name, shape in SHAPES.items():
        pairs = [
            ppo_step(shape),
            *(trl_step(shape, program) for program in ("dpo", "reward", "sft")),
        ]
        print(
            f"| {name} | {' | '.join(f'{flops / budget.flops:.3f}' for budget, flops in pairs)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
