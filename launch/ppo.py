"""Proximal policy optimisation against a reward model, or any other scorer (Schulman et al. 2017).

    deepspeed launch/ppo.py --config configs/ppo.yaml [--option value ...]

The trainer is rlhf/ppo.py. The first reward model of `reward` that stands on the policy's base becomes a role on it;
every other scorer is its own.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not launch/, where reward.py would shadow the package

from rlhf.config import UserError, parse, program
from rlhf.data.records import Prompt
from rlhf.ppo import PPOConfig
from rlhf.stages import begin


@program
def main(argv: list[str] | None = None) -> None:
    config = parse(PPOConfig, argv)
    run = begin("ppo", config)

    from reward.compose import build_scorer, check_specs
    from rlhf import stages
    from rlhf.budget import Budget, count_parameters
    from rlhf.data.encode import encode_prompts
    from rlhf.distributed import read_deepspeed_config
    from rlhf.evaluate import sample_table, summarise
    from rlhf.models import stop_ids
    from rlhf.ppo import PPOTrainer
    from rlhf.roles import Roles

    check_specs(config.reward)
    foundation = stages.load_start(run)
    tokenizer, stops = foundation.tokenizer, stop_ids(foundation.tokenizer, foundation.model)
    prompts = encode_prompts(run.load(Prompt, "train"), tokenizer, config.max_prompt_length)
    if not prompts:
        raise UserError(f"{', '.join(config.data)}: no training prompts")
    run.say(f"{len(prompts)} training prompts, {config.total_steps} steps of {config.rollout_batch_size} responses")

    role = reward_role(config.reward, foundation)
    evaluate = stages.evaluation(run, foundation, None)
    roles = Roles(foundation, stages.new_lora(config), role, config.gradient_checkpointing)
    kinds = {"model": role_kind(roles, role, tokenizer.pad_token_id)} if role else None
    scorer = build_scorer(config.reward, tokenizer, kinds)
    if evaluate is not None:  # what only looks, and what is learnt from
        looking = [spec for spec in config.eval_scorers if spec not in config.reward]
        evaluate.scorer = build_scorer([*looking, *config.reward], tokenizer, kinds)
    trainer = PPOTrainer(
        config,
        roles,
        scorer,
        prompts,
        tokenizer,
        stops,
        run.world,
        Budget(count_parameters(roles.trunk)),
        read_deepspeed_config(config.deepspeed, run.world),
    )
    last: dict[str, float] = {}

    def look(step: int) -> None:
        if evaluate is not None:
            with trainer.learner.gathered():
                rows = evaluate.run(roles.trunk, lambda: roles.use("policy"), lambda: roles.use("reference"), run.world)
            last.update(summarise(rows))
            run.tracker.log(last, step)
            run.tracker.table("samples", sample_table(rows), step)

    def on_step(step: int, metrics: dict, rollout) -> None:
        if step % config.logging_steps == 0 or step == config.total_steps:
            run.tracker.log(metrics, step)
        keys = ("score/total", "kl/sequence", "response/length", "ppo/clip_fraction", "value/explained_variance")
        run.tracker.console(step, config.total_steps, metrics, keys)
        if step == config.total_steps or (config.eval_steps and step % config.eval_steps == 0):
            look(step)

    look(0)
    budget = trainer.train(on_step)

    with trainer.learner.gathered():
        if run.world.is_main:
            roles.save(config.output_dir, foundation)
    run.finish(last, budget)


def reward_role(specs: list[dict], foundation) -> str | None:
    """The folder of the first reward model among the scorers that is an adapter on this base, to become a role."""
    from rlhf.models import read_identity

    for spec in specs:
        path = spec.get("model")
        is_adapter = bool(path) and (Path(path) / "adapter_config.json").is_file()
        if is_adapter and read_identity(path).get("base_fingerprint") == foundation.fingerprint:
            return path
    return None


def role_kind(roles, role: str, pad_id: int):
    """How `build_scorer` makes a {model: ...}: the one that is a role reads ids on the shared base."""
    from reward.compose import model_scorer
    from rlhf.rollout import role_scorer

    def build(path, name, options, tokenizer):
        return role_scorer(roles, pad_id, name=name) if path == role else model_scorer(path, name, options, tokenizer)

    return build


if __name__ == "__main__":
    main()
