"""What the programs share: where they start from, and how they evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.records import Prompt, Scorer
from rlhf.data.split import first_by_hash
from rlhf.engines.batched import generate
from rlhf.engines.sampling import Generate, Sampling
from rlhf.errors import UserError
from rlhf.evaluate import Evaluation, eos_probability, knowledge_of_ends
from rlhf.files import files_fingerprint, model_files
from rlhf.model.adapters import (
    adapter_settings,
    changes_head,
    check_targets,
    lora_config,
    never_trained,
    token_rows,
)
from rlhf.model.files import read_json
from rlhf.model.from_gguf import is_unconverted
from rlhf.model.loading import InitialModel, check_context, load_model
from rlhf.model.packing import head_is_plain
from rlhf.model.quantized import weight_memory
from rlhf.model.tokenizer import stop_ids
from rlhf.options.shared import EIGHT_BIT, AdapterConfig, RunConfig, quantization_of
from rlhf.ranks.deepspeed_config import read_deepspeed_config
from rlhf.ranks.distributed import DistributedContext, base_dtype
from rlhf.ranks.divided import readable, shape_of, whole
from rlhf.runs.inputs import check_adapter_start
from rlhf.runs.run import Run
from rlhf.startup import model_loaded

if TYPE_CHECKING:
    from peft import LoraConfig

# given answers whose ends show whether a base knows its EOS token
ENDS_READ = 16
# nats above chance: of the answers' words, for a base that can be judged, and of an EOS token that was
# trained. It has 8.5 in SmolLM2, and with its row drawn at random, or any untrained one, less than 0
KNOWN, LEARNT = 1.0, math.log(10)
MEASURED_ROWS = 64


def load_initial_model(run: Run) -> InitialModel:
    """Return the model that this run starts from. Raise UserError where it and the options do not
    fit.
    """
    config = run.config
    quantization = quantization_of(config)
    check_zero(run.program, config, run.world)
    check_converted(config, run.world)
    initial = load_model(
        config.model_name_or_path,
        run.torch_dtype,
        config.attn_implementation,
        quantization,
        zero_settings(config, run.world),
    )
    if quantization:
        now, whole = weight_memory(initial.model)
        run.log(
            f"the base is kept in {quantization}: {now / 2**20:.1f} MiB instead of {whole / 2**20:.1f}"
        )
    model_loaded(initial.model)
    check_start(run.program, config, initial.model, initial.adapter_path)
    run.record_dependency("base", initial.fingerprint)
    if initial.adapter_path:
        run.record_dependency("start", files_fingerprint(model_files(initial.adapter_path)))
    return initial


def zero_stage(config: RunConfig, world: DistributedContext) -> int:
    """Return the stage of ZeRO under which a run trains; 0 without DeepSpeed."""
    settings = read_deepspeed_config(config.deepspeed, world) or {}
    return settings.get("zero_optimization", {}).get("stage", 0)


def zero_settings(config: RunConfig, world: DistributedContext) -> dict[str, Any] | None:
    """Return the DeepSpeed JSON of a run that divides its base among the ranks, else None."""
    settings = read_deepspeed_config(config.deepspeed, world)
    return settings if zero_stage(config, world) == 3 else None


def check_zero(program: str, config: RunConfig, world: DistributedContext) -> None:
    """Raise UserError for what DeepSpeed cannot train: ZeRO-3 divides weights and moments that are
    packed, TRL's programs have float32 in ZeRO, and ZeRO 0 no copies in float32.
    """
    if config.dtype == "float64" and world.launched and program != "ppo":
        raise UserError(
            "dtype float64 does not go with a launcher in SFT, reward model and DPO: DeepSpeed would keep gradients "
            "and weights in float32. Start it with plain python, or take float32"
        )
    stage = zero_stage(config, world)
    is_whole_reward = program == "reward" and not config.use_peft
    on_cpu = world.device.type == "cpu"
    if is_whole_reward and config.dtype == "bfloat16" and on_cpu and stage > 0:
        raise UserError(
            "ZeRO 1 to 3 keep trained weights in one dtype, and a reward model that is trained whole in bfloat16 has "
            "its score head in float32 on a CPU. Take --deepspeed zero0, or --dtype float32"
        )
    is_whole_ppo = program == "ppo" and not config.use_peft
    learns_bfloat16 = is_whole_ppo and base_dtype(config.dtype, world.device) == "bfloat16"
    if learns_bfloat16 and world.launched and stage == 0:
        raise UserError(
            "PPO on whole weights in bfloat16 makes its steps on copies in float32, which ZeRO 0 does not keep: small "
            "steps would be lost. Take --deepspeed zero2, or --dtype float32"
        )
    asked = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(config, name)]
    if config.optim in EIGHT_BIT:
        asked.append(f"optim {config.optim}")
    if asked and stage == 3:
        raise UserError(
            f"{asked[0]} does not go with ZeRO-3 ({config.deepspeed}), which divides among the ranks what is packed "
            "here. Take --deepspeed zero2"
        )


def check_converted(config: RunConfig, world: DistributedContext) -> None:
    """Raise UserError for a GGUF file that ZeRO-3 would have to convert: in memory, and whole."""
    path = config.model_name_or_path
    if zero_stage(config, world) == 3 and is_unconverted(path):
        raise UserError(
            f"{path}: a GGUF file is converted in the memory of one process, whole, which ZeRO-3 is there to avoid. "
            "Convert it first, where there is room: rlhf collect sample, or any start without --deepspeed zero3"
        )


def check_start(program: str, config: RunConfig, model: Any, adapter_path: str | None) -> None:
    """Raise UserError where options do not fit the base model, or the adapter on it, that a program
    starts from.
    """
    check_context(
        model, config.model_name_or_path, config.max_prompt_length, config.max_response_length
    )
    if adapter_path:
        check_adapter_start(program, config)


def new_lora(
    run: Run,
    initial: InitialModel,
    task_type: str = "CAUSAL_LM",
    answers: list[dict] | None = None,
) -> LoraConfig | None:
    """Return the LoRA settings of a new adapter on the initial model, or None when the whole model
    is trained.

    answers: rows with "prompt_ids" and "response_ids", whose ends show whether the EOS token was
    ever trained. Raises UserError for a target module that the model does not have.
    """
    config = run.config
    if not getattr(config, "use_peft", True):
        return None
    check_targets(initial.model, config.lora_target_modules)
    lora = lora_config(
        task_type, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules
    )
    begun = run.resumed and Path(run.resumed.folder) / "adapter_config.json"
    if begun and begun.is_file():
        # a run goes on as it began, also where this version would decide otherwise
        lora.trainable_token_indices = read_json(begun).get("trainable_token_indices")
    elif task_type == "CAUSAL_LM":
        lora.trainable_token_indices = eos_rows(run, initial, lora, answers)
    return lora


def eos_rows(
    run: Run, initial: InitialModel, lora: LoraConfig, answers: list[dict] | None = None
) -> list[int] | dict[str, list[int]] | None:
    """Return PEFT's `trainable_token_indices` for the EOS token where its row has to be trained, or
    None.

    LoRA on the layers below cannot raise the logit of one token over those of others whose rows are
    the same. Logs what it finds, also where an adapter that is continued cannot learn to end.
    """
    wanted, token = run.config.train_eos, initial.tokenizer.eos_token_id
    if wanted == "never":
        return None
    head = initial.model.get_output_embeddings()
    with whole([head.weight]):
        reason = never_trained(head.weight, token)
    start = initial.adapter_path
    if not reason and wanted == "auto" and not start and answers:
        reason = _improbable_ends(run, initial, answers)
    if wanted == "auto" and not reason:
        return None

    if changes_head(adapter_settings(start) if start else lora, initial.model):
        return None
    name = f"the row of the EOS token {initial.tokenizer.eos_token!r} in the output head"
    if reason:
        name += f", which was probably never trained ({reason}),"
    if start:
        run.log(
            f"warning: {name} is not trained by the adapter {start}: its responses may never end. Train it again"
        )
        return None
    rows = token_rows(initial.model, token)
    if rows:
        run.log(f"{name} is trained beside LoRA")
    else:
        run.log(f"warning: {name} cannot be trained: PEFT leaves out its bias")
    return rows


def _improbable_ends(run: Run, initial: InitialModel, answers: list[dict]) -> str:
    """Return what shows that a model expects its EOS token nowhere, not even where answers end, or
    "".

    It is compared with chance, 1/V, if the model knows the answers' other words better than chance.
    """
    eos = initial.tokenizer.eos_token_id
    ending = [row for row in answers if row["response_ids"][-1:] == [eos]]
    measured = first_by_hash(ending, ENDS_READ)
    if not measured:
        return ""
    model = initial.model.to(run.world.device)
    chance = -math.log(shape_of(model.get_output_embeddings().weight)[0])
    pad_id, plain_head = initial.tokenizer.pad_token_id, head_is_plain(model)
    with readable(model, world=run.world):
        ends, others = knowledge_of_ends(model, measured, pad_id, plain_head, run.world)
    if others < chance + KNOWN or ends >= chance + LEARNT:
        return ""
    return f"median P(EOS) where {len(measured)} given answers end: {math.exp(ends):.1e}"


def new_dropout(config: AdapterConfig, initial: InitialModel) -> float:
    """Return the dropout of a new adapter in DPO; 0 for one that is continued."""
    return 0.0 if initial.adapter_path else config.lora_dropout


def sampling_engine(run: Run, initial: InitialModel) -> Generate:
    """Return what samples: the engine of this process, or a vLLM server that serves the base.

    Raises UserError where the server cannot be reached or serves another base.
    """
    url = run.config.vllm_url
    if url is None:
        return generate
    from rlhf.engines.vllm import VllmEngine

    engine = VllmEngine(url, run.folder / "vllm", initial.base_path, run.world)
    engine.check_base()
    run.log(f"sampling from the vLLM server at {url}, which is experimental")
    if initial.quantization:
        run.log(
            "WARNING: the server samples from the base as it keeps it, and this run learns on one in "
            f"{initial.quantization}; rollout/logprob_gap shows the difference"
        )
    return engine


def evaluation(
    run: Run, initial: InitialModel, scorer: Scorer | None, engine: Generate | None = None
) -> Evaluation | None:
    """Return the evaluation by sampling on the run's validation prompts; None where it is off or
    has no prompts. Without an `engine` it makes its own.
    """
    config, tokenizer = run.config, initial.tokenizer
    if config.eval_prompts < 1:
        return None
    rows = first_by_hash(
        run.data.rows(Prompt, "validation", tokenizer, config.eval_data), config.eval_prompts
    )
    if not rows:
        run.log("no validation prompts: evaluation by sampling is off")
        return None
    return Evaluation(
        prompts=rows,
        tokenizer=tokenizer,
        stop_ids=stop_ids(tokenizer, initial.model),
        sampling=Sampling(
            max_new_tokens=config.max_response_length, temperature=config.temperature
        ),
        scorer=scorer,
        seed=config.seed,
        batch_size=config.generation_batch_size,
        plain_head=head_is_plain(initial.model),
        generate=engine or sampling_engine(run, initial),
    )


def eos_measurement(
    run: Run, initial: InitialModel, rows: list[dict]
) -> Callable[[Any], dict[str, float]]:
    """Return a function of a model that measures P(EOS) where the answers of up to 64 of these rows
    end.
    """
    measured, plain_head = first_by_hash(rows, MEASURED_ROWS), head_is_plain(initial.model)
    pad_id = initial.tokenizer.pad_token_id

    def measure(model: Any) -> dict[str, float]:
        return {
            "eval/response/eos_probability": eos_probability(
                model, measured, pad_id, plain_head, run.world
            )
        }

    return measure
