"""Direct preference optimisation: learn from pairs without sampling (Rafailov et al. 2023).

    deepspeed launch/dpo.py --config configs/dpo.yaml [--option value ...]

The reference is where training starts. Loss and trainer are TRL's, but for soft labels and weights
(rlhf/offline/soft_dpo.py); data, evaluation and accounting are as in PPO.
"""

import sys
from pathlib import Path

if not __package__:  # started as a file, from launch/, where reward.py would shadow the package `reward`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rlhf.config import parse
from rlhf.data.records import Preference
from rlhf.options.offline import DPORunConfig
from rlhf.program import program
from rlhf.runs.start import start_run


@program
def main(argv: list[str] | None = None) -> None:
    config = parse(DPORunConfig, argv)
    run = start_run("dpo", config)

    from datasets import Dataset
    from trl import DPOConfig

    from reward.compose import build_scorer
    from rlhf import stages
    from rlhf.adapters import frozen_copy
    from rlhf.models import load_model, trainable_policy
    from rlhf.offline import trainers
    from rlhf.offline.soft_dpo import dpo_trainer, soft_rows
    from rlhf.runs.budget import Budget

    initial = stages.load_initial_model(run)
    pairs = {split: run.data.rows(Preference, split, initial.tokenizer) for split in ("train", "validation")}
    rows = {split: soft_rows(part) for split, part in pairs.items()}
    datasets = {split: Dataset.from_list(part) for split, part in rows.items()}
    model = trainable_policy(initial, stages.new_lora(run, initial))
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
    cls, collator = dpo_trainer(arguments, rows["train"], initial.tokenizer.pad_token_id, run.log)
    if any(row["record"].margin is not None for row in pairs["train"]):
        run.log("the pairs carry a margin, which the reward model reads and DPO does not")
    run.log(f"{len(rows['train'])} training pairs, {len(rows['validation'])} held out")

    scorer = build_scorer(config.eval_scorers, initial.tokenizer) if config.eval_scorers else None
    evaluate = stages.evaluation(run, initial, scorer)
    reference = None
    if not hasattr(model, "peft_config"):  # TRL would reload it by name, which need not be what is in memory
        reference = load_model(config.model_name_or_path, run.torch_dtype, config.attn_implementation).model
    budget = Budget()
    budget.watch(model)
    if reference is not None:
        budget.watch(reference)
    sampler = trainers.eval_callback(
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
            processing_class=initial.tokenizer,
            callbacks=[sampler],
        )
    trainers.count_flops(trainer, budget, stages.new_dropout(config, initial))

    trainers.train(trainer, run, initial, budget, sampler)
    headline = trainers.held_out_loss(trainer, run) if rows["validation"] else {}

    trainers.save_policy(run, trainer.model, initial)
    run.finish({**headline, **sampler.last}, budget.total(run.world))


if __name__ == "__main__":
    main()
