"""Which models and adapters a program holds."""

from dataclasses import dataclass
from typing import Any

from rlhf.model.files import is_whole


@dataclass(frozen=True)
class Start:
    """What a run starts from: transformers' config, and the folder of an adapter on it.

    has_adapter: the start is an adapter, whose folder may not be there yet.
    """

    shape: Any
    adapter: str | None = None
    has_adapter: bool = False


def roles_of(program: str, config: Any, start: Start) -> tuple[int, int]:
    """Return how many adapters learn, and how many are frozen beside them; of PPO on whole weights, how
    many models learn.
    """
    if program != "ppo" and not config.use_peft:
        return 0, 0
    if program == "dpo":
        return 1, 1
    if program != "ppo":
        return 1, int(program == "sft" and start.has_adapter)
    models = reward_models(config)
    frozen = models + start.has_adapter + (config.reference_ema is not None)
    return 1 + (critic_trunk(config) == "own"), frozen


def reward_models(config: Any) -> int:
    """Return how many of the reward models among PPO's scorers are adapters on the base."""
    return sum(len(_on_base(entry)) for entry in config.reward)


def _on_base(entry: dict[str, Any]) -> list[str]:
    """Return the reward models of a scorer that are adapters on the base, as is assumed of a run that
    is not there yet.
    """
    models = [entry["model"]] if "model" in entry else entry.get("ensemble", [])
    return [path for path in models if not is_whole(path)]


def critic_trunk(config: Any) -> str | None:
    """Return whose hidden states PPO's critic reads, as `rlhf.roles.critic.critic_start` decides it."""
    if not config.has_critic:
        return None
    if config.critic_trunk != "auto":
        return config.critic_trunk
    weighted = [entry for entry in config.reward if entry.get("weight", 1) and _on_base(entry)]
    return "reward" if weighted and not config.set_critic_options() else "own"


def shares_prompts(program: str, config: Any) -> bool:
    """Return whether a pair's prompt goes through the trunk once, which DPO does under adapters
    alone.
    """
    return program == "reward" or (program == "dpo" and config.use_peft)
