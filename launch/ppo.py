"""Proximal policy optimisation against a reward model, or any other scorer (Schulman et al. 2017).

    deepspeed launch/ppo.py --config configs/ppo.yaml [--option value ...]

The trainer is rlhf/ppo/trainer.py. The first reward model of `reward` that is an adapter on the policy's base becomes
a role on it; every other scorer is a model or function of its own.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

if not __package__:  # started as a file, from launch/, where reward.py would shadow the package `reward`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rlhf.config import parse
from rlhf.data.records import BadScore, Instruction, Prompt
from rlhf.errors import EXIT_GUARD, Halt, UserError
from rlhf.options.ppo import PPOConfig
from rlhf.program import program
from rlhf.runs.run import format_metrics
from rlhf.runs.start import start_run


@program
def main(argv: list[str] | None = None) -> None:
    config = parse(PPOConfig, argv)
    from reward.card import doubts_of
    from reward.compose import build_scorer
    from reward.specs import ModelSpec, monitored, parse_specs

    weights = [(spec.name, spec.weight) for spec in parse_specs(config.reward)]
    run = start_run("ppo", config)

    from rlhf import stages
    from rlhf.data.encode import sft_rows
    from rlhf.deepspeed_config import read_deepspeed_config
    from rlhf.evaluate import sample_table, summarise
    from rlhf.files import files_fingerprint, scorer_files
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.roles import Roles
    from rlhf.runs.budget import Budget
    from rlhf.tokenizer import stop_ids

    initial = stages.load_initial_model(run)
    tokenizer, stops = initial.tokenizer, stop_ids(initial.tokenizer, initial.model)
    prompts = run.data.rows(Prompt, "train", tokenizer)
    answers = sft_rows(run.data.rows(Instruction, "train", tokenizer, config.ptx_data)) if config.ptx_data else []
    run.log(f"{len(prompts)} training prompts, {config.total_steps} steps of {config.rollout_batch_size} responses")

    for spec in config.reward:
        run.record_dependency(f"reward {json.dumps(spec)}", files_fingerprint(scorer_files(spec)))
        for folder in [spec["model"]] if "model" in spec else spec.get("ensemble", []):
            for doubt in doubts_of(folder):
                run.log(f"WARNING: {folder}: {doubt}")
    role = reward_role(config.reward, initial)
    critic, critic_weight, left_out = critic_start(config, role)
    if left_out:
        run.log(f"the critic starts as {role} times {critic_weight:g}; it has yet to learn {', '.join(left_out)}")
    evaluate = stages.evaluation(run, initial, None)
    roles = Roles(
        initial,
        stages.new_lora(run, initial),
        role,
        config.gradient_checkpointing,
        critic=critic,
        moving_reference=config.reference_ema is not None,
        reward_weight=critic_weight,
    )
    budget = Budget()
    builders = {ModelSpec: model_builder(roles, role, tokenizer.pad_token_id, budget)}
    scorer = build_scorer(config.reward, tokenizer, builders)
    if evaluate is not None:  # what only looks, and what is learnt from
        looking = [spec for spec in config.eval_scorers if spec not in config.reward]
        evaluate.scorer = build_scorer([*looking, *config.reward], tokenizer, builders)
    trainer = PPOTrainer(
        config,
        roles,
        scorer,
        prompts,
        tokenizer,
        stops,
        run.world,
        budget,
        read_deepspeed_config(config.deepspeed, run.world, config),
        ptx=answers,
        monitored=monitored(config.reward),
    )
    last: dict[str, float] = {}

    def look(step: int) -> bool:
        if evaluate is None:
            return False
        try:
            with trainer.learner.gathered():
                rows = evaluate.run(roles.trunk, lambda: roles.use("policy"), lambda: roles.use("reference"), run.world)
        except BadScore as error:
            run.log(f"the evaluation at step {step} is left out: {error}")
            return False
        last.clear()
        last.update(summarise(rows))
        last["eval/score/total"] = sum(weight * last[f"eval/score/{name}"] for name, weight in weights if weight)
        run.tracker.log(last, step)
        run.tracker.table("samples", sample_table(rows), step)
        run.log(f"step {step}: {format_metrics(last)}")
        return True

    def write_files(folder: Path) -> None:
        trainer.save(folder)
        with trainer.learner.gathered():
            if run.world.is_main:  # the adapters too, so that a checkpoint can be sampled from and compared
                roles.save(folder, initial)

    def on_step(step: int, metrics: dict, rollout) -> None:
        end, news = step == config.total_steps, trainer.guards.drain_events()
        if step % config.logging_steps == 0 or end or rollout is None or trainer.pending_decision:
            run.tracker.log(metrics, step)
        for decision in news:
            run.log(f"guard {decision.guard} at step {step}: {decision.action}: {decision.reason}")
        run.tracker.table("guards", [asdict(decision) for decision in news], step)
        keys = ("score/total", "kl/sequence", "response/length", "ppo/clip_fraction", "value/explained_variance")
        run.tracker.console(step, config.total_steps, metrics, keys)
        if trainer.pending_decision:  # no checkpoint: a run that is killed and resumed must come to this decision again
            return
        stop = run.interrupted()
        looked = (end or bool(config.eval_steps and step % config.eval_steps == 0)) and look(step)
        if stop or run.should_checkpoint(step, config.total_steps):
            score = last.get("eval/score/total") if looked else None
            run.save_checkpoint(step, write_files, score, {"last": last})
        if stop:
            raise run.interrupted_error(step)

    def roll_back(decision) -> bool:
        kept = run.roll_back(decision.since)
        if kept is None:
            run.log(f"there is no checkpoint from before step {decision.since} to go back to")
            return False
        trainer.load(kept.folder, after=decision)
        last.clear()
        last.update(kept.metadata["state"]["last"])
        # at once, so that a run that is killed now knows of this rollback when it is resumed
        run.save_checkpoint(kept.step, write_files, kept.metadata["score"], {"last": last})
        run.log(f"back to {kept.folder}, with step sizes times {trainer.guards.rate_scale:g}")
        return True

    # takes over the folder; from here on a signal ends the run after its step
    run.open_tracker()
    if run.resumed:
        trainer.load(run.resumed.folder)
        run.restore_random_state()
        last.update(run.resumed.metadata["state"]["last"])
    else:
        look(0)
    stopped = trainer.train(on_step, roll_back)
    if stopped:
        look(trainer.done)

    spent = budget.total(run.world)
    if not spent["budget/tokens_trained"]:
        run.close()
        why = stopped.reason if stopped else f"every rollout was skipped, see {config.output_dir}/tables"
        raise Halt(f"ppo: nothing was learnt: {why}", EXIT_GUARD)
    with trainer.learner.gathered():
        if run.world.is_main:
            roles.save(config.output_dir, initial)
    more = {"guards": trainer.guards.events, "steps": trainer.done}
    run.finish(last, spent, **more | ({"stopped": stopped.reason} if stopped else {}))
    if stopped:
        raise Halt(f"ppo: stopped by guard {stopped.guard} at step {stopped.step}: {stopped.reason}", EXIT_GUARD)


def reward_role(specs: list[dict], initial) -> str | None:
    """The folder of the first reward model among the scorers that is an adapter on this base, to become a role; one
    that is only watched comes after those that are learnt from."""
    from rlhf.weights import read_identity

    for spec in sorted(specs, key=lambda spec: not spec.get("weight", 1.0)):
        path = spec.get("model")
        is_adapter = bool(path) and (Path(path) / "adapter_config.json").is_file()
        if is_adapter and read_identity(path).get("base_fingerprint") == initial.fingerprint:
            return path
    return None


def critic_start(config: PPOConfig, role: str | None) -> tuple[str | None, float, list[str]]:
    """What the critic starts from, the weight of the reward role in the total score, and what of that it leaves out.

    Raises UserError where the reward model that it is to start from counts for nothing.
    """
    from reward.specs import ModelSpec, parse_specs

    if not config.has_critic:
        return None, 1.0, []
    scorers = parse_specs(config.reward)
    of_role = [spec for spec in scorers if isinstance(spec, ModelSpec) and spec.model == role]
    weight = sum(spec.weight for spec in of_role)
    start = config.critic_from
    if start == "auto":
        start = "reward" if weight else "policy"
    if start != "reward" or role is None:
        return start, 1.0, []
    if not weight:
        raise UserError(
            f"critic_from is reward, but {role} is only watched (weight 0), and it is the other scores that the critic "
            "has to predict. Take --critic_from policy"
        )
    others = [spec for spec in scorers if spec.weight and spec not in of_role]
    left_out = [f"{spec.name} (weight {spec.weight:g})" for spec in others]
    left_out += ["the normalisation of scores"] if config.normalize_scores else []
    return start, weight, left_out


def model_builder(roles, role: str | None, pad_id: int, budget):
    """Return how `build_scorer` builds a reward model: the one that is a role reads ids on the shared base.

    `budget` counts the passes of the others too.
    """
    from reward.compose import build_model
    from rlhf.ppo.rollout import role_scorer

    def build(spec, tokenizer):
        if spec.model != role:
            scorer = build_model(spec, tokenizer)
            budget.watch(scorer.model)
            return scorer
        return role_scorer(roles, pad_id, spec.batch_size, spec.name)

    return build


if __name__ == "__main__":
    main()
