"""LoRA adapters: settings, loading them onto a base, several on one base, and what of the output
head they change.
"""

import contextlib
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import UserError, did_you_mean
from rlhf.model.files import check_adapter, first_line, loading
from rlhf.model.quantized import is_quantized
from rlhf.model.weights import base_weights, check_finite, plain_name
from rlhf.ranks.deepspeed_backend import known_to_peft
from rlhf.ranks.divided import is_divided, shape_of, whole

# LoRA settings that change the base itself, or that depend on the prompt: such an adapter cannot
# share a base
NOT_SHARED = ("layer_replication", "kasa_config", "arrow_config", "alora_invocation_tokens")
# initial values that are taken out of the base's weights
REWRITES_BASE = re.compile("pissa|corda|olora|loftq|lora_ga")
# rows of an output head that are the same as an untrained one, which are at least so many, to this
# part of its norm; SmolLM2's EOS row, which was trained, is 0.14 away from its nearest
UNTRAINED_ALIKE, SAME_ROW = 10, 0.02
# rows of a head that are compared together
PORTION = 8192
# model types whose out_proj PEFT refuses
MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
MERGE = "Merge the adapter (merge_and_unload and save_pretrained of PEFT) and start from the merged model"


def lora_config(
    task_type: str = "CAUSAL_LM",
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    targets="all-linear",
):
    """Return the LoRA settings of a new adapter. `targets` is "all-linear" or a list of module
    names.
    """
    from peft import LoraConfig

    if targets == ["all-linear"]:
        targets = "all-linear"
    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type=task_type
    )


def check_targets(model: nn.Module, targets: list[str]) -> None:
    """Raise UserError unless each name is that of a layer that LoRA can adapt, or "all-linear"
    stands alone.

    PEFT takes a name for the end of a layer's path (q_proj, layers.0.self_attn.q_proj), and says
    nothing of one that matches none as long as another does.
    """
    from transformers.pytorch_utils import Conv1D

    if targets == ["all-linear"]:
        return
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    layers = [f".{name}" for name, module in model.named_modules() if isinstance(module, kinds)]

    # TRL refuses an adapter on the output head
    refused = {f".{head_name(model)}".rpartition(".")[2], *(not_adaptable(model) or [])}
    known = sorted({layer.rpartition(".")[2] for layer in layers} - refused)
    expected = f"Layers of this model: {', '.join(known)}; or all-linear alone"
    if not targets:
        raise UserError(f"'lora_target_modules' is empty. {expected}")
    for target in targets:
        if not any(layer.endswith(f".{target}") for layer in layers):
            hint = did_you_mean(target, known)
            raise UserError(
                f"'lora_target_modules': no layer is called '{target}'.{hint} {expected}"
            )


def adapter_settings(path: str) -> Any:
    """Return the PEFT settings of the adapter in a folder, ready to be put on a base beside others.

    Raises UserError when there are none, when they cannot be read, when the adapter is a critic's,
    and for settings that PEFT cannot keep apart where several adapters share a base.
    """
    from peft import LoraConfig, PeftConfig

    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{path}: no adapter (adapter_config.json) there")
    check_adapter(path)
    with loading(str(file), "settings of an adapter"):
        config = PeftConfig.from_pretrained(path)
    config.inference_mode = False
    if not isinstance(config, LoraConfig):
        return config

    if setting := _changing_the_base(config, path):
        raise UserError(
            f"{file}: '{setting}: {getattr(config, setting)}' changes the base, which other adapters share, so that "
            f"PEFT cannot hold copies of it. {MERGE}"
        )
    # where it asked for biases, the base has none: they are not among the weights
    config.bias = "none"
    return config


def _changing_the_base(config: Any, path: str) -> str | None:
    """Return the setting by which a LoRA adapter in a folder changes its base, or None."""
    for name in NOT_SHARED:
        if getattr(config, name, None):
            return name
    if isinstance(config.init_lora_weights, str) and REWRITES_BASE.match(config.init_lora_weights):
        return "init_lora_weights"
    if config.bias != "none":
        names = adapter_weights(path)
        if any(name.endswith(".bias") and "lora_" not in name for name in names):
            return "bias"
    return None


def adapter_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of the adapter in a folder by the names they were saved under.

    Raises UserError if they are missing, cut off or not finite.
    """
    from peft.utils import load_peft_weights

    check_adapter(path)
    with loading(str(path), "adapter weights"):
        weights = load_peft_weights(str(path), device="cpu")
    check_finite(weights.items(), str(path))
    return weights


def add_adapter(
    model: nn.Module, config: Any, name: str = "default", where: str = "lora"
) -> nn.Module:
    """Put a new adapter on a model, which becomes a PeftModel unless it is one. Raises UserError
    where PEFT refuses.
    """
    from peft import PeftModel, get_peft_model
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    from rlhf.model.lora import fuse

    if getattr(config, "use_dora", False) and is_quantized(model):
        raise UserError(
            f"{where}: DoRA reads the weights of the base, which load_in_4bit and load_in_8bit keep packed. Leave "
            "them out"
        )
    # PEFT writes into it what it finds in this model
    config = copy.deepcopy(config)
    config.base_model_name_or_path = model.config.name_or_path
    if getattr(config, "target_modules", None) == "all-linear":
        config.exclude_modules = config.exclude_modules or not_adaptable(model)
    try:
        with _whole_for_peft(model, config):
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{where}: PEFT cannot put this adapter on the model ({first_line(error)})"
        ) from None

    fuse(model)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and "adapter_state_dict" not in vars(
            module
        ):
            for method in ("adapter_state_dict", "adapter_state_dict_load_map"):
                setattr(module, method, _for_held_adapters(module, getattr(module, method)))
        # TRL reads a bias off a head; PEFT passes on the weight alone
        if isinstance(module, TrainableTokensWrapper):
            module.bias = None
    return model


def _whole_for_peft(model: nn.Module, config: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context in which PEFT can read the base's weights that a new adapter starts from."""
    if not any(map(is_divided, model.parameters())):
        return contextlib.nullcontext()
    if getattr(config, "use_dora", False):
        return known_to_peft()
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    # of which it copies rows; PEFT gathers what it copies whole (modules_to_save) by itself
    embeddings = (causal.get_input_embeddings(), causal.get_output_embeddings())
    # a model that scores has no output embeddings
    rows = filter(None, embeddings)
    is_copied = getattr(config, "trainable_token_indices", None)
    return whole({weight for module in rows for weight in module.parameters() if is_copied})


def not_adaptable(model: nn.Module) -> list[str] | None:
    """Return the names of linear layers that LoRA cannot adapt, or None.

    They are routers that return more than a tensor (Llama 4, PhiMoE), and layers whose weights
    Mamba's kernels read without calling them.
    """
    names = {"out_proj"} if model.config.model_type in MAMBA else set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).__name__.endswith("Router"):
            names.add(name.rpartition(".")[2])
    return sorted(names) or None


def _for_held_adapters(wrapper: nn.Module, method: Callable) -> Callable:
    """Return `method` of PEFT's wrapper around a module (modules_to_save, single tokens), with no
    result for an adapter that the wrapper does not hold.

    PEFT calls it with the name of every adapter, and in saving with a state dict: the one that
    ZeRO-3 gathers lacks frozen adapters, such as a reference, which then have no result either.
    """

    def of_adapter(name: str, *states: dict[str, Tensor]) -> dict[str, Any]:
        if name not in wrapper._adapters:
            return {}
        for state in states:
            if not any(name in key.split(".") for key in state):
                return {}
        return method(name, *states)

    return of_adapter


def load_adapter(
    model: nn.Module,
    path: str,
    config: Any = None,
    name: str = "default",
    leave: tuple[str, ...] = (),
) -> nn.Module:
    """Put the adapter in a folder on a model: LoRA, modules_to_save, embeddings, single tokens.
    Return the PeftModel.

    config: its settings, where they differ from those of the folder. leave: modules of the base
    whose weights are not wanted, such as the output head under a scalar head. Raises UserError
    unless the weights of the folder and of the adapter correspond; copies of the base's own
    weights, which PEFT saves beside an adapter of the embeddings, are compared with the base.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = adapter_weights(path)
    model = add_adapter(model, config or adapter_settings(path), name, path)
    if reason := _not_copied(model, name):
        raise UserError(
            f"{path}/adapter_config.json: {reason}, of which PEFT makes no copies. {MERGE}"
        )

    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    unwanted = tuple(f"base_model.model.{module}." for module in leave)
    given, expected = (
        {n: w for n, w in weights.items() if not n.startswith(unwanted)} for weights in (saved, own)
    )
    faults = _misfits(given, expected, base_weights(model))
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{path}: its weights do not fit this base: {'; '.join(faults[:3])}{more}")

    # what is not wanted stays as it is
    own.update({weight: given[weight] for weight in expected})
    set_peft_model_state_dict(model, own, adapter_name=name)
    return model


def _misfits(
    given: dict[str, Tensor], expected: dict[str, Tensor], base: dict[str, Tensor]
) -> list[str]:
    """Return how the `given` weights of an adapter differ in names and shapes from the `expected`
    ones.
    """
    faults = []
    for name, weight in given.items():
        if name in expected:
            continue
        copied = base.get(plain_name(name))
        if copied is None or shape_of(copied) != weight.shape:
            faults.append(f"no place for {name}")
            continue
        with whole([copied]):
            is_same = torch.equal(copied.to("cpu", torch.bfloat16), weight.to(torch.bfloat16))
        if not is_same:
            faults.append(
                f"{name} differs from the base's, without being among its modules_to_save"
            )
    for name, weight in expected.items():
        if name not in given:
            faults.append(f"{name} is missing")
        elif given[name].shape != weight.shape:
            faults.append(f"{name} is {tuple(given[name].shape)}, expected {tuple(weight.shape)}")
    return faults


def _not_copied(model: nn.Module, name: str) -> str | None:
    """Return what adapter `name` holds on this base that PEFT does not repeat for a second adapter,
    or None.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    config = model.peft_config[name]
    if getattr(config, "modules_to_tie", None) or getattr(config, "target_modules_to_tie", None):
        return "'ensure_weight_tying: true' ties the output head to an adapter of the embeddings"
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrappers = sum(
                isinstance(inner, AuxiliaryTrainingWrapper) for inner in module.modules()
            )
            # the module itself is one
            if wrappers > 1:
                return "'trainable_token_indices' and 'modules_to_save' meet in one module"
    return None


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return all that the LoRA adapter `name` holds: parameters by their names less that of the
    adapter.
    """
    pattern = re.compile(rf"\.(lora_\w+|modules_to_save|trainable_tokens_delta)\.{name}(?=\.|$)")
    return {pattern.sub(r".\1", n): p for n, p in model.named_parameters() if pattern.search(n)}


def frozen_copy(model: nn.Module, source: str, name: str) -> None:
    """Add adapter `name` to a PeftModel as a frozen copy of another, for example as the reference
    of its training.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    add_adapter(model, model.peft_config[source], name)
    weights = get_peft_model_state_dict(model, adapter_name=source, save_embedding_layers=False)
    set_peft_model_state_dict(model, weights, adapter_name=name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in trained)


@contextlib.contextmanager
def use_adapter(model: nn.Module, name: str | None):
    """Run with adapter `name` active (None: the bare base), then restore the active one. For
    evaluation only.
    """
    if name is None:
        with (
            model.disable_adapter()
            if hasattr(model, "disable_adapter")
            else contextlib.nullcontext()
        ):
            yield
        return
    before = model.active_adapter
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)
        # set_adapter freezes the others
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in trainable)


def without_head(config: Any, head: str) -> Any:
    """Return the settings of a LoRA adapter for a role without an output head: less what changes
    the head, the module of that name.
    """
    config = copy.deepcopy(config)
    if config.modules_to_save:
        config.modules_to_save = [m for m in config.modules_to_save if not head.endswith(m)] or None
    if isinstance(config.trainable_token_indices, dict):
        tokens = {
            m: ids for m, ids in config.trainable_token_indices.items() if not head.endswith(m)
        }
        config.trainable_token_indices = tokens or None
    return config


def head_name(causal: nn.Module) -> str:
    """Return the name of a causal model's output head within it."""
    return next(
        name for name, module in causal.named_modules() if module is causal.get_output_embeddings()
    )


def changes_head(config: Any, causal: nn.Module) -> bool:
    """Return whether a LoRA adapter with these settings changes the output head or the embeddings
    it is tied to.
    """
    # a list stands for rows of the embeddings
    if isinstance(config.trainable_token_indices, list):
        return True
    names = [head_name(causal)]
    if causal.config.tie_word_embeddings:
        names += [
            name
            for name, module in causal.named_modules()
            if module is causal.get_input_embeddings()
        ]

    changed = [*(config.modules_to_save or []), *(config.trainable_token_indices or [])]
    if not isinstance(config.target_modules, str):
        changed += config.target_modules
    return any(name.endswith(tuple(changed)) for name in names)


def token_rows(causal: nn.Module, token: int) -> list[int] | dict[str, list[int]] | None:
    """Return PEFT's `trainable_token_indices` for a token's row of the output head; None for a head
    with a bias.
    """
    head = causal.get_output_embeddings()
    if head.bias is not None:
        return None
    tied = head.weight is causal.get_input_embeddings().weight
    return [token] if tied else {head_name(causal): [token]}


def never_trained(rows: Tensor, token: int) -> str:
    """Return what in an output head's rows (V, H) shows that a token's row was never trained, or "".

    Either at least ten other rows are the same, or the row is the mean of all: then no hidden state
    gives the token more than 1/11 or 1/V of the probability (Jensen's inequality, for the mean).
    Rows that were not in any text keep together to 1e-4 of their norm, since the loss has moved all
    of them alike; a cosine does not tell them from one that was trained a little.
    """
    row = rows[token].detach().float()
    if not row.any():
        return "its row is zero"
    mean = rows.detach().mean(0, dtype=torch.float32)
    apart, spread = [], []
    # in portions: a head in float32 once more may be large
    for part in rows.detach().split(PORTION):
        apart.append((part.float() - row).norm(dim=1))
        spread.append((part.float() - mean).norm(dim=1))
    same = int((torch.cat(apart) <= SAME_ROW * row.norm()).sum()) - 1
    if same >= UNTRAINED_ALIKE:
        return f"its row is that of {same} others"
    if (row - mean).norm() <= SAME_ROW * torch.cat(spread).median():
        return "its row is the mean of all"
    return ""
