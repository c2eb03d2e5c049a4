"""Direct preference optimisation: learn from pairs without sampling (Rafailov et al. 2023).

    deepspeed launch/dpo.py --config configs/dpo.yaml [--option value ...]

The reference is where training starts. Loss and trainer are TRL's; data, evaluation and accounting are as in PPO.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not launch/, where reward.py would shadow the package

from dataclasses import dataclass

from rlhf.config import UserError, did_you_mean, option, parse, program
from rlhf.data.records import Preference, Prompt
from rlhf.stages import SamplingConfig, TrainerConfig, begin

LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired")
LOSSES += ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")


@dataclass(kw_only=True)
class DPORunConfig(TrainerConfig, SamplingConfig):
    """DPO on preference pairs, from the SFT policy; the reference is a frozen copy of where it starts."""

    learning_rate: float = option(5e-6, "peak step size of AdamW")
    beta: float = option(0.1, "strength of the pull to the reference; smaller moves further")
    loss_type: list[str] = option(["sigmoid"], "TRL's losses by name: sigmoid, ipo, hinge, robust, apo_zero, ...")
    label_smoothing: float = option(0.0, "probability that a label is wrong, for the losses that know it (robust, ...)")

    def validate(self) -> None:
        super().validate()
        if self.beta <= 0:
            raise UserError(f"'beta' is {self.beta}, expected more than 0")
        wrong = [name for name in self.loss_type if name not in LOSSES]
        if wrong:
            raise UserError(
                f"loss_type '{wrong[0]}' is none of TRL's.{did_you_mean(wrong[0], LOSSES)} {', '.join(LOSSES)}"
            )
        if self.label_smoothing and not set(self.loss_type) & {"robust", "exo_pair", "aot", "aot_unpaired"}:
            raise UserError(
                f"'label_smoothing' has no effect on loss_type {', '.join(self.loss_type)} in TRL; robust knows it"
            )


@program
def main(argv: list[str] | None = None) -> None:
    config = parse(DPORunConfig, argv)
    run = begin("dpo", config)

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from reward.compose import build_scorer
    from rlhf import stages, trainers
    from rlhf.budget import Budget, count_parameters
    from rlhf.data.encode import encode_preferences
    from rlhf.models import load_foundation, trainable_policy
    from rlhf.tracking import trainer_callback

    class Trainer(DPOTrainer):
        """TRL's, on rows that already are ids, encoded as for every other stage."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    foundation = stages.load_start(run)
    limits = (config.max_prompt_length, config.max_response_length)
    pairs = {split: run.load(Preference, split) for split in ("train", "validation")}
    rows = {split: encode_preferences(records, foundation.tokenizer, *limits) for split, records in pairs.items()}
    datasets = {
        split: Dataset.from_list([{k: v for k, v in row.items() if k != "record"} for row in part])
        for split, part in rows.items()
    }
    if not rows["train"]:
        raise UserError(f"{', '.join(config.data)}: no training pairs")
    unread = [name for name in ("margin", "label_prob") if any(getattr(r, name) is not None for r in pairs["train"])]
    unread += ["weight"] if any(r.weight != 1.0 for r in pairs["train"]) else []
    if unread:
        run.say(f"the pairs carry {', '.join(unread)}, which the reward model reads and DPO does not")
    run.say(f"{len(rows['train'])} training pairs, {len(rows['validation'])} held out")

    scorer = build_scorer(config.eval_scorers, foundation.tokenizer) if config.eval_scorers else None
    prompts = None if config.eval_data else run.load(Prompt, "validation")
    evaluate = stages.evaluation(run, foundation, scorer, prompts)
    model = trainable_policy(foundation, stages.new_lora(config))
    reference = None
    if not hasattr(model, "peft_config"):  # TRL would reload it by name, which need not be what is in memory
        reference = load_foundation(config.model_name_or_path, run.torch_dtype, config.attn_implementation).model
    budget = Budget(count_parameters(model), frozen_base=config.use_peft)
    sampler = trainers.sampling_callback(
        run, evaluate, trainers.no_context, reference or trainers.reference_context(model, "ref"), budget
    )
    trainer = Trainer(
        model=model,
        ref_model=reference,
        args=trainers.trl_arguments(
            DPOConfig,
            run,
            bool(rows["validation"]),
            beta=config.beta,
            loss_type=config.loss_type,
            label_smoothing=config.label_smoothing,
        ),
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"] if rows["validation"] else None,
        processing_class=foundation.tokenizer,
        callbacks=[sampler, trainer_callback(run.tracker, "dpo")],
    )
    trainers.attach(trainer, budget, reference)

    trainer.train()
    headline = trainers.held_out_loss(trainer, run) if rows["validation"] else {}

    trainers.save_policy(run, trainer.model, foundation)
    run.finish({**headline, **sampler.last}, stages.total_budget(budget, run.world))


if __name__ == "__main__":
    main()
