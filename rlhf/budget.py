"""What a run has cost, counted in the same words by every program: the `budget/*` metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import nn


@dataclass
class Budget:
    """This rank's counters since the program began (`stages.total_budget` sums them over ranks).

    FLOPs are the usual estimate from the parameter count N without input embeddings (Kaplan et al. 2020, sec. 2.1):
    2N for each token of a forward pass, 4N more for a backward pass. A frozen base saves the weights' half of it
    (2N), since gradients still pass through to reach the adapters.
    """

    parameters: int
    frozen_base: bool = True
    episodes: int = 0
    tokens_generated: int = 0
    tokens_trained: int = 0
    flops: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def generate(self, episodes: int, prompt_tokens: int, response_tokens: int) -> None:
        """Responses sampled from the policy; prompts are read once."""
        self.episodes += episodes
        self.tokens_generated += response_tokens
        self.forward(prompt_tokens + response_tokens)

    def forward(self, tokens: int) -> None:
        """Tokens read without learning from them (scores, reference, values)."""
        self.flops += 2.0 * self.parameters * tokens

    def train(self, tokens: int) -> None:
        """Tokens passed forward and backward."""
        self.tokens_trained += tokens
        self.flops += (4.0 if self.frozen_base else 6.0) * self.parameters * tokens

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps; seconds are those spent so far."""
        counted = {k: getattr(self, k) for k in ("episodes", "tokens_generated", "tokens_trained", "flops")}
        return counted | {"seconds": time.monotonic() - self.began}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            if name != "seconds":
                setattr(self, name, value)
        self.began = time.monotonic() - state["seconds"]

    def metrics(self) -> dict[str, float]:
        return {
            "budget/episodes": self.episodes,
            "budget/tokens_generated": self.tokens_generated,
            "budget/tokens_trained": self.tokens_trained,
            "budget/flops": self.flops,
            "budget/seconds": time.monotonic() - self.began,
        }


def count_parameters(model: nn.Module) -> int:
    """Parameters that a token passes through: all but the input embeddings, the (tied) output head counted, and one
    adapter of those that share the base (the first)."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    others = [f".{name}." for name in list(getattr(model, "peft_config", {}))[1:]]
    total = sum(p.numel() for n, p in causal.named_parameters() if not any(other in n for other in others))
    embeddings, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    return total if tied else total - embeddings.weight.numel()
