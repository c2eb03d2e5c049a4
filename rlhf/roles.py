"""One frozen base, four roles: policy, reference, value and reward as LoRA adapters, two of them with a scalar head.

    roles = Roles(foundation, reward_path="runs/reward", ...)
    with roles.use("policy"):
        logprobs, entropy = roles.logprobs(batch)       # hold the role through forward AND backward

Switching the adapter between forward and backward yields no gradient, or wrong ones under gradient checkpointing,
and says nothing; so a role is only ever a context.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.config import UserError
from rlhf.models import (
    Foundation,
    check_same_base,
    decoder_and_head,
    gather_columns,
    head_is_plain,
    hidden_width,
    response_logprobs,
    write_identity,
)

TRAINED = ("policy", "value")
MOVING = "moving"  # the reference that follows the policy, when there is one
HEAD_FILE = "value_head.safetensors"


class Roles(nn.Module):
    """The roles as one module, to be wrapped in one DeepSpeed engine.

    The policy is a trainable copy of the foundation's adapter and the reference a frozen one; on a foundation without
    adapter (a whole or merged SFT model) the policy is new and the reference is the base with adapters off.
    `reward_path` None leaves the reward role out. `critic` says what the value role starts from: "reward" (adapter and
    head of the reward role, 2403.17031), "policy" (the policy's adapter, a head of zeros), "fresh" (a new adapter, a
    head of zeros), "auto" (reward where there is one, else policy); None leaves it out. `moving_reference` adds a copy
    of the policy that `follow` draws after it.
    """

    def __init__(
        self,
        foundation: Foundation,
        lora: LoraConfig,
        reward_path: str | None = None,
        gradient_checkpointing: bool = False,
        critic: str | None = "auto",
        moving_reference: bool = False,
    ):
        super().__init__()
        if critic == "reward" and not reward_path:
            raise UserError(
                "the critic cannot start from the reward model: none of the scorers is an adapter on this base"
            )
        self.plain_head = head_is_plain(foundation.model)
        start = foundation.adapter_path
        policy_config = adapter_config(start) if start else plain_config(lora)
        self.trunk = get_peft_model(foundation.model, policy_config, adapter_name="policy")
        reward = adapter_config(reward_path) if reward_path else None
        if start:
            load_adapter_weights(self.trunk, "policy", start)
            self._add("reference", policy_config, start)
        if moving_reference:
            self._add(MOVING, policy_config, None)
            self.follow(0.0)
        if critic == "auto":
            critic = "reward" if reward_path else "policy"
        width = hidden_width(self.trunk)
        self.heads = nn.ModuleDict()
        self.score_scale, self.score_bias = 1.0, 0.0
        if critic:
            config, source = {"reward": (reward, reward_path), "policy": (policy_config, start)}.get(
                critic, (plain_config(lora), None)
            )
            self._add("value", config, source)
            self.heads["value"] = nn.Linear(width, 1)
            nn.init.zeros_(self.heads["value"].weight)
            nn.init.zeros_(self.heads["value"].bias)
        if reward_path:
            check_same_base(reward_path, foundation)
            self._add("reward", reward, reward_path)
            self.heads["reward"] = reward_head(reward_path, width)
            self.score_scale, self.score_bias = reward_shift(reward_path)
        if critic == "reward":
            with torch.no_grad():  # the critic predicts what the scorer gives, shift and scale included
                self.heads["value"].weight.copy_(self.heads["reward"].weight * self.score_scale)
                self.heads["value"].bias.fill_(self.score_bias)
        self.heads.float()
        if next(foundation.model.parameters()).dtype == torch.float64:
            self.double()
        self._layers = [m for m in self.trunk.modules() if isinstance(m, BaseTunerLayer)]
        disable_dropout(self)  # it would make the first ratio differ from 1
        if gradient_checkpointing:  # safe because a role is held through backward: what is recomputed is the same role
            foundation.model.activation_checkpointing_enable()
            self.trunk.enable_input_require_grads()
        self._activate("policy")

    def _add(self, name: str, config: LoraConfig, path: str | None) -> None:
        self.trunk.add_adapter(name, config)
        if path:
            load_adapter_weights(self.trunk, name, path)

    @property
    def has_reference_adapter(self) -> bool:
        return "reference" in self.trunk.peft_config

    @property
    def has_critic(self) -> bool:
        return "value" in self.heads

    @property
    def has_moving_reference(self) -> bool:
        return MOVING in self.trunk.peft_config

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """moving <- decay * moving + (1 - decay) * policy, on the factors of the adapter (not on their product)."""
        for target, source in self._moving_pairs():
            target.data.mul_(decay).add_(source.data, alpha=1 - decay)

    def moving_parameters(self) -> list[nn.Parameter]:
        return [target for target, _ in self._moving_pairs()]

    def _moving_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        named = dict(self.trunk.named_parameters())
        return [(p, named[n.replace(f".{MOVING}.", ".policy.")]) for n, p in named.items() if f".{MOVING}." in n]

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """The parameters of a role, its head included; none for a role that is not there."""
        named = [p for n, p in self.trunk.named_parameters() if f".{role}." in n and "lora_" in n]
        return named + (list(self.heads[role].parameters()) if role in self.heads else [])

    @contextlib.contextmanager
    def use(self, role: str):
        """The trunk is `role` inside: policy, reference, moving, value or reward. Not to be nested."""
        self._activate(role)
        try:
            yield self
        finally:
            self._activate("policy")

    def _activate(self, role: str) -> None:
        bare = role == "reference" and not self.has_reference_adapter
        for layer in self._layers:
            layer.enable_adapters(not bare)
            if not bare:
                layer.set_adapter(role)
        # PEFT freezes the adapters that are not active and thaws the one that is: put back who learns here
        for name, parameter in self.trunk.named_parameters():
            parameter.requires_grad_("lora_" in name and any(f".{trained}." in name for trained in TRAINED))
        for name, head in self.heads.items():
            head.requires_grad_(name in TRAINED)

    def logprobs(self, batch: dict[str, Tensor], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """log p of each response token and the entropy there under the role in use, (B, T)."""
        return response_logprobs(
            self.trunk,
            batch["ids"],
            batch["attention"],
            batch["positions"],
            batch["responses"],
            temperature,
            self.plain_head,
        )

    def hidden(self, ids: Tensor, attention: Tensor) -> Tensor:
        """(B, L, H) hidden states under the role in use."""
        return decoder_and_head(self.trunk)[0](
            input_ids=ids, attention_mask=attention, use_cache=False
        ).last_hidden_state

    def values(self, batch: dict[str, Tensor]) -> Tensor:
        """V of the state before each response token, (B, T); inside `use("value")`."""
        states = gather_columns(self.hidden(batch["ids"], batch["attention"]), batch["positions"])
        return _apply(self.heads["value"], states)

    def scores(self, ids: Tensor, attention: Tensor) -> Tensor:
        """The reward model's score at each row's last true token, (B,); inside `use("reward")`."""
        last = (attention.sum(-1) - 1)[:, None]
        states = gather_columns(self.hidden(ids, attention), last)
        return _apply(self.heads["reward"], states)[:, 0] * self.score_scale + self.score_bias

    def save(self, folder: str | Path, foundation: Foundation) -> None:
        """The policy's adapter in `folder`, the value adapter and its head in `folder`/value. Main rank, gathered."""
        folder = Path(folder)
        for role, place in (("policy", folder), ("value", folder / "value"))[: 1 + self.has_critic]:
            place.mkdir(parents=True, exist_ok=True)
            config = self.trunk.peft_config[role]
            config.inference_mode = True
            config.save_pretrained(place)
            weights = get_peft_model_state_dict(self.trunk, adapter_name=role)
            save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, _weights(place))
            foundation.tokenizer.save_pretrained(place)
            write_identity(place, foundation, program="ppo", role=role)
        if self.has_critic:
            head = {k: v.detach().cpu().contiguous() for k, v in self.heads["value"].state_dict().items()}
            save_file(head, folder / "value" / HEAD_FILE)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0: its modules, and the rates that attention and others read as numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in vars(holder).items() if holder is not None else ():
                if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
                    setattr(holder, name, 0.0)


def plain_config(lora: LoraConfig) -> LoraConfig:
    """A LoRA config for the trunk: no dropout, no head of its own (heads stand beside the trunk, in fp32)."""
    config = LoraConfig(**{**lora.to_dict(), "lora_dropout": 0.0, "modules_to_save": None, "inference_mode": False})
    config.task_type = "CAUSAL_LM"
    return config


def adapter_config(path: str) -> LoraConfig:
    """The LoRA settings of the adapter in a folder. Raises UserError if it holds none, or one that is not LoRA."""
    if not (Path(path) / "adapter_config.json").is_file():
        raise UserError(f"{path}: no adapter (adapter_config.json) there; as a role it has to be a LoRA adapter")
    config = PeftConfig.from_pretrained(path)
    if not isinstance(config, LoraConfig):
        raise UserError(f"{path}: a {config.peft_type} adapter; roles are LoRA adapters")
    return plain_config(config)


def load_adapter_weights(model: nn.Module, name: str, path: str) -> None:
    """Copy the adapter's weights into adapter `name`. Raises UserError unless every weight finds its place."""
    weights = {k: v for k, v in load_file(_weights(path)).items() if "lora_" in k}
    result = set_peft_model_state_dict(model, weights, adapter_name=name)
    expected = {k for k in get_peft_model_state_dict(model, adapter_name=name) if "lora_" in k}
    if result.unexpected_keys or set(weights) != expected:
        missing = sorted(expected ^ set(weights))[:3] + list(result.unexpected_keys)[:3]
        raise UserError(f"{path}: its weights do not fit this base, for example {', '.join(missing)}")


def reward_head(path: str, width: int) -> nn.Linear:
    """The score head that was trained with a reward adapter. Raises UserError when it is missing."""
    weights = load_file(_weights(path))
    found = [v for k, v in weights.items() if k.endswith("score.weight")]
    if len(found) != 1:
        raise UserError(f"{path}: holds no score head (score.weight): no reward model of launch/reward.py")
    if found[0].shape != (1, width):
        raise UserError(f"{path}: score head of shape {tuple(found[0].shape)}, expected (1, {width})")
    head = nn.Linear(width, 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(found[0].float())
    return head


def reward_shift(path: str) -> tuple[float, float]:
    """(scale, bias) from reward.json: score = raw * scale + bias; (1, 0) without the file."""
    file = Path(path) / "reward.json"
    if not file.is_file():
        return 1.0, 0.0
    content: dict[str, Any] = json.loads(file.read_text())
    return float(content.get("scale", 1.0)), float(content.get("bias", 0.0))


def _apply(head: nn.Linear, states: Tensor) -> Tensor:
    """The scalar head in its own precision: (..., H) -> (...)."""
    return head(states.to(head.weight.dtype)).squeeze(-1)


def _weights(path: str | Path) -> str:
    file = Path(path) / "adapter_model.safetensors"
    if not file.parent.is_dir():
        raise UserError(f"{path}: no such folder")
    return str(file)
