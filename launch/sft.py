"""Supervised fine-tuning: imitate answers, and begin every later stage from the result.

deepspeed launch/sft.py --config configs/sft.yaml [--option value ...]
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not launch/, where reward.py would shadow the package

from dataclasses import dataclass

from rlhf.config import UserError, option, parse, program
from rlhf.data.records import Instruction
from rlhf.run import begin
from rlhf.stages import SamplingConfig, TrainerConfig


@dataclass(kw_only=True)
class SFTRunConfig(TrainerConfig, SamplingConfig):
    """Supervised fine-tuning on instructions; the loss is on the response and its EOS."""

    learning_rate: float = option(2e-4, "peak step size of AdamW", above=0, high=1)
    merge: bool = option(False, "save whole weights with the adapter merged in, instead of the adapter")

    def validate(self) -> None:
        super().validate()
        if self.merge and not self.use_peft:
            raise UserError("'merge' is true but 'use_peft' is false: there is no adapter to merge")


@program
def main(argv: list[str] | None = None) -> None:
    config = parse(SFTRunConfig, argv)
    run = begin("sft", config)

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from reward.compose import build_scorer
    from rlhf import stages, trainers
    from rlhf.budget import Budget
    from rlhf.data.encode import sft_rows
    from rlhf.models import frozen_copy, trainable_policy
    from rlhf.tracking import trainer_callback

    foundation = stages.load_start(run)
    rows = {split: run.rows(Instruction, split, foundation.tokenizer) for split in ("train", "validation")}
    train, held_out = sft_rows(rows["train"]), sft_rows(rows["validation"])
    run.say(f"{len(train)} training rows, {len(held_out)} held out")

    scorer = build_scorer(config.eval_scorers, foundation.tokenizer) if config.eval_scorers else None
    evaluate = stages.evaluation(run, foundation, scorer)
    model = trainable_policy(foundation, stages.new_lora(run, foundation))
    if foundation.adapter_path:
        frozen_copy(model, "default", "reference")
    budget = Budget()
    budget.watch(model)
    ends = stages.ends_measured(run, foundation, rows["validation"] or rows["train"])
    sampler = trainers.sampling_callback(
        run, evaluate, trainers.no_context, trainers.reference_context(model), budget, ends
    )
    with trainers.refused_by_trl():
        trainer = SFTTrainer(
            model=model,
            args=trainers.trl_arguments(SFTConfig, run, bool(held_out)),
            train_dataset=Dataset.from_list(train),
            eval_dataset=Dataset.from_list(held_out) if held_out else None,
            processing_class=foundation.tokenizer,
            callbacks=[sampler],
        )
    trainer.add_callback(trainer_callback(run.tracker, "sft"))
    trainers.attach(trainer, budget)

    trainers.train(trainer, run, foundation, budget, sampler)
    headline = trainers.held_out_loss(trainer, run) if held_out else {}

    trainers.save_policy(run, trainer.model, foundation, merge=config.merge)
    run.finish({**headline, **sampler.last}, stages.total_budget(budget, run.world))


if __name__ == "__main__":
    main()
