"""Supervised fine-tuning: imitate answers, and begin every later stage from the result.

deepspeed launch/sft.py --config configs/sft.yaml [--option value ...]
"""

import sys
from pathlib import Path

if not __package__:  # started as a file, from launch/, where reward.py would shadow the package `reward`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rlhf.config import parse
from rlhf.data.records import Instruction
from rlhf.options.offline import SFTRunConfig
from rlhf.program import program
from rlhf.runs.start import start_run


@program
def main(argv: list[str] | None = None) -> None:
    config = parse(SFTRunConfig, argv)
    run = start_run("sft", config)

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from reward.compose import build_scorer
    from rlhf import stages
    from rlhf.adapters import frozen_copy
    from rlhf.data.encode import sft_rows
    from rlhf.models import trainable_policy
    from rlhf.offline import trainers
    from rlhf.runs.budget import Budget

    initial = stages.load_initial_model(run)
    rows = {split: run.data.rows(Instruction, split, initial.tokenizer) for split in ("train", "validation")}
    train, held_out = sft_rows(rows["train"]), sft_rows(rows["validation"])
    run.log(f"{len(train)} training rows, {len(held_out)} held out")

    scorer = build_scorer(config.eval_scorers, initial.tokenizer) if config.eval_scorers else None
    evaluate = stages.evaluation(run, initial, scorer)
    model = trainable_policy(initial, stages.new_lora(run, initial))
    if initial.adapter_path:
        frozen_copy(model, "default", "reference")
    budget = Budget()
    budget.watch(model)
    ends = stages.ends_measured(run, initial, rows["validation"] or rows["train"])
    sampler = trainers.eval_callback(
        run, evaluate, trainers.no_context, trainers.reference_context(model), budget, ends
    )
    with trainers.refused_by_trl():
        trainer = SFTTrainer(
            model=model,
            args=trainers.trl_arguments(SFTConfig, run, bool(held_out)),
            train_dataset=Dataset.from_list(train),
            eval_dataset=Dataset.from_list(held_out) if held_out else None,
            processing_class=initial.tokenizer,
            callbacks=[sampler],
        )
    trainers.count_flops(trainer, budget)

    trainers.train(trainer, run, initial, budget, sampler)
    headline = trainers.held_out_loss(trainer, run) if held_out else {}

    trainers.save_policy(run, trainer.model, initial, merge=config.merge)
    run.finish({**headline, **sampler.last}, budget.total(run.world))


if __name__ == "__main__":
    main()
