"""FLOPs that the mathematics of one PPO update needs, by formula: what is left when nothing is
padded and nothing is computed twice.

A program that pads, measures the policy again after sampling or keeps an adapter unmerged while
it samples makes more; that is not counted as work. Counted are matrix products alone, two FLOPs a
multiply-add. Embeddings are looked up, norms, activations, softmax and AdamW are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.speed.shapes import ModelShape

# of its own: a LoRA adapter on the base; reward, policy: a scalar head on the trunk of that role;
# whole: a model of its own that is trained whole
Critic = Literal["adapter", "reward", "policy", "whole"]


@dataclass(frozen=True)
class Products:
    """Multiply-adds of one position or one pair."""

    # all matrices of the layers
    trunk: float
    # the two factors of each LoRA adapter
    adapter: float
    # of these two, those that read the embeddings: q, k and v of the first layer. What they read
    # is not trained, so that no gradient flows to it
    first: float
    first_adapter: float
    # the output head, at the positions that predict a response token
    head: float
    # attention between a query and a key: their product and the weighted sum, in all layers
    pair: float

    @classmethod
    def of(cls, shape: ModelShape, rank: int) -> Products:
        matrices = shape.layer_matrices
        qkv = matrices[:3]
        return cls(
            trunk=shape.layers * sum(inputs * outputs for inputs, outputs in matrices),
            adapter=shape.layers * rank * sum(inputs + outputs for inputs, outputs in matrices),
            first=sum(inputs * outputs for inputs, outputs in qkv),
            first_adapter=rank * sum(inputs for inputs, _ in qkv),
            head=shape.vocabulary * shape.width,
            pair=shape.layers * 2 * shape.heads * shape.head_width,
        )

    def forward(self, positions: int, pairs: int, heads: int, *, adapted: bool) -> float:
        """FLOPs of a pass: all positions through the trunk, `heads` of them through the head."""
        weights = self.trunk + (self.adapter if adapted else 0)
        return 2 * (weights * positions + self.pair * pairs + self.head * heads)

    def backward_lora(self, positions: int, pairs: int, heads: int) -> float:
        """FLOPs of the backward pass where the base is frozen.

        A frozen matrix passes the gradient on (one product), a factor of LoRA also has its own
        gradient (two). The head is frozen. Attention has four products where the forward pass has
        two.
        """
        frozen = self.trunk - self.first
        trained = 2 * self.adapter - self.first_adapter
        return 2 * ((frozen + trained) * positions + 2 * self.pair * pairs + self.head * heads)

    def backward_whole(self, positions: int, pairs: int) -> float:
        """FLOPs of the backward pass of a model that is trained whole, without its head."""
        return 2 * (2 * self.trunk * positions + 2 * self.pair * pairs)


def causal_pairs(lengths: list[int]) -> int:
    """Return the pairs of a query and a key at or before it, over rows of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)


def update_flops(
    shape: ModelShape,
    rank: int,
    epochs: int,
    prompts: list[int],
    responses: list[int],
    critic: Critic,
) -> dict[str, float]:
    """Return the FLOPs of each phase of an update on rows of `prompts` + `responses` tokens.

    The reference is the base without adapter. The log-probabilities of the policy that sampled
    are known from sampling.
    """
    products = Products.of(shape, rank)
    whole = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    # nothing is predicted from the last token
    read = [length - 1 for length in whole]
    positions, pairs, predicted = sum(read), causal_pairs(read), sum(responses)
    # V of each predicted token
    values = 2 * shape.width * predicted

    # the adapter merged into the weights; each token's keys and values kept
    generate = products.forward(positions, pairs, predicted, adapted=False)
    # the reward is read at the last token
    score = products.forward(sum(whole), causal_pairs(whole), 0, adapted=True)
    reference = products.forward(positions, pairs, predicted, adapted=False)
    policy = products.forward(positions, pairs, predicted, adapted=True)
    policy += products.backward_lora(positions, pairs, predicted)

    # on another role's trunk the hidden states are known, and a head is all there is
    critic_forward, critic_backward = values, 2 * values
    if critic == "adapter":
        critic_forward += products.forward(positions, pairs, 0, adapted=True)
        critic_backward += products.backward_lora(positions, pairs, 0)
    elif critic == "whole":
        critic_forward += products.forward(positions, pairs, 0, adapted=False)
        critic_backward += products.backward_whole(positions, pairs)

    return {
        "generate": generate,
        "score": score,
        "measure": reference + critic_forward,
        "learn": epochs * (policy + critic_forward + critic_backward),
    }
