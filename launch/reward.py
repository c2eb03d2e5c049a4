"""The reward model: learn from pairs which of two answers people prefer.

    deepspeed launch/reward.py --config configs/reward.yaml [--option value ...]

Starts from the SFT adapter with a fresh score head; ends with a report card on the held-out pairs and scores shifted
so that reference answers score 0 on average.
"""

import math
import sys
from pathlib import Path

if not __package__:  # started as a file, from launch/, where reward.py would shadow the package `reward`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rlhf.config import parse
from rlhf.data.records import Instruction, Preference
from rlhf.data.split import first_by_hash
from rlhf.options.offline import RewardRunConfig
from rlhf.program import program
from rlhf.runs.start import start_run

FEW = 256  # training pairs to normalise on where nothing is held out


@program
def main(argv: list[str] | None = None) -> None:
    config = parse(RewardRunConfig, argv)
    run = start_run("reward", config)

    from datasets import Dataset
    from trl import RewardConfig

    from reward.model import normalisation, trainable_reward, write_reward
    from reward.trainer import PairCollator, RewardTrainer, pair_rows
    from rlhf import stages
    from rlhf.offline import trainers
    from rlhf.runs.budget import Budget

    initial = stages.load_initial_model(run)
    tokenizer = initial.tokenizer
    train, held_out = (run.data.rows(Preference, split, tokenizer) for split in ("train", "validation"))
    answers = (
        run.data.rows(Instruction, "validation", tokenizer, config.reference_data) if config.reference_data else []
    )
    if config.reference_data and not answers:
        run.log("WARNING: no row of reference_data is left in validation: scores are normalised on the chosen answers")
    answers = [row["prompt_ids"] + row["response_ids"] for row in answers]
    run.log(f"{len(train)} training pairs, {len(held_out)} held out")

    model = trainable_reward(initial, stages.new_lora(run, initial, "SEQ_CLS"), config.seed)
    budget = Budget()
    budget.watch(model)
    sampler = trainers.eval_callback(run, None, None, None, budget)
    with trainers.refused_by_trl():
        trainer = RewardTrainer(
            model=model,
            args=trainers.trl_arguments(
                RewardConfig, run, bool(held_out), center_rewards_coefficient=config.center_rewards_coefficient
            ),
            data_collator=PairCollator(tokenizer.pad_token_id),
            train_dataset=Dataset.from_list(pair_rows(train)),
            eval_dataset=Dataset.from_list(pair_rows(held_out)) if held_out else None,
            processing_class=tokenizer,
            callbacks=[sampler],
            label_smoothing=config.label_smoothing,
        )
    trainers.count_flops(trainer, budget, stages.new_dropout(config, initial))

    trainers.train(trainer, run, initial, budget, sampler)

    chosen, rejected, references = score(run, trainer, pair_rows(held_out or first_by_hash(train, FEW)), answers)
    if not all(math.isfinite(value) for part in (chosen, rejected, references) for value in part):
        raise trainers.not_finite(run, trainer.state.global_step, "a score of the trained model is not finite")
    bias, scale = normalisation(references or chosen, config.normalise)
    trainers.save_policy(run, trainer.model, initial)
    headline = report(run, held_out, chosen, rejected, trainer.state.global_step) if held_out else {}
    if run.world.is_main:
        of = "reference_data" if references else f"{'held-out' if held_out else 'training'} chosen responses"
        facts = {"base_fingerprint": initial.fingerprint, "normalise": config.normalise, "mean_0_on": of}
        write_reward(config.output_dir, bias, scale, **facts)
    run.finish(headline, budget.total(run.world), normalisation={"bias": bias, "scale": scale})


def score(run, trainer, pairs: list[dict], answers: list[list[int]]) -> list[list[float]]:
    """Raw scores of the chosen, the rejected and the reference rows; each rank scores its share and gets all."""
    from reward.model import raw_scores
    from rlhf.deepspeed_backend import gathered

    rows = [p["chosen_ids"] for p in pairs] + [p["rejected_ids"] for p in pairs] + answers
    mine = [rows[i] for i in run.world.shard(len(rows))]
    with gathered(trainer.model):
        size, pad_id = 2 * run.config.per_device_train_batch_size, trainer.processing_class.pad_token_id
        scores = run.world.gather(raw_scores(trainer.model, mine, pad_id, size))
    n = len(pairs)
    return [scores[:n], scores[n : 2 * n], scores[2 * n :]]


def report(run, held_out: list[dict], chosen: list[float], rejected: list[float], step: int) -> dict[str, float]:
    """Write the report card, log its numbers, and return the headline."""
    import torch

    from reward.card import doubts, report_card, write_card
    from reward.objective import reward_loss
    from reward.trainer import EXTRAS, pair_rows

    lengths = [[len(row[side]) for row in held_out] for side in ("chosen_ids", "rejected_ids")]
    name = Path(run.config.output_dir).name
    card = report_card([row["record"] for row in held_out], chosen, rejected, *lengths, title=name)
    card["rows"] = run.data.row_counts
    rows = pair_rows(held_out)
    extras = {name: torch.tensor([row[name] for row in rows]) for name in EXTRAS if name in rows[0]}
    loss, metrics = reward_loss(
        torch.tensor(chosen),
        torch.tensor(rejected),
        **extras,
        label_smoothing=run.config.label_smoothing,
        center_coefficient=run.config.center_rewards_coefficient,
    )
    logged = {"eval/loss/total": loss.item()}
    logged |= {f"eval/reward/{k}": v.item() for k, v in metrics.items() if k != "reward"}
    logged["eval/reward/mean"] = metrics["reward"].item()
    run.tracker.log(logged, step)
    if run.world.is_main:
        run.log(f"report card: {write_card(card, run.config.output_dir)}")
        for doubt in doubts(card):
            run.log(f"WARNING: {doubt}")
    accuracy, calibration = card["accuracy"], card["calibration"]
    headline = {f"eval/reward/accuracy_{end}": accuracy[end] for end in ("low", "high") if accuracy[end] is not None}
    headline |= {"eval/reward/groups": accuracy["n"], "eval/reward/ece": calibration["ece"]}
    headline |= {f"eval/reward/{name}": calibration[name] for name in ("ece_expected", "brier")}
    return {**logged, **headline, "eval/reward/length_baseline": card["length"]["baseline"]["accuracy"]}


if __name__ == "__main__":
    main()
