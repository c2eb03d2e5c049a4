"""Memory of each rank, phase by phase, from the passes and from what is kept between them."""

from dataclasses import dataclass, field, replace
from typing import Any

from rlhf.plan.ledger import Peak, Reduction

# numbers of parameters that ZeRO-3 keeps gathered at most, and fetches ahead; those of a tensor that
# it does not divide
MAX_LIVE, PREFETCH = 1_000_000_000, 50_000_000


@dataclass(frozen=True)
class Setup:
    """How a run is started: what decides where its state is kept."""

    ranks: int = 1
    device: str = "cuda"
    # by the `deepspeed` command or torchrun: then the ZeRO stage counts
    launched: bool = True
    stage: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    # numbers in a bucket of gradients on their way between ranks; this is DeepSpeed's default
    bucket: int = 500_000_000

    @property
    def sharding(self) -> int:
        """Return the ZeRO stage that is at work."""
        return self.stage if self.launched else 0


@dataclass(frozen=True)
class Weights:
    """What a model holds on each rank, before anything is divided."""

    # of the base that do not learn, and all other frozen parts: adapters of roles, a second model
    frozen: int
    adapters: int
    other_models: int
    # numbers that learn, and the bytes of one in the passes
    trained: int
    trained_size: int
    # bytes of AdamW's two moments of a number
    moments: int = 8
    # fp32 copies of the numbers that learn, which ZeRO keeps at any precision and DeepSpeed for bf16
    masters: bool = False
    # of these numbers, those of the largest tensor
    largest: int = 0
    # the optimizer makes a tensor for all numbers that learn while it steps (foreach), or for one
    foreach: bool = False
    fused: bool = False


@dataclass
class Phase:
    """Bytes on one rank at the fullest moment of a phase, by what they are for."""

    name: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def held(weights: Weights, setup: Setup) -> dict[str, int]:
    """Return the bytes that a rank holds through the whole run: weights and optimizer.

    ZeRO 1 and 2 divide the optimizer's state among N ranks, with a copy of the weights in float32;
    ZeRO 3 divides all weights too (Rajbhandari et al. 2020, arXiv 1910.02054, sec. 3).
    """
    ranks, stage = setup.ranks, setup.sharding
    trained = weights.trained * weights.trained_size
    state = weights.trained * weights.moments
    # ZeRO works on a copy in float32 of its part, whatever the precision
    if stage or weights.masters:
        state += 4 * weights.trained
    if stage:
        state = -(-state // ranks)
    parts = {
        "base": weights.frozen,
        "roles": weights.adapters,
        "other models": weights.other_models,
        "learning weights": trained,
        "optimizer": 0 if setup.offload_optimizer else state,
    }
    if stage == 3:
        for name in ("base", "roles", "learning weights"):
            parts[name] = 0 if setup.offload_parameters else -(-parts[name] // ranks)
    return parts


def gathered(weights: Weights, setup: Setup, *, whole: bool) -> int:
    """Return the bytes of weights that ZeRO-3 brings together: whole for sampling and saving, as
    many as its limits allow in a pass.
    """
    if setup.sharding != 3:
        return 0
    everything = weights.frozen + weights.adapters + weights.trained * weights.trained_size
    if whole:
        return everything
    return min(everything, (MAX_LIVE + PREFETCH) * weights.trained_size)


def reduced(weights: Weights, setup: Setup) -> tuple[int, int]:
    """Return the bytes of the gradients that a rank keeps under DeepSpeed between passes, and of the
    buffer in which they travel, which is as large as the bucket whatever is in it.
    """
    size, stage = weights.trained_size, setup.sharding
    if not stage:
        # all of them flat once more while they are summed
        travelling = min(weights.trained, setup.bucket) * size
        return 0, travelling if setup.launched and setup.ranks > 1 else 0
    kept = weights.trained * size
    if stage > 1:
        kept = -(-kept // setup.ranks)
    return 0 if setup.offload_optimizer else kept, setup.bucket * size


def reduction_of(weights: Weights, setup: Setup) -> Reduction:
    """Return what DeepSpeed makes of gradients in a backward pass.

    ZeRO 1 sums them before the optimizer's step, ZeRO 2 as they come. What ZeRO 3 needs is
    allocated at the start, and is no part of the pass.
    """
    kept, bucket = reduced(weights, setup)
    per_stage = {1: Reduction(bucket), 2: Reduction(bucket, kept), 3: Reduction(0, 0)}
    return per_stage.get(setup.sharding, Reduction())


def learning_phase(weights: Weights, setup: Setup, peak: Peak) -> Phase:
    """Return the phase of forward and backward passes, whose tensors `peak` counts."""
    kept, bucket = reduced(weights, setup) if setup.sharding == 3 else (0, 0)
    parts = held(weights, setup)
    parts["gathered"] = gathered(weights, setup, whole=False)
    parts["gradients"] = peak.gradients + kept
    parts["buckets"] = peak.bucket + bucket
    parts["logits"] = peak.logits
    parts["activations"] = peak.total - peak.gradients - peak.bucket - peak.logits
    return Phase("learn", parts)


def step_phase(weights: Weights, setup: Setup) -> Phase:
    """Return the phase of the optimizer's step: all gradients, and what AdamW makes on its way."""
    kept, bucket = reduced(weights, setup)
    parts = held(weights, setup)
    parts["gradients"] = kept if setup.sharding else weights.trained * weights.trained_size
    # ZeRO 1 and 2 have freed theirs
    parts["buckets"] = 0 if setup.sharding in (1, 2) else bucket
    if setup.sharding and not setup.offload_optimizer:
        # the part's gradients flat, in float32
        parts["gradients"] += 4 * -(-weights.trained // setup.ranks)
    if not weights.fused:
        at_once = weights.trained if weights.foreach else 2 * weights.largest
        parts["temporary"] = 4 * at_once
    return Phase("step", parts)


def passing_phase(name: str, weights: Weights, setup: Setup, peak: Peak) -> Phase:
    """Return a phase of passes without gradients."""
    parts = held(weights, setup)
    parts["gathered"] = gathered(weights, setup, whole=True)
    parts["logits"] = peak.logits
    parts["activations"] = peak.total - peak.logits
    return Phase(name, parts)


def sampling_phase(
    weights: Weights, setup: Setup, merged: int, largest: int, cache: int, peak: Peak
) -> Phase:
    """Return the phase of sampling: the adapted weights once more, keys and values, and a step.

    merged: bytes of the weights with the adapter folded in; largest: of the numbers of the largest
    of them, which is added to in float32 before the cache is taken.
    """
    parts = held(weights, setup)
    parts["gathered"] = gathered(weights, setup, whole=True)
    parts["merged copy"] = merged
    folding = 3 * 4 * largest if merged else 0
    parts["KV cache"] = cache
    parts["logits"] = peak.logits
    parts["activations"] = max(peak.total, folding) - cache - peak.logits
    return Phase("sample", parts)


def state_table(weights: Weights, setup: Setup) -> list[dict[str, Any]]:
    """Return, for each ZeRO stage, what a rank holds between passes, gradients included."""
    rows = []
    for stage in (0, 1, 2, 3):
        offloads = setup.offload_optimizer and stage > 0
        other = replace(setup, launched=True, stage=stage, offload_optimizer=offloads)
        parts = held(weights, other)
        kept, _ = reduced(weights, other)
        parts["gradients"] = kept if stage else weights.trained * weights.trained_size
        rows.append({"stage": stage, "total": sum(parts.values()), **parts})
    return rows
