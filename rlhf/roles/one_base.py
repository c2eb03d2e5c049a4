"""One frozen base, four roles: policy, reference, value and reward as LoRA adapters, two of them
with a scalar head. Further reward models, such as the members of an ensemble, are roles too.

    roles = Roles(initial, lora, reward_path="runs/reward")
    with roles.use("policy"):
        logprobs, entropy = roles.logprobs(batch)       # hold the role through forward AND backward

Switching the adapter between forward and backward yields no gradient, or wrong ones under gradient
checkpointing, and says nothing; so a role is only ever a context.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.model.adapters import (
    adapter_parameters,
    add_adapter,
    frozen_copy,
    head_name,
    load_adapter,
    without_head,
)
from rlhf.model.dropout import disable_dropout
from rlhf.model.files import VALUE_HEAD_FILE, require_policy, reward_shift
from rlhf.model.loading import InitialModel, check_same_base, write_identity
from rlhf.model.logprobs import (
    head_is_frozen,
    response_logprobs,
    response_places,
    response_states,
    scatter_to_mask,
    token_logprobs,
)
from rlhf.model.packing import decoder_and_head, head_is_plain, hidden_width
from rlhf.model.weights import check_finite
from rlhf.ranks.divided import whole
from rlhf.roles.adapters import adapter_config, keep_in_float32, plain_config
from rlhf.roles.critic import SCORE, ValueHead, check_critic, reward_head, score_weight

# what a forward pass reads of `Rollout.batch`
COLUMNS = ("ids", "attention", "positions", "responses", "mask")
EMA_REFERENCE = "ema_reference"  # an exponential moving average of the policy
REWARD = "reward"  # the first reward model, which a critic may start from or read


class Roles(nn.Module):
    """The roles as one module, to be wrapped in one DeepSpeed engine.

    The policy is a trainable copy of the initial model's adapter and the reference a frozen one; on
    an initial model without adapter (a whole or merged SFT model) the policy is new and the
    reference is the base with adapters off.
    """

    def __init__(
        self,
        initial: InitialModel,
        lora: LoraConfig,
        reward_path: str | None = None,
        gradient_checkpointing: bool = False,
        critic: str | None = "auto",
        ema_reference: bool = False,
        reward_weight: float = 1.0,
        critic_trunk: str = "own",
        more_rewards: Sequence[str] = (),
        critic_path: str | None = None,
    ):
        """Put the adapters on the initial model's base.

        lora: the settings of new adapters.
        reward_path: the folder of the reward model; None leaves the reward role out.
        more_rewards: folders of further reward models on this base, each a role of its own that
        only scores (see `reward_roles`).
        critic: what the value role starts from: "reward" (adapter and head of the reward role,
        2403.17031), "policy" (the policy's adapter, a head of zeros), "fresh" (a new adapter, a
        head of zeros) or "auto" (reward where there is one, else policy); None leaves it out.
        ema_reference: add a copy of the policy that `update_ema` moves towards it.
        reward_weight: the weight in the total of the score of the reward model that the critic
        starts from, and predicts.
        critic_trunk: whose hidden states the critic's head reads: "own" (an adapter of its own),
        "reward" (the frozen reward role's) or "policy". `critic` counts for "own" alone; the others
        start with a head of zeros.
        critic_path: the folder of the reward model that "reward" is in `critic`; None: that of the
        reward role.
        """
        super().__init__()
        critic_path = critic_path or reward_path
        if critic == "auto":
            critic = "reward" if critic_path else "policy"
        # read off the model before adapters wrap its modules
        self.plain_head = head_is_plain(initial.model)
        self.output_head = head_name(initial.model)
        self.width = hidden_width(initial.model)
        if critic:
            read = (reward_path, critic_path)
            check_critic(initial, *read, critic, critic_trunk, plain_head=self.plain_head)
        self.critic_trunk = critic_trunk
        # hidden states of responses under the reward role, by the row's ids; None: not kept
        self._kept_states: dict[tuple[int, ...], Tensor] | None = None
        # folder of a reward model -> its role; role -> (scale, bias) of its scores
        self.reward_roles: dict[str, str] = {}
        self.score_shifts: dict[str, tuple[float, float]] = {}
        self.trunk = initial.model
        self.heads = nn.ModuleDict()

        # in this order: a new adapter or head draws its weights from the global random state
        self._add_policy(initial, lora, ema_reference=ema_reference)
        if critic:
            if critic_trunk == "own":
                self._add_critic(initial, lora, critic, critic_path)
            self._add_critic_head()
        if reward_path:
            self._add_reward(initial, reward_path, REWARD)
        for number, path in enumerate(more_rewards, 2):
            self._add_reward(initial, path, f"{REWARD}{number}")
        if critic == "reward" and critic_trunk == "own":
            self._start_critic_as_reward(critic_path, reward_weight)

        self._layers = [
            m for m in self.trunk.modules() if isinstance(m, LoraLayer | AuxiliaryTrainingWrapper)
        ]
        self._set_precision(next(initial.model.parameters()).dtype)

        # looked up once: names are matched against patterns, and roles change at every pass
        self._role_parameters: dict[str, list[nn.Parameter]] = {}
        names = list(self._adapters)
        # all that is not the base's
        self.adapted = [p for role in names for p in adapter_parameters(self.trunk, role).values()]
        self.adapted += self.heads.parameters()
        self._trained = self.parameters_of("policy")
        if self.critic_learns:
            self._trained += self.parameters_of("value")
        for parameter in self.parameters():
            parameter.requires_grad_(False)

        # dropout would make the first probability ratio differ from 1
        disable_dropout(self)
        if gradient_checkpointing:
            self._recompute_activations(initial)
        self._activate("policy")

    def _set_precision(self, dtype: torch.dtype) -> None:
        """Keep what learns in float32 at least, on a base in `dtype`."""
        self.heads.float()
        if dtype == torch.float64:
            self.double()
        elif dtype == torch.bfloat16:
            for layer in self._layers:
                keep_in_float32(layer, dtype)

    def _recompute_activations(self, initial: InitialModel) -> None:
        """Let passes keep no activations, which the backward pass makes again.

        Safe because a role is held through backward: what is recomputed is the same role.
        """
        initial.model.activation_checkpointing_enable()
        self.trunk.enable_input_require_grads()

    def _add(
        self, name: str, config: LoraConfig, path: str | None, leave: tuple[str, ...] = ()
    ) -> None:
        """Put an adapter on the trunk: that of a folder, without the modules to leave, or a new
        one.
        """
        if path:
            self.trunk = load_adapter(self.trunk, path, config, name, leave)
        else:
            self.trunk = add_adapter(self.trunk, config, name)

    def _add_policy(self, initial: InitialModel, lora: LoraConfig, *, ema_reference: bool) -> None:
        """Add the policy and the references that start as it does."""
        path = initial.adapter_path
        if path:
            require_policy(path)
        config = adapter_config(path) if path else plain_config(lora)
        self._add("policy", config, path)
        if path:
            self._add("reference", config, path)
        if ema_reference:
            frozen_copy(self.trunk, "policy", EMA_REFERENCE)

    def _add_critic(
        self, initial: InitialModel, lora: LoraConfig, start: str, critic_path: str | None
    ) -> None:
        """Add the adapter of a critic that has a trunk of its own."""
        paths = {"reward": critic_path, "policy": initial.adapter_path, "fresh": None}
        path = paths[start]
        config = adapter_config(path) if path else plain_config(lora)
        self._add("value", without_head(config, self.output_head), path, (self.output_head, SCORE))

    def _add_critic_head(self) -> None:
        """Add the head of the critic, of zeros."""
        head = ValueHead(self.width, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.heads["value"] = head

    def _add_reward(self, initial: InitialModel, path: str, role: str) -> None:
        """Add the role of a reward model with its head, scale and bias."""
        check_same_base(path, initial)
        config = adapter_config(path)
        self._add(role, without_head(config, self.output_head), path, (self.output_head, SCORE))
        self.heads[role] = reward_head(path, self.width)
        self.score_shifts[role] = reward_shift(path)
        self.reward_roles[path] = role

    @torch.no_grad()
    def _start_critic_as_reward(self, path: str, weight: float) -> None:
        """Let the critic predict what a reward model adds to the total score, scale and bias
        included.
        """
        value = self.heads["value"]
        scale, bias = reward_shift(path)
        value.weight.copy_(score_weight(path, self.width) * scale * weight)
        value.bias.fill_(bias * weight)

    @property
    def model(self) -> nn.Module:
        """Return the model that computes the role in use."""
        return self.trunk

    @property
    def models(self) -> list[nn.Module]:
        """Return the models of all roles, each once."""
        return [self.trunk]

    @property
    def precision(self) -> torch.dtype:
        """Return the dtype of what is measured: float32, or float64 on a base in float64."""
        return torch.promote_types(self._trained[0].dtype, torch.float32)

    @property
    def _adapters(self) -> dict[str, LoraConfig]:
        """Return the settings of the adapters on the trunk by role."""
        return getattr(self.trunk, "peft_config", {})

    def kept_vocabulary(self, *, entropy_learns: bool) -> int:
        """Return the size of the vocabulary where the policy's passes keep the logits of all their
        tokens, 0 where they make a portion at a time.
        """
        head = decoder_and_head(self.model)[1]
        if self.plain_head and head_is_frozen(head) and not entropy_learns:
            return 0
        return self.model.config.get_text_config().vocab_size

    @property
    def has_reference_adapter(self) -> bool:
        return "reference" in self._adapters

    @property
    def has_critic(self) -> bool:
        return "value" in self.heads

    @property
    def critic_learns(self) -> bool:
        """Return whether there is a critic that gradients train; one on fixed states is fitted."""
        return self.has_critic and self.critic_trunk != "reward"

    @property
    def has_ema_reference(self) -> bool:
        return EMA_REFERENCE in self._adapters

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Move the EMA reference towards the policy: reference <- decay * reference + (1 - decay) *
        policy.

        On all that the adapter holds: LoRA's factors, not their product.
        """
        policy = adapter_parameters(self.trunk, "policy")
        for name, target in adapter_parameters(self.trunk, EMA_REFERENCE).items():
            target.data.mul_(decay).add_(policy[name].data, alpha=1 - decay)

    def ema_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the EMA reference."""
        return list(adapter_parameters(self.trunk, EMA_REFERENCE).values())

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """The parameters of a role that count in its output, its head included; none for a role
        that is not there.
        """
        named = adapter_parameters(self.trunk, role)
        if role not in self.heads:
            return list(named.values())
        unread = f"base_model.model.{self.output_head}."
        return [p for n, p in named.items() if not n.startswith(unread)] + list(
            self.heads[role].parameters()
        )

    @contextlib.contextmanager
    def use(self, role: str):
        """Make `model` the role inside the context, which gives it: policy, reference,
        ema_reference, value or one of `reward_roles`. Do not nest.
        """
        self._activate(role)
        try:
            yield self.model
        finally:
            self._activate("policy")

    def _activate(self, role: str) -> None:
        bare = role == "reference" and not self.has_reference_adapter
        for layer in self._layers:
            if isinstance(layer, LoraLayer):
                # PEFT's own methods would also freeze and thaw parameters, which takes longer
                # than the pass of a small model
                layer._disable_adapters = bare
                layer._active_adapter = [role]
                continue
            layer.enable_adapters(not bare)
            if role not in layer._adapters:
                # the base's own module, for a role that holds none of its own
                layer.set_adapter([])
            elif not bare:
                layer.set_adapter(role)
        for parameter in self.adapted:
            parameter.requires_grad_(False)
        for parameter in self._trained:
            parameter.requires_grad_(True)
        # matmul sums in another order where a weight asks for no gradient and its input is
        # transposed (Mamba): roles that are held against each other, which is done without
        # gradients, are to sum alike
        if not bare and not torch.is_grad_enabled():
            if role not in self._role_parameters:
                self._role_parameters[role] = self.parameters_of(role)
            for parameter in self._role_parameters[role]:
                parameter.requires_grad_(True)

    def logprobs(
        self, batch: dict[str, Tensor], temperature: float = 1.0, *, entropy_learns: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return log p of each response token and the entropy there, (B, T), under the role in use.

        batch: see `Rollout.batch`. Gradients flow through the entropy only if `entropy_learns`.
        """
        columns = [batch[name] for name in COLUMNS]
        return response_logprobs(self.model, *columns, temperature, self.plain_head, entropy_learns)

    def logprobs_and_values(
        self, batch: dict[str, Tensor], temperature: float, *, entropy_learns: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `logprobs` and the values (B, T) of a critic on the policy's trunk, in one pass."""
        mask, states = batch["mask"], self.states(batch)
        head = decoder_and_head(self.model)[1]
        chosen = batch["responses"][mask]
        found = token_logprobs(states, head, chosen, temperature, entropy_learns)
        logprobs, entropy = (scatter_to_mask(numbers, mask) for numbers in found)
        return logprobs, entropy, self.values_of(states, mask)

    def states(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the hidden states (n, H) before each of the batch's n response tokens."""
        places = response_places(batch["attention"], batch["positions"], batch["mask"])
        return response_states(self.model, batch["ids"], batch["attention"], places)

    def values_of(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the critic's values of states (n, H) at the mask (B, T), 0 elsewhere."""
        return scatter_to_mask(_apply(self.heads["value"], states), mask)

    def values(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the value of the state before each response token, (B, T); inside
        `use_critic()`.
        """
        return self.values_of(self.states(batch), batch["mask"])

    def use_critic(self) -> contextlib.AbstractContextManager[Roles]:
        """Return the context in which the trunk is the one that the critic's head reads."""
        return self.use("value" if self.critic_trunk == "own" else self.critic_trunk)

    def scores(self, batch: dict[str, Tensor], role: str = REWARD) -> Tensor:
        """Return a reward model's score at each row's last token, (B,); inside `use(role)`."""
        attention, mask = batch["attention"], batch["mask"]
        places = response_places(attention, batch["positions"], mask)
        lengths = attention.sum(-1)
        last = torch.arange(attention.shape[1], device=lengths.device) == lengths[:, None] - 1
        states = response_states(self.trunk, batch["ids"], attention, places | last)
        is_last = last[places | last]
        # the critic reads the first reward model's alone
        if self._kept_states is not None and role == REWARD:
            before = states[~is_last].split(mask.sum(-1).tolist())
            for row, own in zip(rows_of(batch), before, strict=True):
                self._kept_states[row] = own
        scale, bias = self.score_shifts[role]
        return _apply(self.heads[role], states[is_last]) * scale + bias

    @contextlib.contextmanager
    def keeping_states(self) -> Iterator[None]:
        """Keep the hidden states of what is scored inside, for `kept_states`, if the critic reads
        them.
        """
        self._kept_states = {} if self.has_critic and self.critic_trunk == "reward" else None
        try:
            yield
        finally:
            self._kept_states = None

    def kept_states(self, batch: dict[str, Tensor]) -> Tensor:
        """Return `states` (n, H) of the batch under the reward role, from when it was scored if it
        was.
        """
        rows = rows_of(batch)
        if self._kept_states is None or any(row not in self._kept_states for row in rows):
            with self.use(REWARD):
                return self.states(batch)
        return torch.cat([self._kept_states[row] for row in rows])

    def save(self, folder: str | Path, initial: InitialModel, *, writes: bool = True) -> None:
        """Write the policy in `folder`, the critic and its head in `folder`/value; on all ranks, of
        which one `writes`.

        Raises UserError, and writes nothing, if they are not finite.
        """
        with whole(self.adapted):
            if writes:
                self._write(Path(folder), initial)

    def _write(self, folder: Path, initial: InitialModel) -> None:
        check_finite(
            ((n, p) for n, p in self.named_parameters() if p.requires_grad), f"{folder}: not saved"
        )
        places = {"policy": folder}
        if "value" in self._adapters:
            places["value"] = folder / "value"
        for role, place in places.items():
            place.mkdir(parents=True, exist_ok=True)
            config = self._adapters[role]
            config.inference_mode = True
            config.save_pretrained(place)
            weights = get_peft_model_state_dict(
                self.trunk, adapter_name=role, save_embedding_layers=False
            )
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in weights.items()},
                place / "adapter_model.safetensors",
            )
            initial.tokenizer.save_pretrained(place)
            write_identity(place, initial, program="ppo", role=role)
        self._write_head(folder)

    def _write_head(self, folder: Path) -> None:
        """Write the head of the critic, where there is one, into `folder`/value."""
        if not self.has_critic:
            return
        state = self.heads["value"].state_dict()
        (folder / "value").mkdir(exist_ok=True)
        head = {name: weight.detach().cpu().contiguous() for name, weight in state.items()}
        save_file(head, folder / "value" / VALUE_HEAD_FILE)


def rows_of(batch: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """Return what tells the batch's rows apart: tokens of the response, then all ids."""
    lengths = batch["attention"].sum(-1).tolist()
    counts = batch["mask"].sum(-1).tolist()
    columns = zip(counts, batch["ids"].tolist(), lengths, strict=True)
    return [(count, *ids[:length]) for count, ids, length in columns]


def _apply(head: nn.Linear, states: Tensor) -> Tensor:
    """The scalar head in its own precision: (..., H) -> (...)."""
    return head(states.to(head.weight.dtype)).squeeze(-1)
