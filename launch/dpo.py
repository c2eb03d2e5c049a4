"""Direct preference optimisation: learn from pairs without sampling (Rafailov et al. 2023).

    deepspeed launch/dpo.py --config configs/dpo.yaml [--option value ...]

The reference is where training starts. Loss and trainer are TRL's, except for soft labels and
weights (rlhf/offline/soft_dpo.py); data, evaluation and accounting are as in PPO.
"""

import sys
from pathlib import Path

if not __package__:
    # started as a file, from launch/, where reward.py would shadow the package `reward`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rlhf.config import parse
from rlhf.data.records import Preference
from rlhf.options.offline import DPORunConfig
from rlhf.program import program
from rlhf.runs.start import start_run


@program
def main(argv: list[str] | None = None) -> None:
    config = parse(DPORunConfig, argv)
    if config.eval_scorers:
        from reward.compose import check_scorers

        check_scorers(config.eval_scorers, where="eval_scorers", without_torch=True)
    run = start_run("dpo", config)

    # these take seconds to import: not before the options are checked
    from datasets import Dataset
    from trl import DPOConfig

    from reward.compose import build_scorer
    from rlhf import stages
    from rlhf.model.loading import trainable_policy
    from rlhf.offline import trainers
    from rlhf.offline.callbacks import RunCallback
    from rlhf.offline.reference_cache import REFERENCE, ReferencePass, open_reference_cache
    from rlhf.offline.soft_dpo import dpo_trainer, soft_rows
    from rlhf.runs.budget import Budget

    initial = stages.load_initial_model(run)
    train_pairs = run.data.rows(Preference, "train", initial.tokenizer)
    held_out_pairs = run.data.rows(Preference, "validation", initial.tokenizer)
    run.log(f"{len(train_pairs)} training pairs, {len(held_out_pairs)} held out")
    if any(row["record"].margin is not None for row in train_pairs):
        run.log("the pairs carry a margin, which the reward model reads and DPO does not")

    chosen = [{**row, "response_ids": row["chosen_ids"]} for row in train_pairs]
    model = trainable_policy(initial, stages.new_lora(run, initial, answers=chosen))
    budget = Budget()
    reference = add_reference(run, model)
    if reference is not None:
        budget.watch(reference)
    budget.watch(model)

    arguments = trainers.trl_arguments(
        DPOConfig,
        run,
        has_held_out=bool(held_out_pairs),
        beta=config.beta,
        loss_type=config.loss_type,
        label_smoothing=config.label_smoothing,
    )
    train_rows = soft_rows(train_pairs)
    trainer_class, collator = dpo_trainer(
        arguments, train_rows, initial.tokenizer.pad_token_id, run.log
    )
    scorer = build_scorer(config.eval_scorers, initial.tokenizer) if config.eval_scorers else None
    callback = RunCallback(
        run,
        initial,
        budget,
        stages.evaluation(run, initial, scorer),
        reference=reference or trainers.reference_context(model, REFERENCE),
    )
    # before the trainer: DeepSpeed may divide the weights among the ranks
    reference_cache = open_reference_cache(run, arguments, reference or model, budget)
    # with TRL's `precompute_ref_log_probs` the reference is read here
    with trainers.refused_by_trl(config.trl), budget.counting():
        trainer = trainer_class(
            model=model,
            ref_model=reference,
            reference_cache=reference_cache,
            args=arguments,
            data_collator=collator,
            train_dataset=Dataset.from_list(train_rows),
            eval_dataset=Dataset.from_list(soft_rows(held_out_pairs)) if held_out_pairs else None,
            processing_class=initial.tokenizer,
            callbacks=[callback],
        )
    reference_pass = ReferencePass(trainer, run.log)
    trainer.add_callback(reference_pass)
    trainers.train(trainer, callback, stages.new_dropout(config, initial))
    held_out = trainers.held_out_loss(trainer, run) if held_out_pairs else {}

    trainers.save_policy(run, trainer.model, initial)
    callback.finish(
        held_out | callback.metrics,
        budget.total(run.world),
        reference_pass=reference_pass.sizes(),
    )


def add_reference(run, model):
    """Put the reference on the model as a frozen adapter, or return it as a second model where whole
    weights learn.
    """
    from rlhf import stages
    from rlhf.model.adapters import frozen_copy
    from rlhf.model.loading import load_model
    from rlhf.offline.reference_cache import REFERENCE

    config = run.config
    if hasattr(model, "peft_config"):
        # before TRL's arguments are made, which tell PEFT about ZeRO-3
        frozen_copy(model, "default", REFERENCE)
        return None
    # TRL would load it by name, which need not be what is in memory
    zero = stages.zero_settings(config, run.world)
    return load_model(
        config.model_name_or_path, run.torch_dtype, config.attn_implementation, zero=zero
    ).model


if __name__ == "__main__":
    main()
