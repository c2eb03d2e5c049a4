"""What the programs share: where they start from, how they evaluate and what they have cost."""

from __future__ import annotations

from rlhf.config import UserError
from rlhf.data.records import Prompt, Scorer
from rlhf.data.split import first_by_hash
from rlhf.options.shared import AdapterConfig, RunConfig

NEVER_TRAINED = 10  # rows of an output head this close to that of a token; one that was trained has none or a few


def load_initial_model(run):
    """The foundation that this run starts from. Raises UserError where it and the options do not fit."""
    from rlhf.files import files_fingerprint, model_files
    from rlhf.models import load_model

    config = run.config
    initial = load_model(config.model_name_or_path, run.torch_dtype, config.attn_implementation)
    check_start(run.program, config, initial.model, initial.adapter_path)
    run.record_dependency("base", initial.fingerprint)
    if initial.adapter_path:
        run.record_dependency("start", files_fingerprint(model_files(initial.adapter_path)))
    return initial


def check_start(program: str, config: RunConfig, model, adapter_path: str | None) -> None:
    """Raise UserError where options do not fit the base model, or the adapter on it, that a program starts from."""
    from rlhf.adapters import require_policy
    from rlhf.models import check_context

    check_context(model, config.model_name_or_path, config.max_prompt_length, config.max_response_length)
    if adapter_path and program != "reward":
        require_policy(adapter_path)
    if adapter_path and not getattr(config, "use_peft", True):
        raise UserError(
            f"use_peft is false, but {config.model_name_or_path} is an adapter. Train its whole weights from a merged "
            "run: launch/sft.py --merge true"
        )


def new_lora(run, initial, task_type: str = "CAUSAL_LM"):
    """The LoRA settings of a new adapter on the foundation, or None when the whole model is trained.

    Raises UserError for a target module that the model does not have.
    """
    from rlhf.adapters import check_targets, lora_config

    config = run.config
    if not getattr(config, "use_peft", True):
        return None
    check_targets(initial.model, config.lora_target_modules)
    lora = lora_config(task_type, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules)
    if task_type == "CAUSAL_LM":
        lora.trainable_token_indices = eos_rows(run, initial, lora)
    return lora


def eos_rows(run, initial, lora) -> list[int] | dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices` of a new policy adapter: the EOS token where its row has to be trained, or None.

    LoRA on the layers below cannot raise the logit of one token over those of others whose rows are the same. Says
    what it finds, also where an adapter that is continued cannot learn to end.
    """
    from rlhf.adapters import adapter_settings, changes_head, like_rows, token_rows

    wanted, token = run.config.train_eos, initial.tokenizer.eos_token_id
    if wanted == "never":
        return None
    found = like_rows(initial.model.get_output_embeddings().weight, token)
    if wanted == "auto" and found < NEVER_TRAINED:
        return None
    name = f"the row of the EOS token {initial.tokenizer.eos_token!r} in the output head"
    if found >= NEVER_TRAINED:
        name += f", which has a cosine above 0.9 to {found} others and was probably never trained,"
    start = initial.adapter_path
    if changes_head(adapter_settings(start) if start else lora, initial.model):
        return None
    if start:
        run.log(f"warning: {name} is not trained by the adapter {start}: its responses may never end. Train it anew")
        return None
    rows = token_rows(initial.model, token)
    run.log(
        f"{name} is trained beside LoRA" if rows else f"warning: {name} cannot be trained: PEFT leaves out its bias"
    )
    return rows


def new_dropout(config: AdapterConfig, initial) -> float:
    """The dropout of a new adapter; one that is continued in DPO or as a reward model had its own where it was new."""
    return 0.0 if initial.adapter_path else config.lora_dropout


def evaluation(run, initial, scorer: Scorer | None):
    """The evaluation by sampling of this run on its validation prompts, or None when switched off or without any."""
    from rlhf.engines.hf import Sampling
    from rlhf.evaluate import Evaluation
    from rlhf.logprobs import head_is_plain
    from rlhf.tokenizer import stop_ids

    config = run.config
    if config.eval_prompts < 1:
        return None
    rows = first_by_hash(run.data.rows(Prompt, "validation", initial.tokenizer, config.eval_data), config.eval_prompts)
    if not rows:
        run.log("no validation prompts: evaluation by sampling is off")
        return None
    return Evaluation(
        prompts=rows,
        tokenizer=initial.tokenizer,
        stop_ids=stop_ids(initial.tokenizer, initial.model),
        sampling=Sampling(max_new_tokens=config.max_response_length, temperature=config.temperature),
        scorer=scorer,
        seed=config.seed,
        batch_size=config.generation_batch_size,
        plain_head=head_is_plain(initial.model),
    )


def ends_measured(run, initial, rows: list[dict]):
    """Return a function of a model that measures P(EOS) where the answers of up to 64 of these rows end."""
    from rlhf.evaluate import eos_probability
    from rlhf.logprobs import head_is_plain

    rows, plain_head = first_by_hash(rows, 64), head_is_plain(initial.model)
    name, pad_id = "eval/response/eos_probability", initial.tokenizer.pad_token_id
    return lambda model: {name: eos_probability(model, rows, pad_id, plain_head, run.world)}
