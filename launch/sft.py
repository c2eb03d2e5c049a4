"""Supervised fine-tuning: imitate answers; later stages start from the result.

deepspeed launch/sft.py --config configs/sft.yaml [--option value ...]
"""

import sys
from pathlib import Path

if not __package__:
    # started as a file, from launch/, where reward.py would shadow the package `reward`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rlhf.config import parse
from rlhf.data.records import Instruction
from rlhf.options.offline import SFTRunConfig
from rlhf.program import program
from rlhf.runs.start import start_run


@program
def main(argv: list[str] | None = None) -> None:
    config = parse(SFTRunConfig, argv)
    if config.eval_scorers:
        from reward.compose import check_scorers

        check_scorers(config.eval_scorers, where="eval_scorers", without_torch=True)
    run = start_run("sft", config)

    # these take seconds to import: not before the options are checked
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from reward.compose import build_scorer
    from rlhf import stages
    from rlhf.data.turns import turn_rows
    from rlhf.model.adapters import frozen_copy
    from rlhf.model.loading import trainable_policy
    from rlhf.offline import trainers
    from rlhf.offline.callbacks import RunCallback
    from rlhf.offline.learnt import report_learnt
    from rlhf.runs.budget import Budget

    initial = stages.load_initial_model(run)
    train_rows = run.data.rows(Instruction, "train", initial.tokenizer)
    held_out_rows = run.data.rows(Instruction, "validation", initial.tokenizer)
    run.log(f"{len(train_rows)} training rows, {len(held_out_rows)} held out")
    limits = (config.max_prompt_length, config.max_response_length)
    train_turns = turn_rows(train_rows, initial.tokenizer, *limits, config.train_on)
    held_out_turns = turn_rows(held_out_rows, initial.tokenizer, *limits, config.train_on)

    scorer = build_scorer(config.eval_scorers, initial.tokenizer) if config.eval_scorers else None
    evaluation = stages.evaluation(run, initial, scorer)
    model = trainable_policy(initial, stages.new_lora(run, initial, answers=train_rows))
    if initial.adapter_path:
        # the evaluation measures the KL to where training starts
        frozen_copy(model, "default", "reference")
    budget = Budget()
    budget.watch(model)
    callback = RunCallback(
        run,
        initial,
        budget,
        evaluation,
        reference=trainers.reference_context(model, "reference"),
        measure=stages.eos_measurement(run, initial, held_out_rows or train_rows),
    )
    with trainers.refused_by_trl(config.trl):
        trainer = SFTTrainer(
            model=model,
            args=trainers.trl_arguments(SFTConfig, run, has_held_out=bool(held_out_rows)),
            train_dataset=Dataset.from_list(train_turns.rows),
            eval_dataset=Dataset.from_list(held_out_turns.rows) if held_out_rows else None,
            processing_class=initial.tokenizer,
            callbacks=[callback],
        )
    learnt = report_learnt(run, train_turns, trainer.train_dataset, trainer.args)
    trainers.train(trainer, callback)
    held_out = trainers.held_out_loss(trainer, run) if held_out_rows else {}

    trainers.save_policy(run, trainer.model, initial, merge=config.merge)
    callback.finish(held_out | callback.metrics, budget.total(run.world), learnt=learnt)


if __name__ == "__main__":
    main()
