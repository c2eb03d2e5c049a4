"""Direct preference optimisation: learn from pairs without sampling (Rafailov et al. 2023).

    deepspeed launch/dpo.py --config configs/dpo.yaml [--option value ...]

The reference is where training starts. Loss and trainer are TRL's, but for soft labels and weights (rlhf/dpo.py); data,
evaluation and accounting are as in PPO.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not launch/, where reward.py would shadow the package

from dataclasses import dataclass

from rlhf.config import UserError, did_you_mean, option, parse, program
from rlhf.data.records import Preference
from rlhf.run import begin
from rlhf.stages import SamplingConfig, TrainerConfig

LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired")
LOSSES += ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")


@dataclass(kw_only=True)
class DPORunConfig(TrainerConfig, SamplingConfig):
    """DPO on preference pairs, from the SFT policy; the reference is a frozen copy of where it starts."""

    learning_rate: float = option(5e-6, "peak step size of AdamW", above=0, high=1)
    beta: float = option(0.1, "strength of the pull to the reference; smaller moves further", above=0)
    loss_type: list[str] = option(["sigmoid"], "TRL's losses by name: sigmoid, ipo, hinge, robust, apo_zero, ...")
    label_smoothing: float = option(
        0.0,
        "probability that a label is wrong, for pairs without a label_prob; sigmoid and robust, ... know it",
        low=0,
        below=0.5,
    )

    def validate(self) -> None:
        super().validate()
        wrong = [name for name in self.loss_type if name not in LOSSES]
        if wrong:
            raise UserError(
                f"loss_type '{wrong[0]}' is none of TRL's.{did_you_mean(wrong[0], LOSSES)} {', '.join(LOSSES)}"
            )
        known = {"robust", "exo_pair", "aot", "aot_unpaired"}
        if self.label_smoothing and self.loss_type != ["sigmoid"] and not set(self.loss_type) & known:
            raise UserError(
                f"'label_smoothing' has no effect on loss_type {', '.join(self.loss_type)} in TRL; sigmoid alone and "
                "robust know it"
            )


@program
def main(argv: list[str] | None = None) -> None:
    config = parse(DPORunConfig, argv)
    run = begin("dpo", config)

    from datasets import Dataset
    from trl import DPOConfig

    from reward.compose import build_scorer
    from rlhf import stages, trainers
    from rlhf.budget import Budget
    from rlhf.dpo import dpo_trainer, soft_rows
    from rlhf.models import frozen_copy, load_foundation, trainable_policy
    from rlhf.tracking import trainer_callback

    foundation = stages.load_start(run)
    pairs = {split: run.rows(Preference, split, foundation.tokenizer) for split in ("train", "validation")}
    rows = {split: soft_rows(part) for split, part in pairs.items()}
    datasets = {split: Dataset.from_list(part) for split, part in rows.items()}
    model = trainable_policy(foundation, stages.new_lora(run, foundation))
    if hasattr(model, "peft_config"):  # before the arguments, which tell PEFT of ZeRO-3
        frozen_copy(model, "default", "ref")
    arguments = trainers.trl_arguments(
        DPOConfig,
        run,
        bool(rows["validation"]),
        beta=config.beta,
        loss_type=config.loss_type,
        label_smoothing=config.label_smoothing,
    )
    cls, collator = dpo_trainer(arguments, rows["train"], foundation.tokenizer.pad_token_id, run.say)
    if any(row["record"].margin is not None for row in pairs["train"]):
        run.say("the pairs carry a margin, which the reward model reads and DPO does not")
    run.say(f"{len(rows['train'])} training pairs, {len(rows['validation'])} held out")

    scorer = build_scorer(config.eval_scorers, foundation.tokenizer) if config.eval_scorers else None
    evaluate = stages.evaluation(run, foundation, scorer)
    reference = None
    if not hasattr(model, "peft_config"):  # TRL would reload it by name, which need not be what is in memory
        reference = load_foundation(config.model_name_or_path, run.torch_dtype, config.attn_implementation).model
    budget = Budget()
    budget.watch(model)
    if reference is not None:
        budget.watch(reference)
    sampler = trainers.sampling_callback(
        run, evaluate, trainers.no_context, reference or trainers.reference_context(model, "ref"), budget
    )
    # with `precompute_ref_log_probs` the reference is read here
    with trainers.refused_by_trl(), budget.counting():
        trainer = cls(
            model=model,
            ref_model=reference,
            args=arguments,
            data_collator=collator,
            train_dataset=datasets["train"],
            eval_dataset=datasets["validation"] if rows["validation"] else None,
            processing_class=foundation.tokenizer,
            callbacks=[sampler],
        )
    trainer.add_callback(trainer_callback(run.tracker, "dpo"))
    trainers.attach(trainer, budget, stages.new_dropout(config, foundation))

    trainers.train(trainer, run, foundation, budget, sampler)
    headline = trainers.held_out_loss(trainer, run) if rows["validation"] else {}

    trainers.save_policy(run, trainer.model, foundation)
    run.finish({**headline, **sampler.last}, stages.total_budget(budget, run.world))


if __name__ == "__main__":
    main()
