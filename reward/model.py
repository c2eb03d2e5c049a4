"""The reward model: a base with a scalar head, mostly as a LoRA adapter; start, load, score,
normalise.

A folder of a trained reward model holds the adapter with its head (`...score.weight` in
adapter_model.safetensors, PEFT task SEQ_CLS) or whole weights of a `...ForSequenceClassification`,
the tokenizer, and reward.json:

    {"bias": b, "scale": s, "base_fingerprint": ...}        score = s * raw + b

Whoever scores with it (reward/loaded.py, PPO's reward roles) applies the same bias and scale.
"""

import copy
import json
import math
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reward.files import HEAD, check_reward_files
from rlhf.errors import UserError
from rlhf.model.adapters import (
    adapter_settings,
    adapter_weights,
    add_adapter,
    head_name,
    load_adapter,
    use_adapter,
    without_head,
)
from rlhf.model.files import REWARD_FILE, is_adapter, read_identity, read_reward, reward_shift
from rlhf.model.loading import InitialModel, context_length, load_model, load_weights
from rlhf.model.packing import PairRows, is_right_padded, packed_inputs, packs
from rlhf.model.tokenizer import load_tokenizer
from rlhf.ranks.distributed import own_device
from rlhf.tensors import pad_right


def last_token_scores(hidden: Tensor, attention_mask: Tensor, head: nn.Module) -> Tensor:
    """Return the head's scalar at each row's last response token: hidden (B, L, H), mask (B, L) ->
    (B, 1), fp32.

    The mask decides, never the pad id: transformers' own classification models look for the last id
    that is not the pad id, and read an earlier token where a response happens to end in it.
    """
    columns = torch.arange(attention_mask.shape[1], device=hidden.device)
    last = (attention_mask.bool() * columns).argmax(-1)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = next(head.parameters()).dtype
        return head(hidden[rows, last].to(dtype))


def _forward(self, input_ids=None, attention_mask=None, paired=False, **kwargs):
    """Replaces GenericForSequenceClassification.forward: same trunk and head, the token found by
    the mask, and no padding in the trunk where that is the same function.

    `paired`: rows i and i + B/2 are two answers to one prompt, which is computed once.
    """
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    # what training code passes and the trunk does not take
    kwargs.pop("labels", None)
    kwargs.pop("return_dict", None)
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    trunk = getattr(self, self.base_model_prefix)
    is_plain = kwargs.keys() <= {"use_cache"} and is_right_padded(attention_mask)
    if is_plain and packs(self, input_ids.shape[1]):
        rows = PairRows.of(input_ids, attention_mask, paired=paired)
        hidden = rows.at_places(trunk(**packed_inputs(rows)).last_hidden_state)
    else:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        hidden = trunk(**inputs, **kwargs).last_hidden_state
    return SequenceClassifierOutputWithPast(
        logits=last_token_scores(hidden, attention_mask, self.score)
    )


def read_by_mask(model: nn.Module) -> nn.Module:
    """Make a classification model score at the last response token; returns the same model."""
    model.forward = types.MethodType(_forward, model)
    return model


def score_model(causal: nn.Module, seed: int = 0) -> nn.Module:
    """Return a classification model with one output on the trunk of `causal` (shared, not copied),
    with a fresh head.

    The head is drawn from N(0, 1 / (H + 1)) with its own generator (Stiennon et al. 2020; arXiv
    2403.17031) and stays in fp32. Raises UserError if transformers has no such model for this
    architecture.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(causal.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        raise UserError(
            f"{config.model_type}: transformers has no sequence classification for this model"
        ) from None
    # the head is found, trained and saved under this name
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(
            f"{config.model_type}: its classification model has no linear head called 'score'"
        )

    # the trunk is shared: the model on the meta device gave the structure alone
    setattr(model, model.base_model_prefix, causal.base_model)
    width = model.score.in_features
    head = nn.Linear(width, 1, bias=False, dtype=torch.float32)
    # a generator of its own: the head does not depend on what was drawn before
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, width, generator=generator) / math.sqrt(width + 1))
    model.score = head
    return read_by_mask(model.train(causal.training))


def trainable_reward(
    initial: InitialModel, lora: Any | None, seed: int = 0, dropout: float = 0.0
) -> nn.Module:
    """Return the model that reward training starts from, with a fresh score head.

    The adapter of the initial model (SFT's) is the start of the reward adapter, under its LoRA
    settings; without one a new adapter is put on by `lora` (task type SEQ_CLS); with `lora` None
    the whole model is trained. `dropout` is on the input of an adapter that is continued; a new one
    has that of `lora`.
    """
    model = score_model(initial.model, seed)
    # what SFT has learnt is a better start than fresh factors
    if initial.adapter_path:
        return _with_adapter(model, initial.adapter_path, head_name(initial.model), dropout=dropout)
    return model if lora is None else add_adapter(model, lora)


def _with_adapter(
    model: nn.Module, path: str, output_head: str, name: str = "default", dropout: float = 0.0
) -> nn.Module:
    """Return `model` with the adapter in a folder, trainable, and its score head where it has one.

    What the adapter holds for the output head, the base's module of that name, is left out, since
    there is none here. Refuses weights that do not fit.
    """
    config = without_head(adapter_settings(path), output_head)
    # PEFT saves the head along with an adapter of this type
    config.task_type = "SEQ_CLS"
    saved = config.modules_to_save or []
    config.modules_to_save = [name for name in saved if name not in ("score", "classifier")]
    config.modules_to_save.append("score")
    config.lora_dropout = dropout
    leave = [output_head]
    # SFT's adapter has no head: the fresh one stays
    if f"base_model.model.{HEAD}" not in adapter_weights(path):
        leave.append("score")
    return load_adapter(model, path, config, name, tuple(leave))


@dataclass
class RewardModel:
    """A loaded reward model. Scores are scale * raw + bias."""

    model: nn.Module
    tokenizer: Any
    bias: float = 0.0
    scale: float = 1.0
    # its adapter's name on `model`, where others may stand beside it; None: whole weights
    adapter: str | None = None
    # of an adapter's base: its fingerprint, and the name of the output head that it came with
    base: tuple[str, str] | None = None

    def score_ids(
        self,
        rows: list[list[int]],
        batch_size: int = 32,
        progress: Callable[[int], Any] | None = None,
    ):
        """Return the scores of B sequences (prompt ids + response ids, EOS included where there is
        one).

        Raises UserError for one that is longer than the model's positions.
        """
        # beyond its positions a model returns numbers that mean nothing
        limit, longest = context_length(self.model.config), max(map(len, rows), default=0)
        if limit is not None and longest > limit:
            raise UserError(
                f"{self.model.config.name_or_path}: a prompt and response of {longest} tokens, but this reward model "
                f"has positions for {limit}. Lower max_prompt_length or max_response_length"
            )
        active = use_adapter(self.model, self.adapter) if self.adapter else nullcontext()
        with active:
            raw = raw_scores(self.model, rows, self.tokenizer.pad_token_id, batch_size, progress)
        return [self.scale * value + self.bias for value in raw]


def raw_scores(
    model: nn.Module,
    rows: list[list[int]],
    pad_id: int,
    batch_size: int = 32,
    progress: Callable[[int], Any] | None = None,
) -> list[float]:
    """Return scores before bias and scale, in the order of `rows`; batches are of like lengths,
    right padded.

    `progress` is called with the number of rows done. The model is in eval mode meanwhile, and put
    back.
    """
    device, training = next(model.parameters()).device, model.training
    # rows of like lengths together: less padding
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = [math.nan] * len(rows)
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(rows), batch_size):
                places = order[start : start + batch_size]
                part = [rows[place] for place in places]
                ids = pad_right(part, pad_id).to(device)
                mask = pad_right([[1] * len(row) for row in part]).to(device)
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                for place, value in zip(places, logits.squeeze(-1).tolist(), strict=True):
                    scores[place] = value
                if progress:
                    progress(len(part))
    finally:
        model.train(training)
    return scores


def load_reward(
    path: str, device: Any = None, dtype: str = "float32", beside: RewardModel | None = None
) -> RewardModel:
    """Return the reward model in a folder (adapter and head on their base, or whole weights) or on
    the Hub.

    beside: an adapter on the same base, which the new one joins there (see `RewardModels`). Raises
    UserError when the head is missing, the base is another one than it was trained on, or nothing
    is there.
    """
    adapter = base = None
    if is_adapter(path):
        check_reward_files(path)
        if beside is None:
            initial = load_model(path, dtype)
            model, adapter = score_model(initial.model), "default"
            tokenizer = initial.tokenizer
            base = (initial.fingerprint, head_name(initial.model))
        else:
            model, adapter = beside.model, f"reward{len(beside.model.peft_config) + 1}"
            tokenizer, base = load_tokenizer(path), beside.base
        # scores of an adapter on another base would be noise
        _require_base(path, base[0])
        model = _with_adapter(model, path, base[1], adapter)
    else:
        model, tokenizer = _load_whole(path, dtype)

    model.eval().requires_grad_(False)
    model.to(device or own_device())
    scale, bias = reward_shift(path)
    return RewardModel(model, tokenizer, bias, scale, adapter, base)


def _require_base(path: str, found: str) -> None:
    """Raise UserError unless an adapter was trained on the base with the fingerprint `found`."""
    # adapters of other programs carry no fingerprint
    for record in (read_identity(path), read_reward(path)):
        if record.get("base_fingerprint") not in (None, "", found):
            raise UserError(
                f"{path}: trained on base {record['base_fingerprint']}, but its base now has fingerprint {found}. "
                "Point 'base_model_name_or_path' in its adapter_config.json to the right base"
            )


def check_reward(path: str) -> None:
    """Raise UserError where `load_reward` would, as far as tokenizer and adapter tell after
    `check_reward_files`, without loading a model.
    """
    load_tokenizer(path)
    if is_adapter(path):
        adapter_settings(path)


def _load_whole(path: str, dtype: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(path)
    model = load_weights(AutoModelForSequenceClassification, path, dtype, None, path)
    if model.config.num_labels != 1:
        raise UserError(
            f"{path}: the model has {model.config.num_labels} outputs, a reward model has one"
        )
    # neighbouring bfloat16 numbers are too far apart for scores
    model.score.float()
    return read_by_mask(model), tokenizer


def write_reward(path: str | Path, bias: float, scale: float, **more: Any) -> None:
    """Write reward.json; `more` says where bias and scale come from and on which base the model is.

    Raises UserError unless bias and scale are finite.
    """
    if not math.isfinite(bias * scale):
        raise UserError(
            f"{path}: not saved: bias {bias} and scale {scale} of the scores are not finite"
        )
    content = {"bias": bias, "scale": scale, "formula": "score = scale * raw + bias", **more}
    (Path(path) / REWARD_FILE).write_text(json.dumps(content, indent=2) + "\n")


def normalisation(reference_scores: list[float], kind: str) -> tuple[float, float]:
    """Return (bias, scale) that give reference responses mean 0 (`mean`), and standard deviation 1
    too (`mean_std`).

    arXiv 2403.17031: the reward model is shifted so that SFT references score 0 on average. `none`:
    (0, 1).
    """
    if kind == "none" or not reference_scores:
        return 0.0, 1.0
    # float64: the shift is subtracted from every score of the run
    values = torch.tensor(reference_scores, dtype=torch.float64)
    spread = float(values.std(correction=0))
    scale = 1.0 / spread if kind == "mean_std" and spread > 0 else 1.0
    return -scale * float(values.mean()), scale
