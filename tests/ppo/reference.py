"""One complete step of PPO, slow and obvious: a loop over responses, a loop over tokens, one
sequence at a time.

Nothing here is batched, padded or masked, and nothing comes from the package's mathematics: the
forward pass of a small Llama with LoRA adapters, the KL, rewards, advantages, losses, gradient
clipping and Adam are written out again from the papers. `Reference` takes initial weights under the
names of `Roles`, and for each step the sampled ids, the scorer's numbers and the rows of each
update; it works out all the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

TRUNK = "trunk.base_model.model.model."


@dataclass
class Step:
    """What a step is given: row i of each list is response i."""

    prompts: list[list[int]]
    responses: list[list[int]]
    ended: list[bool]
    scores: list[float]  # as the scorer gave them
    groups: list[int]  # which prompt it answers
    updates: list[list[int]]  # the rows of each update
    ptx: list[list[tuple[list[int], list[int]]]]  # the (prompt, answer) pairs of each update
    skipped: frozenset[int] = frozenset()  # updates that a guard took back


class Reference:
    """Weights and everything else that changes from step to step. `o` is the options, `shape` the
    model's config.
    """

    def __init__(self, weights: dict[str, torch.Tensor], o: Any, shape: Any, lora_scale: float):
        self.w = {name: value.double().clone() for name, value in weights.items()}
        self.o, self.shape, self.lora_scale = o, shape, lora_scale
        self.adam: dict[str, list] = {}  # name -> [steps, first moment, second moment]
        self.kl_coef = o.kl_coef
        self.all_scores: list[float] = []
        self.all_rewards: list[float] = []
        self.done = 0
        self.has_critic = o.advantage_estimator == "gae"

    # the model, (L, H) for one sequence of L tokens

    def linear(self, x, name, role):
        y = x @ self.base(name).T
        if role is None:
            return y
        a, b = (self.w[f"{TRUNK}{name}.lora_{half}.{role}.weight"] for half in "AB")
        return y + self.lora_scale * (x @ a.T @ b.T)

    def base(self, name):
        inside = f"{TRUNK}{name}.base_layer.weight"
        return self.w[inside if inside in self.w else f"{TRUNK}{name}.weight"]

    def norm(self, x, name):
        return (
            self.base(name)
            * x
            / torch.sqrt((x * x).mean(-1, keepdim=True) + self.shape.rms_norm_eps)
        )

    def rotate(self, x, position):
        """x (heads, d): pairs (j, j + d/2) turned by position * theta^(-2j/d), angles in float32 as
        in the model.
        """
        d = x.shape[-1]
        theta = self.shape.rope_parameters["rope_theta"]
        angle = position * (1.0 / theta ** (torch.arange(0, d, 2).float() / d))
        cos, sin = angle.cos().double(), angle.sin().double()
        left, right = x[:, : d // 2], x[:, d // 2 :]
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    def attention(self, x, name, role):
        heads, shared = self.shape.num_attention_heads, self.shape.num_key_value_heads
        length, d = len(x), self.shape.hidden_size // heads
        q = self.linear(x, f"{name}.q_proj", role).view(length, heads, d)
        k = self.linear(x, f"{name}.k_proj", role).view(length, shared, d)
        v = self.linear(x, f"{name}.v_proj", role).view(length, shared, d)
        keys = torch.stack([self.rotate(k[t], t) for t in range(length)])
        rows = []
        for t in range(length):
            turned, out = self.rotate(q[t], t), []
            for h in range(heads):
                g = h // (heads // shared)
                weight = torch.softmax(keys[: t + 1, g] @ turned[h] / math.sqrt(d), 0)
                out.append(weight @ v[: t + 1, g])
            rows.append(torch.cat(out))
        return self.linear(torch.stack(rows), f"{name}.o_proj", role)

    def hidden(self, ids, role):
        x = self.base("embed_tokens")[ids]
        for i in range(self.shape.num_hidden_layers):
            x = x + self.attention(
                self.norm(x, f"layers.{i}.input_layernorm"), f"layers.{i}.self_attn", role
            )
            y, mlp = self.norm(x, f"layers.{i}.post_attention_layernorm"), f"layers.{i}.mlp"
            gate = self.linear(y, f"{mlp}.gate_proj", role)
            up = gate * torch.sigmoid(gate) * self.linear(y, f"{mlp}.up_proj", role)
            x = x + self.linear(up, f"{mlp}.down_proj", role)
        return self.norm(x, "norm")

    def logprobs(self, prompt, response, role, temperature):
        """log p of each response token and the entropy of its distribution: two lists of scalars."""
        states = self.hidden(prompt + response, role)
        chosen, entropy = [], []
        for t, token in enumerate(response):
            logits = self.base("embed_tokens") @ states[len(prompt) - 1 + t] / temperature
            log_p = logits - torch.logsumexp(logits, 0)
            chosen.append(log_p[token])
            entropy.append(-(log_p.exp() * log_p).sum())
        return chosen, entropy

    def values(self, prompt, response):
        states = self.hidden(prompt + response, "value")
        weight, bias = self.w["heads.value.weight"][0], self.w["heads.value.bias"][0]
        return [states[len(prompt) - 1 + t] @ weight + bias for t in range(len(response))]

    def role_of_reference(self):
        return "reference" if any(".reference." in name for name in self.w) else None

    # one step

    def step(self, given: Step) -> dict[str, Any]:
        """Returns `updates`: losses, gradients before clipping and their norm of each; and numbers
        of the rollout.
        """
        o, n = self.o, len(given.responses)
        with torch.no_grad():
            rollout = self.measure(given)
        kl = [[estimate(o.kl_estimator, p, q) for p, q in zip(*pair, strict=True)]
              for pair in zip(rollout["logprobs"], rollout["penalty"], strict=True)]  # fmt: skip
        scores = self.shape_scores(given)
        rewards = self.token_rewards(scores, kl)
        advantages, returns = self.advantages(rewards, rollout["values"], given.groups)
        raw = [a for row in advantages for a in row]
        if o.advantage_estimator == "gae" if o.whiten_advantages is None else o.whiten_advantages:
            mean = sum(raw) / len(raw)
            variance = sum((a - mean) ** 2 for a in raw) / len(raw)
            advantages = [
                [(a - mean) / math.sqrt(variance + 1e-8) for a in row] for row in advantages
            ]
        found = [
            self.update(u, given, rollout, advantages, returns) for u in range(len(given.updates))
        ]
        sums = [sum(p - q for p, q in zip(*pair, strict=True))
                for pair in zip(rollout["logprobs"], rollout["first"], strict=True)]  # fmt: skip
        numbers = {
            "kl/sequence": sum(sums) / n,
            "kl/coef": self.kl_coef,
            "score/total": sum(scores) / n,
            "score/raw": sum(given.scores) / n,
            "ppo/reward": sum(map(sum, rewards)) / n,
            "ppo/advantage_mean": sum(raw) / len(raw),
            "response/length": sum(map(len, given.responses)) / n,
            "response/ended": sum(given.ended) / n,
        }
        if o.kl_target is not None:
            error = max(-0.2, min(0.2, numbers["kl/sequence"] / o.kl_target - 1))
            self.kl_coef = self.kl_coef * (1 + error * n / o.kl_horizon)
        self.all_rewards += [sum(row) for row in rewards]
        if o.reference_ema is not None:
            for name in [name for name in self.w if ".ema_reference." in name]:
                policy = self.w[name.replace(".ema_reference.", ".policy.")]
                self.w[name] = o.reference_ema * self.w[name] + (1 - o.reference_ema) * policy
        self.done += 1
        return {"updates": found, "numbers": numbers, "advantages": advantages, "returns": returns}

    def measure(self, given: Step) -> dict[str, list[list[float]]]:
        """Log-probabilities of policy, first reference and the penalty's reference, and values;
        numbers per token.
        """
        o, out = self.o, {"logprobs": [], "first": [], "penalty": [], "values": []}
        for prompt, response in zip(given.prompts, given.responses, strict=True):

            def read(role, prompt=prompt, response=response):
                return [float(x) for x in self.logprobs(prompt, response, role, o.temperature)[0]]

            out["logprobs"].append(read("policy"))
            out["first"].append(read(self.role_of_reference()))
            out["penalty"].append(
                out["first"][-1] if o.reference_ema is None else read("ema_reference")
            )
            values = self.values(prompt, response) if self.has_critic else [0.0] * len(response)
            out["values"].append([float(v) for v in values])
        return out

    def shape_scores(self, given: Step) -> list[float]:
        o, shaped = self.o, []
        self.all_scores += given.scores
        mean = sum(self.all_scores) / len(self.all_scores)
        deviation = math.sqrt(sum((s - mean) ** 2 for s in self.all_scores) / len(self.all_scores))
        for score, ended, response in zip(given.scores, given.ended, given.responses, strict=True):
            if o.normalize_scores:
                score = (score - mean) / deviation
            if o.score_clip is not None:
                score = max(-o.score_clip, min(o.score_clip, score))
            if o.missing_eos_score is not None and not ended:
                if o.missing_eos == "replace":
                    score = o.missing_eos_score
                elif o.missing_eos == "min":
                    score = min(score, o.missing_eos_score)
                else:
                    score = score + o.missing_eos_score
            shaped.append(score - o.length_penalty * len(response))
        return shaped

    def token_rewards(self, scores, kl) -> list[list[float]]:
        o, rewards = self.o, []
        for score, row in zip(scores, kl, strict=True):
            tokens = [-self.kl_coef * k if o.kl_in == "reward" else 0.0 for k in row]
            tokens[-1] += score
            rewards.append(tokens)
        if o.whiten_rewards:
            every = [r for row in rewards for r in row]
            mean = sum(every) / len(every)
            variance = sum((r - mean) ** 2 for r in every) / len(every)
            rewards = [
                [(r - mean) / math.sqrt(variance + 1e-8) + mean for r in row] for row in rewards
            ]
        return rewards

    def advantages(self, rewards, values, groups):
        o, n = self.o, len(rewards)
        totals = [sum(row) for row in rewards]
        if o.advantage_estimator == "gae":
            # A_t = sum_l (gamma lambda)^l delta_{t+l}, the sum of Schulman et al. 2016, eq. 16,
            # term by term
            advantages = []
            for row, value in zip(rewards, values, strict=True):
                after = [*value[1:], 0.0]
                delta = [row[t] + o.gamma * after[t] - value[t] for t in range(len(row))]
                advantages.append(
                    [sum((o.gamma * o.gae_lambda) ** (s - t) * delta[s] for s in range(t, len(row)))
                     for t in range(len(row))]
                )  # fmt: skip
            returns = [
                [a + v for a, v in zip(*pair, strict=True)]
                for pair in zip(advantages, values, strict=True)
            ]
            return advantages, returns
        each = []
        for i in range(n):
            others = [totals[j] for j in range(n) if groups[j] == groups[i] and j != i]
            if o.advantage_estimator == "rloo":
                each.append(totals[i] - sum(others) / len(others))
            elif o.advantage_estimator == "grpo":
                mean = (totals[i] + sum(others)) / (1 + len(others))
                squares = sum((r - mean) ** 2 for r in [totals[i], *others])
                each.append((totals[i] - mean) / (math.sqrt(squares / len(others)) + 1e-4))
            else:
                earlier = self.all_rewards or totals
                each.append(totals[i] - sum(earlier) / len(earlier))
        return [[a] * len(row) for a, row in zip(each, rewards, strict=True)], None

    def update(self, number, given: Step, rollout, advantages, returns) -> dict[str, Any]:
        """One optimizer step on the rows of this update."""
        o, rows = self.o, given.updates[number]
        tokens = sum(len(given.responses[i]) for i in rows)
        groups = self.groups()
        names = [name for group in groups for name in group]
        for name in names:
            self.w[name] = self.w[name].detach().requires_grad_()
        parts = dict.fromkeys(
            ("policy", "value", "kl", "entropy", "ptx"), torch.zeros((), dtype=torch.float64)
        )
        ratios, apart = [], []
        for i in rows:
            prompt, response = given.prompts[i], given.responses[i]
            logprobs, entropy = self.logprobs(prompt, response, "policy", o.temperature)
            values = self.values(prompt, response) if self.has_critic else []
            for t in range(len(response)):
                ratio = torch.exp(logprobs[t] - rollout["logprobs"][i][t])
                high = 1 + (o.clip_range if o.clip_range_high is None else o.clip_range_high)
                held = min(max(ratio, 1 - o.clip_range), high)
                parts["policy"] = (
                    parts["policy"]
                    - min(ratio * advantages[i][t], held * advantages[i][t]) / tokens
                )
                ratios.append(ratio.item())
                apart.append(ratio.item() - 1 - math.log(ratio.item()))
                parts["entropy"] = parts["entropy"] - o.entropy_coef * entropy[t] / tokens
                if o.kl_in == "loss":
                    estimated = estimate(o.kl_estimator, logprobs[t], rollout["penalty"][i][t])
                    parts["kl"] = parts["kl"] + self.kl_coef * estimated / tokens
                if self.has_critic:
                    old, aim, error = (
                        rollout["values"][i][t],
                        returns[i][t],
                        (values[t] - returns[i][t]) ** 2,
                    )
                    if o.value_clip_range is not None:
                        near = min(
                            max(values[t], old - o.value_clip_range), old + o.value_clip_range
                        )
                        error = max(error, (near - aim) ** 2)
                    parts["value"] = parts["value"] + error / 2 / tokens
        if o.ptx_coef:
            answers = sum(len(answer) for _, answer in given.ptx[number])
            for prompt, answer in given.ptx[number]:
                for logprob in self.logprobs(prompt, answer, "policy", 1.0)[0]:
                    parts["ptx"] = parts["ptx"] - o.ptx_coef * logprob / answers
        learnt = parts["policy"] + parts["kl"] + parts["entropy"] + parts["ptx"]
        warming = self.done < o.critic_warmup_steps
        loss = o.vf_coef * parts["value"] + (0.0 if warming else learnt)
        # a loss held back at every token has no gradient at all
        every = [self.w[name] for name in names]
        found = (
            torch.autograd.grad(loss, every, allow_unused=True)
            if loss.requires_grad
            else [None] * len(every)
        )
        grads = {
            n: torch.zeros_like(self.w[n]) if g is None else g
            for n, g in zip(names, found, strict=True)
        }
        for name in names:
            self.w[name] = self.w[name].detach()
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
        if number not in given.skipped:
            for group, rate in zip(groups, self.rates(), strict=False):
                for name in group:
                    if not (warming and group is groups[0]):
                        self.adam_step(
                            name, grads[name] * min(1.0, o.max_grad_norm / (norm + 1e-6)), rate
                        )
        losses = {f"loss/{name}": part.item() for name, part in parts.items()} | {
            "loss/total": loss.item()
        }
        losses |= {"ppo/ratio": sum(ratios) / tokens, "ppo/approx_kl": sum(apart) / tokens}
        return {"losses": losses, "grads": grads, "norm": norm}

    def groups(self) -> list[list[str]]:
        policy = [name for name in self.w if ".policy." in name]
        critic = [name for name in self.w if ".value." in name and name.startswith("trunk")]
        return (
            [policy, [*critic, "heads.value.weight", "heads.value.bias"]]
            if self.has_critic
            else [policy]
        )

    def is_critics(self, name: str) -> bool:
        return ".value." in name

    def rates(self) -> list[float]:
        o = self.o
        left = (
            1 - self.done / (o.total_episodes // o.rollout_batch_size)
            if o.lr_scheduler_type == "linear"
            else 1.0
        )
        critic = o.learning_rate if o.value_learning_rate is None else o.value_learning_rate
        return [left * o.learning_rate, left * critic]

    def adam_step(self, name, gradient, rate) -> None:
        """Kingma and Ba 2015, algorithm 1: w <- w - rate * m^ / (sqrt v^ + eps)."""
        state = self.adam.setdefault(
            name, [0, torch.zeros_like(gradient), torch.zeros_like(gradient)]
        )
        state[0] += 1
        state[1] = 0.9 * state[1] + 0.1 * gradient
        state[2] = 0.999 * state[2] + 0.001 * gradient**2
        first, second = state[1] / (1 - 0.9 ** state[0]), state[2] / (1 - 0.999 ** state[0])
        self.w[name] = self.w[name] - rate * first / (second.sqrt() + self.o.adam_epsilon)


def estimate(name: str, p, q):
    """Schulman 2020 for one token: p and q its log-probabilities under policy and reference."""
    if name == "k1":
        return p - q
    if name == "k2":
        return (p - q) ** 2 / 2
    exp = torch.exp if isinstance(q - p, torch.Tensor) else math.exp
    return exp(q - p) - 1 - (q - p)
