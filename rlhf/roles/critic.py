"""PPO's critic: what it starts from, what it takes from a reward model, and one without gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rlhf.data.encode import tokenizer_fingerprint
from rlhf.errors import UserError
from rlhf.model.adapters import adapter_weights
from rlhf.model.files import is_adapter, is_whole, read_identity, read_json
from rlhf.model.loading import InitialModel
from rlhf.model.tokenizer import load_tokenizer
from rlhf.model.weights import is_finite
from rlhf.options.ppo import PPOConfig

# the name of a reward model's scalar head, which roles keep beside the trunk
SCORE = "score"
# tokens whose states are summed up together by the critic that is fitted
PORTION = 4096


@dataclass(frozen=True)
class CriticStart:
    """What the critic starts from, and what it reads."""

    # as the parameter `critic` of Roles
    source: str | None
    # of the reward role's score in the total
    weight: float = 1.0
    # parts of the total score that the reward role does not know
    left_out: tuple[str, ...] = ()
    # as the parameter `critic_trunk` of Roles
    trunk: str = "own"

    def describe(self, reward_path: str | None) -> str:
        """Return what the critic is, in words. reward_path: the folder of the reward role."""
        if self.source is None:
            return "no critic (advantage_estimator)"
        if self.trunk == "reward":
            return f"the critic is fitted to the hidden states of {reward_path} (critic_trunk)"
        if self.trunk == "policy":
            return "the critic is a head on the policy's hidden states (critic_trunk)"
        text = f"the critic learns weights of its own, from {self.source} (critic_from)"
        if self.left_out:
            missing = ", ".join(self.left_out)
            text += f", and starts as {reward_path} times {self.weight:g}; it has yet to learn {missing}"
        return text


def find_reward_roles(weight_of_model: dict[str, float], initial: InitialModel) -> list[str]:
    """Return the reward models that become roles: those that are adapters on the initial model's
    base and read its ids. The critic may start from the first.

    weight_of_model: folder -> weight in the total score. One of weight 0, which is only monitored,
    comes after the others.
    """
    in_order = sorted(weight_of_model, key=lambda folder: weight_of_model[folder] == 0)
    return [folder for folder in in_order if _shares_base(folder, initial)]


def find_whole_start(
    models: dict[str, float], role: str | None, initial: InitialModel
) -> str | None:
    """Return the reward model that a critic on whole weights may start from: the role if it has a
    weight, else the first of whole weights that has one, reads the initial model's ids and is of its
    kind, width and depth.

    models: as of `find_reward_roles`, whose first is the role.
    """
    if models.get(role):
        return role
    for folder, weight in models.items():
        if weight and _is_alike(folder, initial):
            return folder
    return role


def _is_alike(folder: str, initial: InitialModel) -> bool:
    """Return whether a folder holds whole weights that could be the initial model's, but for the
    head.
    """
    if not is_whole(folder):
        return False
    from transformers import AutoConfig

    own, base = AutoConfig.from_pretrained(folder), initial.model.config
    configs = (own.get_text_config(), base.get_text_config())
    shapes = [(c.model_type, c.hidden_size, c.num_hidden_layers) for c in configs]
    # one with another tokenizer reads the texts
    ids = [tokenizer_fingerprint(t) for t in (load_tokenizer(folder), initial.tokenizer)]
    return shapes[0] == shapes[1] and ids[0] == ids[1]


def _shares_base(folder: str, initial: InitialModel) -> bool:
    """Return whether a reward model is a LoRA adapter on this base with this tokenizer."""
    file = Path(folder) / "adapter_config.json"
    if not file.is_file() or read_json(file).get("peft_type") != "LORA":
        return False
    identity = read_identity(folder)
    # one with another tokenizer reads the texts, with weights of its own
    same_ids = identity.get("tokenizer_fingerprint") in (
        None,
        tokenizer_fingerprint(initial.tokenizer),
    )
    return same_ids and identity.get("base_fingerprint") == initial.fingerprint


def critic_start(
    config: PPOConfig,
    reward_path: str | None,
    weight: float,
    others: dict[str, float],
    *,
    is_role: bool = True,
) -> CriticStart:
    """Return what the critic starts from, and whose hidden states it reads.

    reward_path: the reward model that it may start from; weight: that of its score in the total;
    others: name -> weight of the other scorers. is_role: it is an adapter on the base, whose hidden
    states the critic may read. Raises UserError where the critic is to start from a reward model of
    weight 0.
    """
    if not config.has_critic:
        return CriticStart(None)
    source = config.critic_from
    if source == "auto":
        source = "reward" if weight else "policy"
    trunk = config.critic_trunk
    if trunk == "auto":
        # a model that is only watched knows nothing of what the critic has to predict
        readable = is_role and weight
        trunk = "reward" if readable and not config.set_critic_options() else "own"
    if source != "reward" or reward_path is None or trunk != "own":
        return CriticStart(source, trunk=trunk)
    if not weight:
        raise UserError(
            f"critic_from is reward, but {reward_path} is only watched (weight 0), and the critic has to predict the "
            "other scores. Use --critic_from policy"
        )

    left_out = [f"{name} (weight {other:g})" for name, other in others.items() if other]
    if config.normalize_scores:
        left_out.append("the normalisation of scores")
    return CriticStart(source, weight, tuple(left_out))


def check_critic(
    initial: InitialModel,
    reward_path: str | None,
    critic_path: str | None,
    start: str,
    trunk: str,
    *,
    plain_head: bool,
) -> None:
    """Raise UserError where the critic cannot start, or read, as it is to (see `Roles`)."""
    if start == "reward" and not critic_path:
        raise UserError(
            "the critic cannot start from the reward model: none of the scorers is an adapter on "
            "this base, or, with use_peft false, a model of whole weights with this tokenizer and of "
            "this kind, width and depth. Use --critic_from policy"
        )
    if trunk == "reward" and not reward_path:
        raise UserError(
            "critic_trunk is reward, but none of the scorers is an adapter on this base. Use "
            "--critic_trunk own"
        )
    if trunk == "policy" and not plain_head:
        raise UserError(
            f"critic_trunk is policy, but a {initial.model.config.model_type} model transforms "
            "its logits, so that its hidden states are not at hand. Use --critic_trunk own"
        )


class ValueHead(nn.Linear):
    """A scalar head that computes in float32 at least, whatever it is kept in."""

    def forward(self, states: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return nn.functional.linear(states.to(wide), self.weight.to(wide), self.bias.to(wide))


def reward_head(path: str, width: int) -> nn.Linear:
    """Return the score head of a reward model. Raises UserError when it is missing."""
    head = nn.Linear(width, 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(score_weight(path, width))
    return head


def score_weight(path: str, width: int) -> Tensor:
    """Return the weight (1, width) of the score head that was trained with a reward adapter or whole
    weights, in float32. Raises UserError when it is missing.
    """
    weights = adapter_weights(path) if is_adapter(path) else _whole_head(path)
    found = [weight for name, weight in weights.items() if name.endswith(f"{SCORE}.weight")]
    if len(found) != 1:
        raise UserError(
            f"{path}: holds no score head (score.weight): no reward model of launch/reward.py"
        )
    if found[0].shape != (1, width):
        raise UserError(
            f"{path}: score head of shape {tuple(found[0].shape)}, expected (1, {width})"
        )
    return found[0].float()


def _whole_head(path: str) -> dict[str, Tensor]:
    """Return the score head by its name from files of whole weights, the rest of which is not read."""
    name, found = f"{SCORE}.weight", {}
    for file in Path(path).glob("*.safetensors"):
        with safe_open(str(file), "pt") as weights:
            names = weights.keys()
            if name in names:
                found[name] = weights.get_tensor(name)
    return found


class LeastSquaresCritic:
    """A linear critic on fixed features, fitted by ridge regression after each rollout.

        w = argmin sum_i decay^age_i (w . x_i - R_i)^2 + sum_j ridge s_j w_j^2,    x = (h, 1)

    h are a token's hidden states, R its return, and s_j the mean square of feature j, so that
    `ridge` counts tokens whatever the scale of the features (Hoerl and Kennard 1970). Values of a
    rollout come from the fit to earlier ones, so that they do not know its returns.
    """

    RIDGE, DECAY = 30.0, 0.8

    def __init__(self, head: nn.Linear):
        self.head = head
        width = head.in_features + 1
        self.moments = torch.zeros(width, width, dtype=torch.float64)
        self.products = torch.zeros(width, dtype=torch.float64)

    @torch.no_grad()
    def fit(
        self, states: Tensor, returns: Tensor, total: Callable[[Tensor], Tensor] = lambda t: t
    ) -> None:
        """Take in states (n, H) and returns (n,), and write the new weights into the head.

        total: the sum of a tensor over ranks, each of which brings states of its own. A rollout with
        a number that is not finite, on any rank, is left out.
        """
        width = states.shape[1] + 1
        moments = torch.zeros(width, width, dtype=torch.float64, device=states.device)
        products = moments.new_zeros(width)
        # in portions, since the states of a rollout in float64 would be as large as a model
        for part, own in zip(states.split(PORTION), returns.split(PORTION), strict=True):
            features = torch.cat([part.double(), part.new_ones(len(part), 1).double()], 1)
            moments += features.T @ features
            products += features.T @ own.double()
        moments, products = total(moments).cpu(), total(products).cpu()
        # sums that are NaN once stay so
        if not (is_finite(moments) and is_finite(products)):
            return
        self.moments = self.DECAY * self.moments + moments
        self.products = self.DECAY * self.products + products
        # the last feature is 1, so its sum of squares is the number of tokens
        scale = self.moments.diagonal() / self.moments[-1, -1]
        # a feature that is always 0 would make the system singular
        scale = scale.clamp(min=1e-12 * float(scale.max()))
        weights = torch.linalg.solve(self.moments + torch.diag(self.RIDGE * scale), self.products)
        self.head.weight.copy_(weights[None, :-1])
        self.head.bias.copy_(weights[-1:])

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        head = {f"head.{name}": tensor.cpu() for name, tensor in self.head.state_dict().items()}
        return {"moments": self.moments, "products": self.products, **head}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.moments, self.products = state["moments"], state["products"]
        self.head.weight.copy_(state["head.weight"])
        self.head.bias.copy_(state["head.bias"])
