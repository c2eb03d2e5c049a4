"""The three-action example of "Is DPO Superior to PPO for LLM Alignment?" (Xu et al. 2024, arXiv
2404.10719, Table 1).

python -m benchmarks.experiments.three_state

No prompt, three answers, one preference (y1 over y2); the reference never says y3. Table 1 and
Theorem 4.1 in closed form, then this project's own losses on a table of three logits.
Deterministic, seconds on one core; the numbers go to benchmarks/results/, what they say stands in
docs/experiments/three-state.md.
"""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

from benchmarks.paths import RESULTS

RESULT = RESULTS / "2026-11-22-three-state.json"
REFERENCE = (0.5, 0.5, 0.0)  # these three rows are the paper's
TABLE = {"dpo": (0.1, 0.0, 0.9), "ppo": (1.0, 0.0, 0.0)}
# from here on the numbers are ours: the paper gives none, and its table depends on none of them
BETA = 1.0
# random starts: logits and the unseen reward normal, of these standard deviations
SEEDS, SPREAD = 20, 3.0
R3_SPREAD = 1.0
EPSILON = 1e-3  # of y3 in the reference of a softmax, which cannot be 0
# nats: where training on the one certain preference stops, since its loss has no minimum
SOLVED = 1e-3
LABEL_PROB = 0.9  # a preference that is right in nine of ten cases has one


def dpo_loss(policy: tuple, beta: float = BETA, label_prob: float = 1.0) -> float:
    """DPO's loss (eq. 7) of the preference y1 over y2 when the reference gives both the same
    probability.

    -p log sigmoid(beta log a/b) - (1 - p) log sigmoid(-beta log a/b);  for p = 1 the paper's log(1 + (b/a)^beta).
    """
    a, b = policy[:2]
    if label_prob == 1.0:
        return math.log1p((b / a) ** beta)
    return label_prob * math.log1p((b / a) ** beta) + (1 - label_prob) * math.log1p((a / b) ** beta)


def bradley_terry_loss(reward: tuple) -> float:
    """The reward model's loss (eq. 4): -log sigmoid(r1 - r2). y3 does not occur in it."""
    return math.log1p(math.exp(reward[1] - reward[0]))


def optimal_policy(
    reward: tuple, reference: tuple = REFERENCE, beta: float = BETA
) -> tuple[float, ...]:
    """What PPO's objective is greatest at (eq. 5): reference * exp(reward / beta) / Z."""
    weights = [p * math.exp(r / beta) for p, r in zip(reference, reward, strict=True)]
    return tuple(w / sum(weights) for w in weights)


def objective(
    policy: tuple, reward: tuple, reference: tuple = REFERENCE, beta: float = BETA
) -> float:
    """PPO's objective (eq. 2): the mean of reward - beta log(policy / reference); -inf where the
    reference is 0.
    """
    total = 0.0
    for p, r, ref in zip(policy, reward, reference, strict=True):
        if p:
            total += p * (r - beta * math.log(p / ref)) if ref else -math.inf
    return total


def dpo_end(start: tuple, margin: float) -> tuple[float, ...]:
    """Where gradient descent on DPO's loss takes a table of logits: z1 - z2 = margin, with z1 + z2
    and z3 as they were.

    The loss sees log a - log b = z1 - z2 alone, so its gradient is (-g, g, 0).
    """
    middle = (start[0] + start[1]) / 2
    weights = [math.exp(z) for z in (middle + margin / 2, middle - margin / 2, start[2])]
    return tuple(w / sum(weights) for w in weights)


def closed_form() -> dict[str, Any]:
    """Table 1 and both halves of Theorem 4.1."""
    gaps = []
    for gap in (0.0, 1.0, 5.0, 20.0):
        for r3 in (-10.0, 0.0, 30.0):  # unobserved: every value fits the preference equally well
            reward = (gap / 2, -gap / 2, r3)
            policy = optimal_policy(reward)
            gaps.append([gap, r3, *policy, bradley_terry_loss(reward), dpo_loss(policy)])
    noisy = [((1 - y3) * 0.9, (1 - y3) * 0.1, y3) for y3 in (0.0, 0.5, 0.9)]
    return {
        "loss": {
            "reference": dpo_loss(REFERENCE),
            **{name: dpo_loss(policy) for name, policy in TABLE.items()},
        },
        "objective": {
            name: objective(policy, (10.0, -10.0, 0.0))
            for name, policy in {"reference": REFERENCE, **TABLE}.items()
        },
        # r1 - r2, r3, three probabilities, the loss of the reward, DPO's loss of the policy
        "ppo_solutions": gaps,
        "largest_loss_difference": max(abs(row[5] - row[6]) for row in gaps),
        "largest_y3": max(row[4] for row in gaps),
        "noisy_label_minimisers": [
            [*policy, dpo_loss(policy, label_prob=LABEL_PROB)] for policy in noisy
        ],
        "noisy_label_minimum": -sum(p * math.log(p) for p in (LABEL_PROB, 1 - LABEL_PROB)),
    }


def train_dpo(
    start, label_prob: float, *, beta: float = BETA, rate: float = 2.0, steps: int = 20_000
):
    """Gradient descent with the project's DPO loss on (S, 3) logits; stops where it has learnt the
    preference.

    Returns policies (S, 3) and losses (S,). The reference gives y1 and y2 the same probability.
    """
    import torch

    from rlhf.offline.soft_dpo import soft_dpo_loss
    from rlhf.tensors import selected_logprobs

    logits = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=rate)
    pair = torch.tensor([0, 1]).expand(len(start), 2)
    labels = torch.full((len(start),), label_prob, dtype=start.dtype)
    for _ in range(steps):
        logprobs, _ = selected_logprobs(logits[:, None, :].expand(-1, 2, -1), pair)
        losses = soft_dpo_loss(logprobs[:, 0] - logprobs[:, 1], beta, label_prob=labels)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        going = (losses > SOLVED) & (gradient.abs().amax(-1) > 1e-12)  # each start stops by itself
        if not going.any():
            break
        logits.grad = gradient * going[:, None]
        optimizer.step()
    return torch.softmax(logits.detach(), -1), losses.detach()


def train_reward(start, label_prob: float, *, rate: float = 2.0, steps: int = 20_000):
    """The project's reward loss on a table of (S, 3) rewards, stopped as DPO is; y3 keeps what it
    started with.
    """
    import torch

    from reward.objective import reward_loss

    rewards = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([rewards], lr=rate)
    labels = torch.full((len(start),), label_prob, dtype=start.dtype)
    for _ in range(steps):
        # the same for all: r1 = r2 = 0 at first
        loss, _ = reward_loss(rewards[:, 0], rewards[:, 1], label_prob=labels)
        (gradient,) = torch.autograd.grad(loss * len(start), rewards)
        if loss <= SOLVED or gradient.abs().max() < 1e-12:
            break
        rewards.grad = gradient
        optimizer.step()
    return rewards.detach()


def train_ppo(
    start,
    rewards,
    reference,
    *,
    beta: float = BETA,
    rate: float = 0.1,
    batches: int = 800,
    epochs: int = 4,
):
    """PPO with the project's token rewards, advantages and clipped loss on (S, 3) logits; returns
    policies (S, 3).

    Expectations are exact: each action is a row, its advantage times its probability in place of
    its share of a batch (the loss is linear in a positive factor of the advantage), and the critic
    knows the mean.
    """
    import torch

    from rlhf.ppo.advantages import gae, kl_k1, token_rewards
    from rlhf.ppo.losses import policy_loss

    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, batches)
    column = (-1, 1)  # three rows of one token for each start
    mask = torch.ones(start.numel(), 1, dtype=torch.bool)
    ref_logprobs = (
        torch.log(torch.as_tensor(reference, dtype=start.dtype)).expand_as(start).reshape(column)
    )
    for _ in range(batches):
        old = torch.log_softmax(logits.detach(), -1)
        kl = kl_k1(old.reshape(column), ref_logprobs)
        gains = token_rewards(rewards.flatten(), kl, mask, beta)
        values = (
            (old.exp() * gains.view_as(old)).sum(-1, keepdim=True).expand_as(old).reshape(column)
        )
        advantages, _ = gae(gains, values, mask, 1.0, 1.0)
        for _ in range(epochs):
            logprobs = torch.log_softmax(logits, -1).reshape(column)
            loss, _ = policy_loss(
                logprobs,
                old.reshape(column),
                advantages * old.exp().reshape(column),
                mask,
                0.2,
                1.0,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return torch.softmax(logits.detach(), -1)


def random_starts(seeds: int = SEEDS):
    """(seeds, 3) logits and (seeds, 3) rewards, of which only the third is not 0 at the start."""
    import torch

    draws = [
        torch.randn(2, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
        for s in range(seeds)
    ]
    logits, rewards = SPREAD * torch.stack(draws)[:, 0], R3_SPREAD * torch.stack(draws)[:, 1]
    return logits, rewards * torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def trained(label_prob: float, seeds: int = SEEDS) -> dict[str, Any]:
    """DPO and PPO from the same random starts, and how far each ends from its closed form."""
    import torch

    starts, rewards = random_starts(seeds)
    dpo, losses = train_dpo(starts, label_prob)
    rewards = train_reward(rewards, label_prob)
    reference = ((1 - EPSILON) / 2, (1 - EPSILON) / 2, EPSILON)
    ppo = train_ppo(starts, rewards, reference)
    margins = torch.log(dpo[:, 0] / dpo[:, 1]).tolist()
    ends = [dpo_end(tuple(z), m) for z, m in zip(starts.tolist(), margins, strict=True)]
    optima = [optimal_policy(tuple(r), reference) for r in rewards.tolist()]
    return {
        "label_prob": label_prob,
        "start_y3": torch.softmax(starts, -1)[:, 2].tolist(),
        "dpo_y3": dpo[:, 2].tolist(),
        "ppo_y3": ppo[:, 2].tolist(),
        "dpo_loss": [losses.min().item(), losses.max().item()],
        "dpo_loss_of_ppo": [
            f(dpo_loss(tuple(p), label_prob=label_prob) for p in ppo.tolist()) for f in (min, max)
        ],
        "dpo_margin": [min(margins), max(margins)],
        "reward_margin": [f((rewards[:, 0] - rewards[:, 1]).tolist()) for f in (min, max)],
        "dpo_from_closed_form": (dpo - torch.tensor(ends, dtype=dpo.dtype)).abs().max().item(),
        "ppo_from_closed_form": (ppo - torch.tensor(optima, dtype=ppo.dtype)).abs().max().item(),
    }


def from_reference(epsilon: float) -> dict[str, Any]:
    """Both from the reference itself, as everybody starts, with an unseen reward as high as y1's."""
    import torch

    reference = torch.tensor([[(1 - epsilon) / 2, (1 - epsilon) / 2, epsilon]], dtype=torch.float64)
    dpo, _ = train_dpo(reference.log(), 1.0)
    rewards = train_reward(torch.zeros(1, 3, dtype=torch.float64), 1.0)
    rewards[:, 2] = rewards[:, 0]
    ppo = train_ppo(reference.log(), rewards, reference)
    optimum = optimal_policy(tuple(rewards[0].tolist()), tuple(reference[0].tolist()))
    return {
        "reference_y3": epsilon,
        "dpo": dpo[0].tolist(),
        "ppo": ppo[0].tolist(),
        "ppo_closed_form": optimum,
    }


def to_the_table() -> dict[str, Any]:
    """A start from which DPO ends at the paper's own row: z1 = z2 = 0 and the z3 that `dpo_end`
    asks for.
    """
    import torch

    margin = -math.log(math.expm1(SOLVED))  # log(1 + exp(-margin)) = SOLVED
    seen = math.exp(margin / 2) + math.exp(-margin / 2)
    start = torch.tensor([[0.0, 0.0, math.log(9 * seen)]], dtype=torch.float64)
    policy, losses = train_dpo(start, 1.0)
    return {
        "start": torch.softmax(start, -1)[0].tolist(),
        "end": policy[0].tolist(),
        "loss": losses[0].item(),
    }


def run() -> dict[str, Any]:
    """All of it, rounded to what every machine agrees on."""
    import torch

    torch.set_num_threads(1)
    result = {
        "paper": {"arxiv": "2404.10719", "reference": REFERENCE, **TABLE},
        "settings": {
            "beta": BETA,
            "seeds": SEEDS,
            "epsilon": EPSILON,
            "solved": SOLVED,
            "label_prob": LABEL_PROB,
        },
        "closed_form": closed_form(),
        "trained": {"certain": trained(1.0), "noisy": trained(LABEL_PROB)},
        "to_the_table": to_the_table(),
        "from_reference": [from_reference(epsilon) for epsilon in (1e-1, 1e-2, 1e-3)],
    }
    return rounded(result)


def rounded(value: Any) -> Any:
    """Floats to 6 digits after the point, what is no finite number as text, for JSON."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return round(value, 6) + 0.0 if math.isfinite(value) else str(value)
    return value


def main() -> None:
    result = run()
    RESULT.write_text(json.dumps(result) + "\n")
    for name, part in result["trained"].items():
        more = sum(d > p for d, p in zip(part["dpo_y3"], part["ppo_y3"], strict=True))
        print(f"{name} preference: DPO leaves y3 more than PPO from {more} of {SEEDS} starts")
        for who in ("start", "dpo", "ppo"):
            y3 = part[f"{who}_y3"]
            print(f"  y3 {who}: {min(y3):.6f} to {max(y3):.6f}, median {statistics.median(y3):.6f}")
        for key in ("dpo_loss", "dpo_loss_of_ppo", "dpo_from_closed_form", "ppo_from_closed_form"):
            print(f"  {key}: {part[key]}")
    print("to the table:", result["to_the_table"])
    for row in result["from_reference"]:
        print("from the reference:", row)


if __name__ == "__main__":
    main()
