"""Models and sizes of the GPU benchmark."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.speed.shapes import PAD


@dataclass(frozen=True)
class QwenShape:
    """The sizes of a Qwen3 model with tied embeddings, as in its config.json."""

    name: str
    width: int
    layers: int
    inner: int
    heads: int = 16
    kv_heads: int = 8
    head_width: int = 128
    vocabulary: int = 151_936

    @property
    def layer_matrices(self) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of the matrices of one layer: q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        attention = [(self.width, queries), (self.width, keys), (self.width, keys)]
        mlp = [(self.width, self.inner), (self.width, self.inner), (self.inner, self.width)]
        return [*attention, (queries, self.width), *mlp]

    @property
    def parameters(self) -> int:
        """Return the number of weights in matrices, the embeddings once."""
        layer = sum(inputs * outputs for inputs, outputs in self.layer_matrices)
        return self.layers * layer + self.vocabulary * self.width

    def model(self, device: torch.device) -> torch.nn.Module:
        """Return the causal model with random weights, in bfloat16, in eval mode."""
        from transformers import AutoModelForCausalLM, Qwen3Config

        config = Qwen3Config(
            name_or_path=self.name,
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_width,
            max_position_embeddings=40_960,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            eos_token_id=None,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@dataclass(frozen=True)
class Sizes:
    """How much each cell computes."""

    # tokens of each prompt and of each response in sampling
    prompt: int = 256
    response: int = 256
    # rows sampled together
    batches: tuple[int, ...] = (64, 256)
    # tokens of a row in learning, half of them the response's, and of a micro-batch
    row: int = 1024
    micro_batches: tuple[int, ...] = (16_384, 65_536)
    # of a whole update of PPO
    episodes: int = 256
    epochs: int = 4
    # updates that are timed
    repeats: int = 3
    # side of the square matrices and bytes of the copies that measure the device
    matrix: int = 8192
    copied: int = 2**31


SHAPES = [
    QwenShape("0.6B", width=1024, layers=28, inner=3072),
    QwenShape("1.7B", width=2048, layers=28, inner=6144),
]
SIZES = Sizes()
TINY_SHAPE = QwenShape("tiny", 32, 2, 64, heads=4, kv_heads=2, head_width=8, vocabulary=256)
TINY_SIZES = Sizes(
    prompt=6, response=4, batches=(3,), row=16, micro_batches=(64,), episodes=4, epochs=2, repeats=1,
    matrix=64, copied=2**16,
)  # fmt: skip
