"""From the options of a program to the memory of its phases."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from rlhf.model.dropout import disable_dropout
from rlhf.model.loading import DTYPES
from rlhf.model.packing import decoder_and_head, group_rows, tokens_per_pass
from rlhf.options.shared import EIGHT_BIT, quantization_of
from rlhf.plan.ledger import size_of
from rlhf.plan.memory import (
    Phase,
    Setup,
    Weights,
    learning_phase,
    passing_phase,
    reduced,
    reduction_of,
    sampling_phase,
    step_phase,
)
from rlhf.plan.passes import (
    Rows,
    as_if_on,
    learning_peak,
    measuring_peak,
    sampling_peak,
)
from rlhf.plan.roles import Start, critic_trunk, roles_of, shares_prompts
from rlhf.plan.shape import adapted, empty_model, lora_of, pack, to_fake
from rlhf.plan.work import Costs
from rlhf.ranks.deepspeed_config import offloads, read_deepspeed_config
from rlhf.ranks.distributed import DistributedContext, base_dtype
from rlhf.stages import check_zero

TRL = ("sft", "reward", "dpo")


@dataclass
class Estimate:
    """What a run will take on each rank."""

    weights: Weights
    phases: list[Phase] = field(default_factory=list)
    # numbers that learn, and that do not
    numbers: dict[str, int] = field(default_factory=dict)
    costs: Costs | None = None
    # what a step of sampling reads: the weights, and keys and values of one token
    sampled_bytes: tuple[float, float] = (0.0, 0.0)

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def setup_of(program: str, config: Any, ranks: int, device: str, *, launched: bool) -> Setup:
    """Return how ZeRO divides a run. Raises UserError for what the program would refuse."""
    world = DistributedContext(size=ranks, device=torch.device(device), launched=launched)
    check_zero(program, config, world)
    settings = read_deepspeed_config(config.deepspeed, world, config)
    if settings is None:
        return Setup(ranks, device, launched=False)
    zero = settings["zero_optimization"]
    offload = (offloads(zero, "optimizer"), offloads(zero, "param"))
    given = zero.get("reduce_bucket_size", "auto")
    bucket = Setup.bucket if given == "auto" else int(given)
    return Setup(ranks, device, True, zero["stage"], *offload, bucket)


def estimate(program: str, config: Any, start: Start, setup: Setup) -> Estimate:
    """Return the memory of a program's phases on each rank."""
    trains_whole = not config.use_peft
    # DeepSpeed casts whole weights of TRL's programs, and keeps float32 ones beside them
    in_float32 = trains_whole and program in TRL and not setup.launched
    dtype = base_dtype(config.dtype, torch.device(setup.device), trains_whole=in_float32)
    base = empty_model(start.shape, dtype, config.attn_implementation)
    scales = pack(base, quantization_of(config)) if quantization_of(config) else 0
    frozen = size_of(base.parameters()) + size_of(base.buffers()) + scales

    model = base
    adapter = 0
    # PPO's reward models are adapters beside whole weights too
    if not trains_whole or program == "ppo":
        # in bfloat16 where DeepSpeed keeps all of the model so
        is_whole_bf16 = program in TRL and setup.launched and dtype == "bfloat16"
        own = empty_model(start.shape, dtype, config.attn_implementation)
        if quantization_of(config):
            pack(own, quantization_of(config))
        task = "SEQ_CLS" if program == "reward" else "CAUSAL_LM"
        own = adapted(own, lora_of(config, start.adapter, task), is_whole_bf16)
        adapter = sum(p.numel() for p in own.parameters() if p.requires_grad)
        model = base if trains_whole else own
    weights = weights_of(program, config, start, setup, base, frozen, adapter, dtype)
    found = Estimate(weights)
    copies = roles_of(program, config, start)[1]
    has_frozen_base = program in ("dpo", "ppo") or not trains_whole
    frozen_numbers = has_frozen_base * count(base) + copies * adapter
    found.numbers = {"trainable": weights.trained, "frozen": frozen_numbers}
    with FakeTensorMode(), as_if_on(setup.device):
        if getattr(config, "eval_prompts", 0) or program == "ppo":
            found.phases, kept = sampling_phases(program, config, setup, weights, to_fake(base))
            found.sampled_bytes = (float(frozen), kept)
        prepare(program, config, start, setup, to_fake(model))
        found.costs = Costs.of(model, recomputed=config.gradient_checkpointing)
        with autocast(program, setup, dtype):
            found.phases += pass_phases(program, config, setup, weights, model)
    return found


def count(model: nn.Module) -> int:
    """Return the numbers of a model, those of packed weights one by one."""
    packed = {
        id(m.weight): m.in_features * m.out_features
        for m in model.modules()
        if hasattr(m, "method")
    }
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())


def weights_of(
    program: str,
    config: Any,
    start: Start,
    setup: Setup,
    base: nn.Module,
    frozen: int,
    adapter: int,
    dtype: str,
) -> Weights:
    """Return what the roles of a program hold: bytes that stay, numbers that learn."""
    own = DTYPES[dtype].itemsize
    width = base.get_output_embeddings().in_features
    by_trl, is_mixed = program in TRL, dtype == "bfloat16"
    masters = by_trl and is_mixed and setup.launched
    moments = 2 if config.optim in EIGHT_BIT else 8
    learning, copies = roles_of(program, config, start)
    foreach = not by_trl and setup.device == "cuda"
    largest = max(p.numel() for p in base.parameters())
    if by_trl and not config.use_peft:
        # TRL's own AdamW keeps the moments in the dtype of the weights
        if is_mixed and not masters and config.optim not in EIGHT_BIT:
            moments = 2 * own
        others = frozen if program == "dpo" else 0
        # all but buffers learns
        buffers = size_of(base.buffers())
        return Weights(buffers, 0, others, count(base), own, moments, masters, largest, fused=True)
    if not config.use_peft:
        # beside the frozen base: the policy, and a decoder with a head
        numbers = count(base) + (learning > 1) * critic_size(base)
        roles = copies * adapter * 4
        return Weights(frozen, roles, 0, numbers, own, moments, is_mixed, largest, foreach)
    size = own if masters else 4
    numbers = learning * adapter + (width + 1 if program == "reward" or learning > 1 else 0)
    return Weights(
        frozen,
        copies * adapter * size,
        0,
        numbers,
        size,
        moments,
        masters,
        foreach=foreach,
        fused=by_trl,
    )


def critic_size(base: nn.Module) -> int:
    """Return the numbers of PPO's critic on whole weights: a model's decoder and a scalar head."""
    decoder, head = decoder_and_head(base)
    return count(decoder) + head.in_features + 1


def sampling_phases(
    program: str, config: Any, setup: Setup, weights: Weights, base: nn.Module
) -> tuple[list[Phase], float]:
    """Return the phase of sampling in this process (PPO's rollouts, evaluations of all programs), and
    the bytes of one token's keys and values.
    """
    if config.vllm_url:
        return [], 0.0
    wanted = config.rollout_batch_size if program == "ppo" else 0
    wanted = max(wanted, config.eval_prompts)
    slots = min(config.generation_batch_size, -(-wanted // setup.ranks))
    limits = (config.max_prompt_length, config.max_response_length)
    cache, peak = sampling_peak(base, slots, *limits, setup.device)
    merged = largest = 0
    # packed weights and divided ones keep their adapter beside them
    if config.use_peft and not quantization_of(config) and setup.sharding != 3:
        linear = [m.weight for m in base.modules() if type(m) in (nn.Linear, Conv1D)]
        linear = [w for w in linear if w is not base.get_output_embeddings().weight]
        merged, largest = size_of(linear), max(w.numel() for w in linear)
    phase = sampling_phase(weights, setup, merged, largest, cache, peak)
    return [phase], cache / (slots * sum(limits))


def prepare(program: str, config: Any, start: Start, setup: Setup, model: nn.Module) -> None:
    """Put a model into the state in which a program makes its passes."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if causal is model:
        model.requires_grad_(True)
    if setup.sharding == 3:
        # the mark by which passes know divided weights, and read them in other ways
        for parameter in model.parameters():
            parameter.ds_id = -1
    model.train()
    dropout = 0.0 if program == "ppo" or start.has_adapter else config.lora_dropout
    if program == "reward":
        dropout = config.lora_dropout
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and ".lora_dropout." in name:
            module.p = dropout
    if program != "sft":
        disable_dropout(model, dropout)
    if config.gradient_checkpointing:
        causal.activation_checkpointing_enable()
        if causal is not model:
            model.enable_input_require_grads()


def autocast(program: str, setup: Setup, dtype: str) -> contextlib.AbstractContextManager:
    """Return the context of TRL's passes: bf16 on a GPU casts float32 adapters, but under
    DeepSpeed, which holds none.
    """
    is_cast = program in TRL and setup.device == "cuda" and not setup.launched
    if is_cast and dtype == "bfloat16":
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def pass_phases(
    program: str, config: Any, setup: Setup, weights: Weights, model: nn.Module
) -> list[Phase]:
    """Return the phases of passes: measuring, learning and the optimizer's step."""
    prompt, response = config.max_prompt_length, config.max_response_length
    phases, kinds, repeated = [], [program], True
    if program == "ppo":
        rows, groups = ppo_rows(config, setup, model)
        entropy = "entropy" if config.entropy_coef else "policy"
        kinds = [entropy, "value"] if critic_trunk(config) == "own" else [entropy]
        repeated = groups > 1
        phases.append(
            passing_phase("measure", weights, setup, measuring_peak(model, rows, "policy"))
        )
    else:
        pairs = 2 if program in ("reward", "dpo") else 1
        size = pairs * config.per_device_train_batch_size
        rows = Rows(size, prompt, response, shares_prompts(program, config))
        repeated = config.gradient_accumulation_steps > 1
        if program == "dpo":
            peak = measuring_peak(model, rows, "dpo")
            phases.append(passing_phase("reference", weights, setup, peak))
    if getattr(config, "eval_prompts", 0) and (program != "sft" or config.use_peft):
        evaluated = min(config.generation_batch_size, -(-config.eval_prompts // setup.ranks))
        model.eval()
        peak = measuring_peak(model, Rows(evaluated, prompt, response), "policy")
        phases.append(passing_phase("evaluate", weights, setup, peak))
        model.train()
    peak = learning_peak(model, rows, kinds, reduction_of(weights, setup), repeated=repeated)
    phases.append(learning_phase(weights, setup, peak))
    phases.append(step_phase(weights, setup))
    if program == "ppo" and not config.use_peft:
        add_whole_gradients(phases[-2:], weights, setup, model)
    if program == "ppo":
        for phase in phases[:1] + phases[-2:]:
            phase.parts["rollout"] = rollout_bytes(config, setup, model)
    return phases


def add_whole_gradients(
    phases: list[Phase], weights: Weights, setup: Setup, model: nn.Module
) -> None:
    """Add to PPO's phases of learning and of the step what whole weights have more of gradients."""
    learning, step = phases
    # ZeRO 2 and 3 take them out of the passes
    if setup.sharding < 2:
        # passes of the critic, which were counted on the policy's model, find the policy's too
        learning.parts["gradients"] += (weights.trained - count(model)) * weights.trained_size
    if not weights.masters:
        return
    # summed up in float32, by a plain process and ZeRO 1 of all weights, by ZeRO 2 and 3 of a part
    more = weights.trained * (4 - weights.trained_size)
    if setup.sharding > 1:
        more = 0 if setup.offload_optimizer else -(-more // setup.ranks)
    learning.parts["gradients"] += more
    if setup.sharding == 2:
        # it steps on that sum itself, where others make a copy
        step.parts["gradients"] -= reduced(weights, setup)[0]
    elif not setup.offload_optimizer:
        step.parts["gradients"] += more


def ppo_rows(config: Any, setup: Setup, model: nn.Module) -> tuple[Rows, int]:
    """Return the rows of PPO's largest pass, and how many passes of a kind make an update."""
    length = config.max_prompt_length + config.max_response_length
    # passes whose entropy or head learns keep their logits
    keeps_logits = config.entropy_coef or not config.use_peft
    vocabulary = model.config.get_text_config().vocab_size if keeps_logits else 0
    suits = tokens_per_pass(torch.device(setup.device), vocabulary)
    tokens = config.micro_batch_tokens or suits
    own = -(-config.rollout_batch_size // config.num_mini_batches // setup.ranks)
    groups = group_rows([length] * own, tokens, config.per_device_train_batch_size)
    rows = Rows(len(groups[0]), config.max_prompt_length, config.max_response_length)
    return rows, len(groups)


def rollout_bytes(config: Any, setup: Setup, model: nn.Module) -> int:
    """Return the bytes of a rollout's tensors: ids and masks of all ranks, what was measured, and
    the states that a critic on the reward model's trunk reads of this rank's rows.
    """
    rows, response = config.rollout_batch_size, config.max_response_length
    length = config.max_prompt_length + response
    # ids and attention, positions and responses: 8 bytes; six measured columns: 4; a mask: 1
    numbers = rows * (8 * 2 * length + (8 * 2 + 6 * 4 + 1) * response)
    if critic_trunk(config) == "reward":
        width = decoder_and_head(model)[1].in_features
        numbers += 4 * width * response * -(-rows // setup.ranks)
    return numbers
