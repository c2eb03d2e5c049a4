"""Reward models as scorers: each is loaded once, and adapters on one base share it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.encode import encode_prompt, encode_response, tokenizer_fingerprint
from rlhf.data.records import Samples, Scorer, Scores
from rlhf.model.files import adapter_base, read_identity, read_json

if TYPE_CHECKING:
    from reward.model import RewardModel


class RewardModels:
    """Loads reward models for one list of scorers, or for several.

    k adapters on one base take the memory of one base and k adapters.
    """

    def __init__(self, on_base: Callable[[Any], None] = lambda model: None):
        """`on_base` is called with each model that is loaded, once for all adapters on it."""
        self.on_base = on_base
        # path, device and dtype -> the model
        self._models: dict[tuple, RewardModel] = {}
        # what tells bases apart -> the first model on it
        self._bases: dict[tuple, RewardModel] = {}

    def load(self, path: str, device: Any = None, dtype: str = "float32") -> RewardModel:
        """Return the reward model in a folder or on the Hub; raises as `reward.model.load_reward`."""
        # torch takes seconds to import, and scorers without a reward model need none
        from reward.model import load_reward

        place = str(Path(path).resolve()) if Path(path).exists() else path
        key = (place, str(device), dtype)
        if key in self._models:
            return self._models[key]

        base = _base_of(path)
        shared = None if base is None else (*base, str(device), dtype)
        beside = self._bases.get(shared)
        reward = load_reward(path, device, dtype, beside)
        if beside is None:
            self.on_base(reward.model)
        if shared is not None:
            self._bases.setdefault(shared, reward)
        self._models[key] = reward
        return reward


def reward_scorer(
    path: str,
    name: str = "reward",
    *,
    tokenizer: Any = None,
    batch_size: int = 32,
    device: Any = None,
    dtype: str = "float32",
    models: RewardModels | None = None,
) -> Scorer:
    """Return a reward model as a scorer; those of `models` that are on its base share it.

    `tokenizer` is the one the samples' ids come from. Where it is the reward model's too
    (vocabulary, special tokens and chat template), ids are read as they are; otherwise prompts and
    responses are encoded again by the reward model's tokenizer and template, with its EOS where the
    response ended.
    """
    reward = (models or RewardModels()).load(path, device, dtype)
    own = reward.tokenizer
    # ids of another vocabulary are other words
    same_ids = False
    if tokenizer is not None:
        same_ids = tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(own)

    def encoded_again(samples: Samples) -> list[list[int]]:
        """Return the ids of prompts and responses by the reward model's own tokenizer."""
        rows = []
        columns = (samples.prompts, samples.responses, samples.ended, samples.metadata)
        for prompt, response, ended, metadata in zip(*columns, strict=True):
            ids = encode_prompt(own, prompt, metadata.get("tools"))
            rows.append(ids + encode_response(own, response, ended))
        return rows

    def score(samples: Samples) -> Scores:
        if same_ids:
            columns = zip(samples.prompt_ids, samples.response_ids, strict=True)
            rows = [prompt + response for prompt, response in columns]
        else:
            rows = encoded_again(samples)
        total = reward.score_ids(rows, batch_size)
        return Scores(total, {name: total})

    return score


def _base_of(path: str) -> tuple | None:
    """Return what tells the base of an adapter from others, None where it cannot be shared."""
    from rlhf.model.loading import attention_of
    from rlhf.model.tokenizer import load_tokenizer

    file = Path(path) / "adapter_config.json"
    # whole weights; PEFT holds adapters of one kind alone on a model
    if not file.is_file() or read_json(file).get("peft_type") != "LORA":
        return None
    identity = read_identity(path)
    tokenizer = identity.get("tokenizer_fingerprint")
    # adapters of other programs carry none
    tokenizer = tokenizer or tokenizer_fingerprint(load_tokenizer(path))
    base = str(Path(adapter_base(path)).resolve())
    return base, attention_of(path), tokenizer, identity.get("quantization")
