"""Models, prompts and workloads of the speed benchmark, the same for both sides.

python -m benchmarks.speed.shapes '{"name": "4M", ...}' FOLDER     # writes the model (see `write_models`)
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PAD, EOS, UNKNOWN = 0, 1, 2
# the first id that prompts are made of
FIRST_WORD = 3
# the words alone, and EOS after an answer
TEMPLATE = (
    "{%- for message in messages %}{{ message['content'] + ' ' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{ eos_token }}{%- endgeneration %}{%- endif %}{%- endfor %}"
)


@dataclass(frozen=True)
class ModelShape:
    """A Llama with tied embeddings."""

    name: str
    width: int
    layers: int
    vocabulary: int
    head_width: int = 64

    @property
    def heads(self) -> int:
        return self.width // self.head_width

    @property
    def inner(self) -> int:
        """Return the width of the MLP: 8/3 of the model's, rounded up to a multiple of 16."""
        return -(-8 * self.width // (3 * 16)) * 16

    @property
    def parameters(self) -> int:
        """Return the number of weights in matrices, the embeddings once."""
        layer = sum(inputs * outputs for inputs, outputs in self.layer_matrices)
        return self.layers * layer + self.vocabulary * self.width

    @property
    def layer_matrices(self) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of the matrices of one layer: q, k, v, o, gate, up, down."""
        square, up = (self.width, self.width), (self.width, self.inner)
        return [square] * 4 + [up, up, (self.inner, self.width)]


@dataclass(frozen=True)
class Workload:
    """One rollout of PPO and its updates: the whole batch is learnt from `epochs` times."""

    batch: int = 64
    # of the batch, this many to each prompt
    samples_per_prompt: int = 1
    # prompts are of all lengths between these
    shortest_prompt: int = 32
    longest_prompt: int = 64
    response: int = 64
    # the mean length of a response as a share of `response`; None: nothing ends a response
    mean_share: float | None = None
    epochs: int = 4
    lora_rank: int = 16

    def prompts(self, vocabulary: int, seed: int = 0) -> list[list[int]]:
        """Return the prompts of the batch, each once, of random ids."""
        draw = random.Random(seed)
        count = self.batch // self.samples_per_prompt
        lengths = [draw.randint(self.shortest_prompt, self.longest_prompt) for _ in range(count)]
        return [[draw.randrange(FIRST_WORD, vocabulary) for _ in range(n)] for n in lengths]

    def stop_ids(self, vocabulary: int) -> list[int]:
        """Return the ids that end a response: as many as give the mean length, spread evenly.

        A model with random weights draws nearly uniformly, so the length is geometric.
        """
        if self.mean_share is None:
            return []
        count = round(stop_probability(self.mean_share, self.response) * vocabulary)
        return sorted({EOS + i * (vocabulary - EOS) // count for i in range(count)})


def stop_probability(mean_share: float, longest: int) -> float:
    """Return p such that min(G, n), G geometric with p, has the mean `mean_share` n.

    E[min(G, n)] = (1 - (1 - p)^n) / p falls with p, so bisection finds it.
    """
    low, high = 1e-9, 1.0
    for _ in range(60):
        p = (low + high) / 2
        mean = (1 - (1 - p) ** longest) / p
        low, high = (p, high) if mean > mean_share * longest else (low, p)
    return p


SHAPES = {
    "4M": ModelShape("4M", width=256, layers=4, vocabulary=2048),
    "42M": ModelShape("42M", width=512, layers=8, vocabulary=32_000),
    "0.6B": ModelShape("0.6B", width=1024, layers=34, vocabulary=151_936, head_width=128),
}
WORKLOADS = {
    "fixed": Workload(),
    "ragged": Workload(mean_share=0.4),
    # four responses to each of 16 prompts
    "samples": Workload(mean_share=0.4, samples_per_prompt=4),
    # four times as many prompts as are computed together
    "queue": Workload(mean_share=0.4, batch=256),
}


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    side: str
    # where `write_models` has written
    models: str
    shape: ModelShape
    workload: Workload
    # of our side: options of the program
    options: dict[str, Any]
    # of the peer: rows in one forward and backward pass of learning; rows sampled and measured
    # together
    micro_batch: int = 8
    rollout_batch: int = 64
    updates: int = 1
    warm_up: bool = True
    threads: int = 1
    # of sampling: rounds with seeds of their own, so that lengths average out in a ragged workload
    seed: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        shape, workload = ModelShape(**values["shape"]), Workload(**values["workload"])
        return cls(**values | {"shape": shape, "workload": workload})


def tokenizer_of(vocabulary: int) -> Any:
    """Return a tokenizer with one word for each id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNKNOWN}
    words |= {f"w{i}": i for i in range(FIRST_WORD, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def llama(**shape: Any) -> Any:
    """Return a Llama with tied embeddings and random weights of a fixed seed.

    shape: of LlamaConfig, by its names.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    common = {"tie_word_embeddings": True, "max_position_embeddings": 4096}
    return LlamaForCausalLM(LlamaConfig(**(common | ids | shape)))


def write_models(shape: ModelShape, folder: Path, rank: int) -> None:
    """Write random weights with a fixed seed: FOLDER/base, and FOLDER/reward, an adapter with a
    score head on it.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    from rlhf.model.loading import load_model, write_identity

    base, reward = folder / "base", folder / "reward"
    model = llama(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
    )
    model.save_pretrained(base)
    tokenizer_of(shape.vocabulary).save_pretrained(base)

    initial = load_model(str(base))
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = get_peft_model(initial.model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(reward)
    initial.tokenizer.save_pretrained(reward)
    write_identity(reward, initial, program="reward")

    file = reward / "adapter_model.safetensors"
    head = torch.randn(1, shape.width) / shape.width**0.5
    save_file(load_file(file) | {"base_model.model.score.weight": head}, file)


if __name__ == "__main__":
    write_models(ModelShape(**json.loads(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
