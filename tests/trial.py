"""A short run of the PPO trainer that writes down what tests/ppo/reference.py needs and what it has
to agree with.

In this process: `run(options, ...)`. Under a launcher: `deepspeed --num_accelerators 2
--no_local_rank tests/trial.py FOLDER`, which reads FOLDER/trial.json and writes FOLDER/trial.pt.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

from rlhf.data.records import Prompt, Scores
from rlhf.guards import Decision
from rlhf.model.adapters import lora_config
from rlhf.model.loading import load_model
from rlhf.options.ppo import PPOConfig
from rlhf.ppo.batches import TrainingData, cycle_shuffled
from rlhf.ppo.trainer import PPOTrainer
from rlhf.ranks.deepspeed_backend import gathered
from rlhf.ranks.distributed import DistributedContext, start
from rlhf.roles.one_base import Roles
from rlhf.roles.whole_weights import WholeRoles

STOPS = [2, *range(3, 320, 9)]  # one token in nine, so that some responses end and some do not


def row(text: str, answer: str = "") -> dict:
    ids, more = ([5 + ord(c) % 200 for c in part] for part in (text, answer))
    return {
        "prompt_ids": ids,
        "response_ids": more,
        "record": Prompt(prompt=[{"role": "user", "content": text}]),
    }


PROMPTS = [row(t) for t in ("one", "three", "seventeen", "a", "of it", "many things", "yes", "no")]
PTX = [
    row("why", "because"),
    row("when is it", "now"),
    row("who", "the team"),
    row("how", "so"),
    row("ok", "fine"),
]


def options(**more) -> PPOConfig:
    values = {
        "model_name_or_path": "x", "data": ["x"], "output_dir": "x", "reward": [{"model": "x"}],
        "rollout_batch_size": 8, "total_episodes": 32, "per_device_train_batch_size": 1, "num_ppo_epochs": 2,
        "num_mini_batches": 2, "max_response_length": 6, "learning_rate": 5e-3, "temperature": 0.8,
    }  # fmt: skip
    return PPOConfig(**(values | more))


def by_content(samples) -> Scores:
    """Any function of the ids will do, as long as its values are spread."""
    return Scores(
        [sum((7 * token) % 13 for token in ids) / 10 - 1.5 for ids in samples.response_ids]
    )


def exact_norm(self, x):
    """Llama's norm at the precision of its input; its own computes in float32 whatever that is."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@contextlib.contextmanager
def exact_llama():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    before, LlamaRMSNorm.forward = LlamaRMSNorm.forward, exact_norm
    try:
        yield
    finally:
        LlamaRMSNorm.forward = before


def stirred(roles: Roles, seed: int = 5) -> Roles:
    """Away from the start, where log-ratios and a fresh head are 0 and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for role, size in (("policy", 0.02), ("value", 0.05)):
            for parameter in roles.parameters_of(role):
                parameter.add_(
                    size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                )
    return roles


def run(given: dict, world: DistributedContext | None = None) -> dict:
    """Make a trainer and some steps of it. `given`: model and reward paths, dtype, options, steps,
    the updates that a guard takes back, stage settings; returns weights before and after, steps
    with their updates, and its options.
    """
    world, config = world or DistributedContext(), options(**given["options"])
    torch.manual_seed(config.seed)
    initial = load_model(given["model"], given["dtype"])
    kind = WholeRoles if given.get("whole") else Roles
    roles = kind(
        initial,
        lora_config(r=4),
        given.get("reward"),
        critic=config.critic_from if config.has_critic else None,
        ema_reference=config.reference_ema is not None,
    )
    before = {name: p.detach().clone() for name, p in stirred(roles).named_parameters()}
    data = TrainingData(PROMPTS, initial.tokenizer, STOPS, PTX if config.ptx_coef else [])
    trainer = PPOTrainer(
        config, roles, by_content, data, world, deepspeed_config=given.get("deepspeed")
    )
    steps = record(trainer, given.get("skipped", []), given.get("steps", 1))
    with gathered(trainer.learner.module.parameters()):
        after = {name: p.detach().clone() for name, p in trainer.roles.named_parameters()}
    scale = getattr(roles.trunk, "peft_config", {}).get("policy", lora_config())
    return {
        "before": before, "after": after, "steps": steps, "lora_scale": scale.lora_alpha / scale.r,
        "shape": initial.model.config.to_dict(), "kl_coef": trainer.estimator.kl.coef,
    }  # fmt: skip


def record(trainer: PPOTrainer, skipped: list[int], steps: int) -> list[dict]:
    """Make the steps, and note each update's rows, metrics, gradients, and what a skipped one has
    changed.
    """
    updates: list[dict] = []
    update, step, judge = trainer.update, trainer.learner.step, trainer.guards.update

    def spy_update(experience, rows, rates, at=0, number=0):
        ptx = cycle_shuffled(
            PTX, range(number * len(rows), (number + 1) * len(rows)), trainer.config.seed + 1
        )
        updates.append(
            {"rows": rows.tolist(), "ptx": [(r["prompt_ids"], r["response_ids"]) for r in ptx]}
        )
        metrics, decision = update(experience, rows, rates, at, number)
        updates[-1] |= {
            "metrics": metrics,
            "number": number,
            "decision": decision and decision.action,
        }
        return metrics, decision

    def spy_step(rates, **how):
        updates[-1] |= {"grads": gradients(trainer), "rates": rates}
        was = state(trainer)
        norm = step(rates, **how)
        updates[-1]["changed"] = not same(was, state(trainer))
        return norm

    def spy_judge(at, numbers):
        if len(updates) - 1 in skipped:
            return Decision(
                "not_finite", "skip", at, 0.0, None, "a test takes this update back", at
            )
        return judge(at, numbers)

    trainer.update, trainer.learner.step, trainer.guards.update = spy_update, spy_step, spy_judge
    found = []
    for number in range(steps):
        updates.clear() if number == 0 else None
        first = len(updates)
        metrics, rollout = trainer.step(number)
        samples = rollout.samples
        found.append({
            "prompts": samples.prompt_ids, "responses": samples.response_ids, "ended": samples.ended,
            "scores": by_content(samples).total, "groups": rollout.group_index.tolist(),
            "updates": updates[first:], "metrics": metrics,
            "skipped": [n - first for n in skipped if first <= n < len(updates)],
        })  # fmt: skip
    return found


def gradients(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """Whole gradients of one step, before clipping, under any ZeRO stage."""
    named = {n: p for n, p in trainer.learner.module.named_parameters() if p.requires_grad}
    if trainer.learner.engine is None:
        return {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()
        }
    if trainer.learner.stage == 2:  # DeepSpeed's own look at them rounds to float32
        return zero2_gradients(trainer.learner.optimizer, named)
    from deepspeed.utils import safe_get_full_grad

    return {n: safe_get_full_grad(p).clone() for n, p in named.items()}


def zero2_gradients(optimizer, named) -> dict[str, torch.Tensor]:
    """Each rank holds the gradients of its stretch of each group, laid end to end."""
    names, found = {id(p): n for n, p in named.items()}, {}
    for i, parameters in enumerate(optimizer.round_robin_bit16_groups):
        mine = torch.cat([g.reshape(-1) for g in optimizer.averaged_gradients[i]])
        mine = torch.nn.functional.pad(mine, (0, int(optimizer.partition_size[i]) - len(mine)))
        parts = [torch.zeros_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, mine)
        whole = torch.cat(parts)
        for p, offset in zip(parameters, optimizer.round_robin_bit16_offsets[i], strict=True):
            found[names[id(p)]] = whole[offset : offset + p.numel()].view(p.shape).clone()
    return found


def state(trainer: PPOTrainer) -> list[torch.Tensor]:
    """Weights that learn and the optimizer's moments, this rank's part of them."""
    optimizer = getattr(trainer.learner.optimizer, "optimizer", trainer.learner.optimizer)
    moments = [
        v
        for entry in optimizer.state.values()
        for v in entry.values()
        if isinstance(v, torch.Tensor)
    ]
    with gathered(trainer.learner.module.parameters()):
        weights = [
            p.detach().clone() for p in trainer.learner.module.parameters() if p.requires_grad
        ]
    return weights + [m.clone() for m in moments]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ranks = start()
    with exact_llama():
        results = [run(given, ranks) for given in json.loads((folder / "trial.json").read_text())]
    if ranks.is_main:
        torch.save(results, folder / "trial.pt")
