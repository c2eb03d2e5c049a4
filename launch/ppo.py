"""Proximal policy optimisation against a reward model, or any other scorer (Schulman et al. 2017).

    deepspeed launch/ppo.py --config configs/ppo.yaml [--option value ...]

The trainer is rlhf/ppo/trainer.py, the loop around it rlhf/ppo/loop.py. Each reward model of
`reward` that is an adapter on the policy's base becomes a role on it; every other scorer is a model
or function of its own.
"""

import json
import sys
from pathlib import Path

# started as a file, from launch/, where reward.py would shadow the package `reward`
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rlhf.config import parse
from rlhf.data.records import Instruction, Prompt
from rlhf.options.ppo import PPOConfig
from rlhf.program import program
from rlhf.runs.start import start_run


@program
def main(argv: list[str] | None = None) -> None:
    config = parse(PPOConfig, argv)
    from reward.compose import build_scorer, check_scorers
    from reward.ensemble import SPREAD
    from reward.loaded import RewardModels
    from reward.specs import EnsembleSpec, ModelSpec, parse_specs
    from rlhf.ppo.guards import check_watched

    scorers = parse_specs(config.reward, "reward")
    evaluated = [
        entry for entry in config.eval_scorers if entry not in config.reward
    ] + config.reward
    weights = {spec.name: spec.weight for spec in scorers}
    check_watched(config.guards, weights)
    check_scorers(evaluated, where="eval_scorers and reward", without_torch=True)
    run = start_run("ppo", config)

    # torch takes seconds to import, and wrong options are reported before
    from rlhf import stages
    from rlhf.model.tokenizer import stop_ids
    from rlhf.ppo.batches import TrainingData
    from rlhf.ppo.loop import TrainingLoop
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.ranks.deepspeed_config import read_deepspeed_config
    from rlhf.runs.budget import Budget

    # the initial policy and the data
    initial = stages.load_initial_model(run)
    tokenizer = initial.tokenizer
    data = TrainingData(
        run.data.rows(Prompt, "train", tokenizer), tokenizer, stop_ids(tokenizer, initial.model)
    )
    if config.ptx_data:
        data.pretraining = run.data.rows(Instruction, "train", tokenizer, config.ptx_data)
    plan = f"{config.total_steps} steps of {config.rollout_batch_size} responses"
    run.log(f"{len(data.prompts)} training prompts, {plan}")

    record_scorers(run, config.reward, scorers)

    engine = stages.sampling_engine(run, initial)
    # its scorer needs the roles, and follows
    evaluation = stages.evaluation(run, initial, None, engine)
    roles = load_roles(run, initial, scorers)

    budget = Budget()
    loaded = RewardModels(on_base=budget.watch)
    builders = {ModelSpec: model_builder(roles, loaded, config.micro_batch_tokens)}
    scorer = build_scorer(config.reward, tokenizer, builders)
    if evaluation is not None:
        evaluation.scorer = build_scorer(evaluated, tokenizer, builders)
    trainer = PPOTrainer(
        config,
        roles,
        scorer,
        data,
        run.world,
        budget=budget,
        deepspeed_config=read_deepspeed_config(config.deepspeed, run.world, config),
        engine=engine,
        monitored=[spec.name for spec in scorers if not spec.weight],
        spreads=[f"{spec.name}/{SPREAD}" for spec in scorers if isinstance(spec, EnsembleSpec)],
    )

    loop = TrainingLoop(run, trainer, initial, evaluation, weights)
    loop.finish(stopped=loop.train())


def record_scorers(run, entries: list[dict], scorers) -> None:
    """Record the files that the run is scored by, and say what their cards doubt."""
    from reward.cards.verdict import doubts_of
    from rlhf.files import files_fingerprint, scorer_files

    for entry, spec in zip(entries, scorers, strict=True):
        run.record_dependency(f"reward {json.dumps(entry)}", files_fingerprint(scorer_files(entry)))
        run.read_models += spec.model_folders
        for folder in spec.model_folders:
            for doubt in doubts_of(folder):
                run.log(f"WARNING: {folder}: {doubt}")


def load_roles(run, initial, scorers):
    """Return policy, reference, critic and the reward models on the initial model's base as roles."""
    from rlhf import stages
    from rlhf.roles.critic import critic_start, find_reward_roles, find_whole_start
    from rlhf.roles.one_base import Roles
    from rlhf.roles.whole_weights import WholeRoles

    config = run.config
    weight_of_model = model_weights(scorers)
    on_base = find_reward_roles(weight_of_model, initial)
    if len(on_base) > 1:
        run.log(f"{len(on_base)} reward models share the policy's base: {', '.join(on_base)}")
    reward_path = on_base[0] if on_base else None
    # the folder of the one that the critic may start from or read
    critic_path = reward_path
    if not config.use_peft:
        critic_path = find_whole_start(weight_of_model, reward_path, initial)
    critic = critic_start(
        config,
        critic_path,
        weight_of_model.get(critic_path, 0.0),
        other_scorers(scorers, critic_path),
        is_role=critic_path == reward_path,
    )
    run.log(critic.describe(critic_path))
    kind = Roles if config.use_peft else WholeRoles
    return kind(
        initial,
        stages.new_lora(run, initial),
        reward_path,
        config.gradient_checkpointing,
        critic=critic.source,
        ema_reference=config.reference_ema is not None,
        reward_weight=critic.weight,
        critic_trunk=critic.trunk,
        more_rewards=on_base[1:],
        critic_path=critic_path,
    )


def model_weights(scorers) -> dict[str, float]:
    """Return the weight of each reward model among the scorers in the total score, by its folder.

    A member of an ensemble counts as much as the ensemble.
    """
    weights: dict[str, float] = {}
    for spec in scorers:
        for folder in spec.model_folders:
            weights[folder] = weights.get(folder, 0.0) + spec.weight
    return weights


def other_scorers(scorers, reward_path: str | None) -> dict[str, float]:
    """Return name -> weight of what the reward model at `reward_path` does not know of the total
    score.
    """
    from reward.specs import ModelSpec

    others: dict[str, float] = {}
    for spec in scorers:
        if reward_path not in spec.model_folders:
            others[spec.name] = spec.weight
        elif not isinstance(spec, ModelSpec):
            others[f"the other members of {spec.name}"] = spec.weight
    return others


def model_builder(roles, loaded, tokens: int = 0):
    """Return the function by which `build_scorer` makes a scorer of a ModelSpec: one of the roles,
    which read ids on the shared base, or a model of its own, loaded by `loaded`, a `RewardModels`.

    `tokens` bounds the passes of roles.
    """
    from reward.compose import build_model
    from rlhf.ppo.rollout import role_scorer

    def build(spec, tokenizer):
        role = roles.reward_roles.get(spec.model)
        if role is None:
            return build_model(spec, tokenizer, models=loaded)
        pad_id = tokenizer.pad_token_id
        return role_scorer(roles, pad_id, spec.batch_size, spec.name, tokens, role)

    return build


if __name__ == "__main__":
    main()
