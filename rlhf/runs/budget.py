"""What a run has cost, counted in the same words by every program: the `budget/*` metrics.

    budget = Budget()
    budget.watch(model)
    with budget.counting():      # sampling and training; not evaluation
        ...

FLOPs are those of the matrix products that are really made, padding included: hooks see each pass
through a decoder and its head. docs/design.md says what is and what is not in them.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlhf.model.logprobs import watch_portions
from rlhf.model.packing import decoder_and_head
from rlhf.model.quantized import QuantizedLinear
from rlhf.ranks.distributed import DistributedContext

COUNTERS = ("episodes", "tokens_generated", "tokens_trained", "flops", "reference_flops")
# parts of other counters, logged where they are not 0
PARTS = ("reference_flops", "reference_seconds")
# of the clock, which the ranks share
SECONDS = ("seconds", "reference_seconds")


@dataclass(frozen=True)
class DecoderShape:
    """Multiply-adds of a pass through a decoder without its head, under the adapters that are
    active.

    All but `pair` are of one position (a token or padding).
    """

    # all weights that a position is multiplied with, the adapters' factors among them
    linear: float
    trained: float  # of these, the ones that are trained
    first: float  # of these, those of the first layer that read the embeddings
    last: float  # of these, each layer's last one, where it is trained
    pair: float  # attention between one query and one key, in all layers and heads

    def forward(self, positions: int, pairs: int) -> float:
        """Return the FLOPs of a pass over `positions`, each of which attends to some: `pairs` in all,
        masked ones included.
        """
        return 2.0 * (self.linear * positions + self.pair * pairs)

    def backward(
        self, positions: int, pairs: int, *, to_embeddings: bool, fused: bool, recomputed: bool
    ) -> float:
        """Return the FLOPs of the backward pass.

        A weight's output gradient is multiplied with the weight, and with its input where it is
        trained. Unless gradients go on `to_embeddings`, the first products need none. Attention
        makes four products where the forward pass has two, and a `fused` kernel makes the scores
        once more. Gradient checkpointing (`recomputed`) repeats the forward pass, each layer up to
        the input of what is trained last in it.
        """
        weights = self.linear + self.trained - (0.0 if to_embeddings else self.first)
        flops = 2.0 * (weights * positions + (2.5 if fused else 2.0) * self.pair * pairs)
        if recomputed:
            flops += 2.0 * ((self.linear - self.last) * positions + self.pair * pairs)
        return flops


@dataclass
class Cost:
    """What some passes have cost."""

    flops: float = 0.0
    seconds: float = 0.0


@dataclass
class Budget:
    """This rank's counters since the program began (`total` sums them over ranks)."""

    episodes: int = 0
    tokens_generated: int = 0
    tokens_trained: int = 0
    flops: float = 0.0
    # of flops and seconds, those of DPO's reference log-probabilities
    reference_flops: float = 0.0
    reference_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)
    is_counting: bool = False

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count the passes of the watched models that are made inside."""
        before, self.is_counting = self.is_counting, True
        try:
            yield
        finally:
            self.is_counting = before

    @contextlib.contextmanager
    def apart(self) -> Iterator[Cost]:
        """Yield the cost of what is computed inside, known afterwards, and leave it out of the
        counters.
        """
        cost, flops, began = Cost(), self.flops, time.monotonic()
        with self.counting():
            yield cost
        cost.flops, self.flops = self.flops - flops, flops
        cost.seconds = time.monotonic() - began
        self.began += cost.seconds

    def charge_reference(self, flops: float, seconds: float) -> None:
        """Count reference log-probabilities, whichever run has computed them."""
        self.flops += flops
        self.reference_flops += flops
        # the clock is put back by what it is charged with
        self.began -= seconds
        self.reference_seconds += seconds

    def watch(self, model: nn.Module) -> None:
        """Count each pass of `model`: causal or with a score head, below PEFT or plain. Scalar
        heads count nothing.
        """
        decoder, head = decoder_and_head(model)
        decoder = decoder.get_decoder()  # the one that OPT's causal model calls stands in another
        shapes: dict[tuple, DecoderShape] = {}
        embedded: list[Tensor] = []

        def after_embeddings(module, args, output) -> None:
            embedded[:] = [output] if self.is_counting else []

        def after_decoder(module, args, kwargs, output) -> None:
            if not self.is_counting:
                return
            # an engine may pass through a copy with the adapter folded into its weights
            adapters = active_adapters(module)
            if adapters not in shapes:
                shapes[adapters] = decoder_shape(module, adapters)
            shape = shapes[adapters]
            positions, pairs = pass_size(args, kwargs, module.config._attn_implementation)
            self.flops += shape.forward(positions, pairs)
            if output[0].requires_grad:
                self.flops += shape.backward(
                    positions,
                    pairs,
                    to_embeddings=bool(embedded) and embedded[0].requires_grad,
                    fused=decoder.config._attn_implementation != "eager",
                    recomputed=decoder.training and decoder.is_activation_checkpointing,
                )
            embedded.clear()

        def count_head(positions: int, learns: bool, recomputed: bool) -> None:
            size, trained = weights_of(head, active_adapters(decoder))
            products = size + (size + trained + recomputed * size) * learns
            self.flops += 2.0 * products * positions

        def after_head(module, args, output) -> None:
            if self.is_counting:
                count_head(output[..., 0].numel(), output.requires_grad, False)

        def after_portions(positions: int, learns: bool) -> None:
            if self.is_counting:
                count_head(positions, learns, False)

        def after_model(module, args, kwargs, output) -> None:
            # TRL reads the head's weight itself, and makes its logits again in the backward pass
            if not self.is_counting or not kwargs.get("fused_lm_head"):
                return
            labels = kwargs["shift_labels"] if "shift_labels" in kwargs else kwargs["labels"][:, 1:]
            # a pass on packed rows says for itself
            positions = getattr(output, "head_positions", fused_head_positions(labels))
            count_head(positions, output.log_probs.requires_grad, True)

        decoder.get_input_embeddings().register_forward_hook(after_embeddings)
        decoder.register_forward_hook(after_decoder, with_kwargs=True)
        model.register_forward_hook(after_model, with_kwargs=True)
        if head is not None:
            head.register_forward_hook(after_head)
            watch_portions(head, after_portions)

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps; seconds are those spent so far."""
        state = {name: getattr(self, name) for name in COUNTERS}
        state["seconds"] = time.monotonic() - self.began
        state["reference_seconds"] = self.reference_seconds
        return state

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name in (*COUNTERS, "reference_seconds"):
            # a checkpoint of an earlier version has no parts
            setattr(self, name, state.get(name, 0))
        self.began = time.monotonic() - state["seconds"]

    def load_shares(self, states: list[dict[str, float]], world: DistributedContext) -> None:
        """Restore this rank's part of what `state_dict` returned on each rank of a run.

        Of another number of ranks, the first takes over what all have counted.
        """
        if len(states) == world.size:
            return self.load_state_dict(states[world.rank])
        clocks = {name: max(state.get(name, 0.0) for state in states) for name in SECONDS}
        counted = dict.fromkeys(COUNTERS, 0)
        if world.is_main:
            counted = {name: sum(state.get(name, 0) for state in states) for name in COUNTERS}
        self.load_state_dict(counted | clocks)

    def metrics(self) -> dict[str, float]:
        return named(self.state_dict())

    def total(self, world: DistributedContext) -> dict[str, float]:
        """Return `metrics` summed over ranks (seconds are the clock's)."""
        state = self.state_dict()
        for name in COUNTERS:
            state[name] = float(world.sum(float(state[name])))
        return named(state)


def named(counters: dict[str, float]) -> dict[str, float]:
    """Return counters as metrics, without parts that are 0."""
    return {
        f"budget/{name}": value for name, value in counters.items() if value or name not in PARTS
    }


def fused_head_positions(labels: Tensor) -> int:
    """Return the positions that TRL's fused head multiplies for these labels of next tokens."""
    # off a GPU those without a label too
    on_gpu = labels.device.type in ("cuda", "xpu")
    return int((labels != -100).sum()) if on_gpu else labels.numel()


def pass_size(args: tuple, kwargs: dict[str, Any], attention: str = "sdpa") -> tuple[int, int]:
    """Return the positions of a decoder's pass, and the pairs of query and key in its attention."""
    inputs = kwargs.get("input_ids", args[0] if args else None)
    inputs = kwargs["inputs_embeds"] if inputs is None else inputs
    positions = inputs.shape[0] * inputs.shape[1]
    packed = kwargs.get("packed_rows")
    if packed is not None:
        # each row attends to itself, padded to the longest
        return positions, packed.batch * packed.length**2
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None and "flash" in attention:
        # rows that TRL has packed; other kernels mask what is not of a token's own row
        return positions, int((bounds.diff().long() ** 2).sum())
    mask = kwargs.get("attention_mask")
    # those in the cache too
    keys = inputs.shape[1] if mask is None else mask.shape[-1]
    return positions, positions * keys


def decoder_shape(decoder: nn.Module, adapters: tuple[str, ...] = ()) -> DecoderShape:
    """Return the sizes of `decoder` with these LoRA adapters active.

    Of experts, a position meets as many as the router sends it to. Attention is counted in the
    layers that have it, sliding windows as whole: kernels that skip masked pairs do less. The state
    updates of linear attention, which are small beside its projections, are left out.
    """
    config = decoder.config.get_text_config()
    layers = config.per_layer_config  # heads may be of other sizes in each (Gemma 4)

    def setting(*names: str, default: Any = None, of: Any = config) -> Any:
        return next((value for name in names if (value := getattr(of, name, None))), default)

    def head_sizes(layer: Any) -> tuple[int, int, int]:
        heads = setting("num_attention_heads", default=0, of=layer)
        width = setting("head_dim", default=config.hidden_size // max(heads, 1), of=layer)
        return heads, setting("num_key_value_heads", default=heads, of=layer), width

    def pair_of(layer: Any) -> float:
        heads, _, width = head_sizes(layer)
        sizes = (setting(name, default=width, of=layer) for name in ("qk_head_dim", "v_head_dim"))
        return heads * sum(sizes)

    experts = setting("num_experts", "num_local_experts", "n_routed_experts", default=1)
    share = min(1.0, setting("num_experts_per_tok", default=experts) / experts)
    linear, trained = weights_of(decoder, adapters, share)

    heads, keys, width = head_sizes(layers[0])
    kinds = setting(
        "layer_types", "layers_block_type", default=["attention"] * config.num_hidden_layers
    )
    attending = [
        kind == "hybrid" or ("attention" in kind and "linear" not in kind) for kind in kinds
    ]

    in_layers = [
        (n, p)
        for n, p in decoder.named_parameters()
        if re.search(r"\b\d+\.", n) and _is_matrix(n, p)
    ]
    last = _size(*in_layers[-1], share) if in_layers and in_layers[-1][1].requires_grad else 0.0
    return DecoderShape(
        linear=linear,
        trained=trained,
        first=config.hidden_size * width * (heads + 2 * keys),
        last=config.num_hidden_layers * last,
        pair=sum(
            pair_of(layer) for layer, attends in zip(layers, attending, strict=True) if attends
        ),
    )


def weights_of(
    module: nn.Module, adapters: tuple[str, ...] = (), expert_share: float = 1.0
) -> tuple[float, float]:
    """Return (multiply-adds of one position with all weights below `module`, with those that are
    trained).

    Embeddings are looked up, not multiplied with. Of what belongs to adapters, what belongs to
    `adapters` counts.
    """
    lookups: set[int] = set()
    packed: dict[int, int] = {}
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            lookups.update(map(id, part.parameters(recurse=False)))
        elif isinstance(part, QuantizedLinear):
            packed[id(part.weight)] = part.in_features * part.out_features
    linear = trained = 0.0
    for name, parameter in module.named_parameters():
        owner = re.search(r"(?:lora_A|lora_B|lora_embedding_B|modules_to_save)\.([^.]+)", name)
        is_idle = (
            owner[1] not in adapters if owner else ".original_module." in name and bool(adapters)
        )
        if is_idle or id(parameter) in lookups or not (owner or _is_matrix(name, parameter)):
            continue
        size = packed.get(id(parameter)) or _size(name, parameter, expert_share)
        linear += size
        trained += size * parameter.requires_grad
    return linear, trained


def active_adapters(decoder: nn.Module) -> tuple[str, ...]:
    """Return the LoRA adapters that a pass through `decoder` would use now."""
    layer = next((m for m in decoder.modules() if isinstance(m, BaseTunerLayer)), None)
    return () if layer is None or layer.disable_adapters else tuple(layer.active_adapters)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix of the model itself: no bias or norm, and not of an adapter."""
    # ZeRO-3 leaves an empty tensor on each rank
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and not re.search("lora_|modules_to_save|trainable_tokens", name)


def _size(name: str, parameter: nn.Parameter, expert_share: float) -> float:
    size = getattr(parameter, "ds_numel", parameter.numel())
    return size * (expert_share if ".experts." in name else 1.0)
