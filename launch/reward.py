"""The reward model: learn from pairs which of two answers people prefer.

    deepspeed launch/reward.py --config configs/reward.yaml [--option value ...]

Starts from the SFT adapter with a fresh score head; ends with the last model or the best on the
held-out pairs, its report card on them, and scores shifted so that reference answers score 0 on
average.
"""

import itertools
import math
import sys
from pathlib import Path

if not __package__:
    # started as a file, from launch/, where reward.py would shadow the package `reward`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rlhf.config import parse
from rlhf.data.records import Instruction, Preference
from rlhf.data.split import first_by_hash
from rlhf.options.offline import RewardRunConfig
from rlhf.program import program
from rlhf.runs.start import start_run

# training pairs to normalise on where nothing is held out
NORMALISATION_PAIRS = 256


@program
def main(argv: list[str] | None = None) -> None:
    config = parse(RewardRunConfig, argv)
    run = start_run("reward", config)

    # these take seconds to import: not before the options are checked
    from datasets import Dataset
    from trl import RewardConfig

    from reward.length import add_offsets, fit_length
    from reward.model import normalisation, trainable_reward, write_reward
    from reward.report import report
    from reward.ties import TieParameter, tie_share
    from reward.trainer import PairCollator, RewardTrainer, pair_rows
    from rlhf import stages
    from rlhf.offline import trainers
    from rlhf.offline.best import load_best, require_held_out
    from rlhf.offline.callbacks import RunCallback
    from rlhf.runs.budget import Budget

    initial = stages.load_initial_model(run)
    tokenizer = initial.tokenizer
    train_pairs, held_out, answers = read_data(run, tokenizer)
    require_held_out(run, held_out)

    train_rows, held_out_rows = pair_rows(train_pairs), pair_rows(held_out)
    ties = None
    if config.ties == "davidson":
        ties = TieParameter(tie_share(train_rows), run.world.sum)
    if config.length_correction:
        slope = fit_length(train_rows, config.label_smoothing)
        run.log(f"by length alone, ten tokens more are worth {10 * slope:+.3f} logits")
        add_offsets([*train_rows, *held_out_rows], slope)

    lora = stages.new_lora(run, initial, "SEQ_CLS")
    model = trainable_reward(initial, lora, config.seed, config.lora_dropout)
    budget = Budget()
    budget.watch(model)
    callback = RunCallback(
        run, initial, budget, learnt=ties, patience=config.early_stopping_patience
    )
    with trainers.refused_by_trl(config.trl):
        trainer = RewardTrainer(
            model=model,
            args=trainers.trl_arguments(
                RewardConfig,
                run,
                has_held_out=bool(held_out),
                center_rewards_coefficient=config.center_rewards_coefficient,
            ),
            data_collator=PairCollator(tokenizer.pad_token_id),
            train_dataset=Dataset.from_list(train_rows),
            eval_dataset=Dataset.from_list(held_out_rows) if held_out else None,
            processing_class=tokenizer,
            callbacks=[callback],
            label_smoothing=config.label_smoothing,
            ties=ties,
        )
    trainers.train(trainer, callback, config.lora_dropout)
    saved_step = trainer.state.global_step
    if config.keeps_best:
        saved_step = load_best(trainer, callback.held_out, run, ties)

    pairs = held_out_rows or pair_rows(first_by_hash(train_pairs, NORMALISATION_PAIRS))
    chosen, rejected, references = score(run, trainer, pairs, answers)
    bias, scale = normalisation(references or chosen, config.normalise)

    trainers.save_policy(run, trainer.model, initial)
    headline = report(run, trainer, held_out, pairs, chosen, rejected) if held_out else {}
    if run.world.is_main:
        pairs_scored = "held-out" if held_out else "training"
        write_reward(
            config.output_dir,
            bias,
            scale,
            base_fingerprint=initial.fingerprint,
            normalise=config.normalise,
            temperature=headline.get("eval/reward/temperature"),
            mean_0_on="reference_data" if references else f"{pairs_scored} chosen responses",
        )
    callback.finish(
        headline,
        budget.total(run.world),
        normalisation={"bias": bias, "scale": scale},
        saved_step=saved_step,
        held_out_losses=callback.held_out.evaluations,
        tie_parameter=math.exp(ties.log_tie) if ties else None,
    )


def read_data(run, tokenizer) -> tuple[list[dict], list[dict], list[dict]]:
    """Return the encoded training pairs, held-out pairs and reference answers."""
    train_pairs = run.data.rows(Preference, "train", tokenizer)
    held_out = run.data.rows(Preference, "validation", tokenizer)
    answers = []
    source = run.config.reference_data
    if source:
        answers = run.data.rows(Instruction, "validation", tokenizer, source)
        if not answers:
            run.log(
                "WARNING: no row of reference_data is in validation: scores are normalised on the chosen answers"
            )
    run.log(f"{len(train_pairs)} training pairs, {len(held_out)} held out")
    return train_pairs, held_out, answers


def score(run, trainer, pairs: list[dict], answers: list[dict]) -> list[list[float]]:
    """Return the trained model's raw scores of the chosen, the rejected and the reference answers.

    Ends the run where one is not finite.
    """
    from reward.report import score_rows
    from rlhf.offline.callbacks import not_finite

    scores = score_rows(
        run,
        trainer,
        [pair["chosen_ids"] for pair in pairs],
        [pair["rejected_ids"] for pair in pairs],
        [answer["prompt_ids"] + answer["response_ids"] for answer in answers],
    )
    if not all(map(math.isfinite, itertools.chain.from_iterable(scores))):
        raise not_finite(
            run, trainer.state.global_step, "a score of the trained model is not finite"
        )
    return scores


if __name__ == "__main__":
    main()
