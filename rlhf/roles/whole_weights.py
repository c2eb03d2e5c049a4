"""The roles of PPO on whole weights: policy and critic are models of their own, and the frozen base
is the reference, with reward models as adapters on it.

    roles = WholeRoles(initial, None, reward_path="runs/reward", ...)
"""

from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForSequenceClassification

from rlhf.model.adapters import load_adapter, without_head
from rlhf.model.files import is_adapter
from rlhf.model.loading import InitialModel
from rlhf.model.packing import decoder_and_head
from rlhf.model.weights import check_finite
from rlhf.ranks.deepspeed_backend import gathered
from rlhf.ranks.divided import whole_state
from rlhf.roles.adapters import adapter_config
from rlhf.roles.critic import SCORE
from rlhf.roles.one_base import Roles


class WholeRoles(Roles):
    """Roles whose policy and critic are whole models, trained by one optimizer with a group for each.

    All that does not learn is as in `Roles`: the reference is the base with adapters off, reward
    models are adapters on it, and a critic may read their hidden states or the policy's. What learns
    has the base's dtype; float32 copies of bfloat16 are the optimizer engine's.
    """

    def _add_policy(self, initial: InitialModel, lora: None, *, ema_reference: bool) -> None:
        self.policy = initial.another()
        self.critic: nn.Module | None = None
        self._role = "policy"
        self._base = list(initial.model.parameters())

    def _add_critic(
        self, initial: InitialModel, lora: None, start: str, critic_path: str | None
    ) -> None:
        """Add the decoder of a critic that has a trunk of its own: that of a reward model of whole
        weights, or the base, with the reward model's adapter merged in where it starts from that.
        """
        if start == "reward" and not is_adapter(critic_path):
            model = initial.another(AutoModelForSequenceClassification, critic_path)
            self.critic = model.base_model
            return
        model = initial.another()
        if start == "reward":
            config = without_head(adapter_config(critic_path), self.output_head)
            model = load_adapter(model, critic_path, config, "value", (self.output_head, SCORE))
            model = merge(model)
        self.critic = decoder_and_head(model)[0]

    def _set_precision(self, dtype: torch.dtype) -> None:
        super()._set_precision(dtype)
        # ZeRO keeps all that learns in one dtype, and an adapter may hold weights in float32
        learning = [self.critic, self.heads["value"] if self.critic_learns else None]
        for module in filter(None, learning):
            module.to(dtype)

    def _recompute_activations(self, initial: InitialModel) -> None:
        self.policy.activation_checkpointing_enable()
        if self.critic is not None:
            self.critic.activation_checkpointing_enable()

    def _activate(self, role: str) -> None:
        super()._activate(role)
        self._role = role
        # the reference is to sum as the policy does, see `Roles`
        learns = role == "reference" and not torch.is_grad_enabled()
        for parameter in self._base:
            parameter.requires_grad_(learns)

    @property
    def model(self) -> nn.Module:
        own = {"policy": self.policy, "value": self.critic}
        return own.get(self._role, self.trunk)

    @property
    def models(self) -> list[nn.Module]:
        return [self.trunk, *filter(None, (self.policy, self.critic))]

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        if role == "policy":
            return list(self.policy.parameters())
        trunk = [] if role != "value" or self.critic is None else list(self.critic.parameters())
        return trunk + super().parameters_of(role)

    def save(self, folder: str | Path, initial: InitialModel, *, writes: bool = True) -> None:
        """Write the policy as a whole model in `folder`, the critic's decoder and its head in
        `folder`/value; on all ranks, of which one `writes`.
        """
        folder = Path(folder)
        learnt = ((n, p) for n, p in self.named_parameters() if p.requires_grad)
        check_finite(learnt, f"{folder}: not saved")
        for model, place in ((self.policy, folder), (self.critic, folder / "value")):
            if model is None:
                continue
            # gathered one weight after the other, where ZeRO-3 has divided them
            state = whole_state(model, kept=writes)
            if writes:
                model.save_pretrained(place, state_dict=state)
                initial.tokenizer.save_pretrained(place)
        with gathered(self.heads.parameters()):
            if writes:
                self._write_head(folder)


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Return the causal model with its one adapter merged in; on all ranks, a layer at a time where
    ZeRO-3 has divided it.
    """
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            with gathered(layer.parameters(), modify=True):
                layer.merge()
    return model.unload()
