"""What the files of a model say without torch, which takes seconds to import: its settings, the base
of an adapter, and faults that would end its loading.
"""

import contextlib
import json
import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

from rlhf.errors import UserError, did_you_mean, near_file
from rlhf.library_names import adapter_kinds, is_model_type
from rlhf.model.weight_files import check_factors, check_gguf, check_weights
from rlhf.values import coerce

# beside every adapter: what it was trained on, checked when it is loaded
IDENTITY_FILE = "rlhf.json"
# beside a reward model: what its scores are shifted by
REWARD_FILE = "reward.json"
# beside the adapter of a critic
VALUE_HEAD_FILE = "value_head.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
)
# a folder with one of these is a model already, whatever GGUF files lie beside them
MODEL_SETTINGS = ("config.json", "adapter_config.json")
WEIGHTS = ("*.safetensors", "*.bin")
# a name on the Hub; what has more parts is a folder
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# kinds of adapters that put vectors before the prompt, or between, or need more than the ids
NOT_USABLE = (
    *("PREFIX_TUNING", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT", "CARTRIDGE"),
    *("ADAPTION_PROMPT", "POLY", "XLORA"),
)


@contextlib.contextmanager
def loading(path: str, what: str, more: str = ""):
    """Turn whatever a library raises inside into a UserError that names the files at `path`."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path}: no {what} could be loaded ({first_line(error)}).{more}") from None


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises UserError if the file holds anything else, or only a
    part of one.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: cannot be read as JSON ({first_line(error)}). Save or copy it again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def read_identity(path: str | Path) -> dict[str, Any]:
    """Return the content of rlhf.json in a folder; empty where there is none."""
    file = Path(path) / IDENTITY_FILE
    return read_json(file) if file.is_file() else {}


def read_reward(path: str | Path) -> dict[str, Any]:
    """Return the content of reward.json; empty where there is none (of another program: bias 0,
    scale 1).
    """
    file = Path(path) / REWARD_FILE
    return read_json(file) if file.is_file() else {}


def reward_shift(path: str | Path) -> tuple[float, float]:
    """Return (scale, bias) from reward.json: score = raw * scale + bias; (1, 0) without the file.

    Raises UserError unless both are finite numbers, and the scale is not 0.
    """
    file, content = Path(path) / REWARD_FILE, read_reward(path)
    scale = coerce(content.get("scale", 1), float, f"{file}: 'scale'")
    bias = coerce(content.get("bias", 0), float, f"{file}: 'bias'")
    if not math.isfinite(scale * bias) or scale == 0:
        raise UserError(
            f"{file}: scale {scale} and bias {bias}, expected finite numbers and a scale other than 0"
        )
    return scale, bias


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    # torch's own message recommends running whatever the file holds
    if isinstance(error, pickle.UnpicklingError):
        return "a pickle that holds more than weights, and could run code; save the weights as safetensors"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def is_adapter(path: str | Path) -> bool:
    """Return whether this is a folder with an adapter."""
    return (Path(path) / "adapter_config.json").is_file()


def is_whole(path: str | Path) -> bool:
    """Return whether this is a folder with a model of whole weights."""
    return not is_adapter(path) and (Path(path) / "config.json").is_file()


def adapter_base(adapter_path: str) -> str:
    """Return the base that an adapter folder names.

    A relative path is tried from here, from the folder and from those above it, so that a run loads
    from any working directory. Where nothing is at the path in adapter_config.json, the one in
    rlhf.json is tried: the folder that a GGUF file was converted to may be deleted, and is made
    again from the file.
    """
    base = read_json(Path(adapter_path) / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{adapter_path}/adapter_config.json names no 'base_model_name_or_path'. Name the base there"
        )
    folder = Path(adapter_path).resolve()
    for named in (base, read_identity(adapter_path).get("base_model_name_or_path")):
        if named and Path(named).exists():
            return named
        for above in (folder, *folder.parents):
            if named and (above / named).exists():
                return str(above / named)
    return base


def gguf_file(path: str) -> Path | None:
    """Return the GGUF file that a model's path names, itself or as the only one in a folder; None for
    other models. Raises UserError where it is missing or one of several.
    """
    local = Path(path)
    if local.suffix == ".gguf":
        if not local.is_file():
            raise UserError(f"{path}: no such file{near_file(path)}")
        return local
    if not local.is_dir() or any((local / name).is_file() for name in MODEL_SETTINGS):
        return None
    files = sorted(local.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{path}: {len(files)} GGUF files ({names}). Name one: {files[0]}")
    return files[0] if files else None


def check_model(path: str) -> None:
    """Raise UserError where the model at `path` cannot be loaded, as far as its files tell: an
    adapter with its base, whole weights, a GGUF file, or a name on the Hub.
    """
    if file := gguf_file(path):
        check_gguf(file)
        return
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"{path}: is a file; a model is a folder, or a .gguf file")
    if not folder.is_dir():
        check_hub_name(path)
        return
    check_tokenizer(path)
    refuse_critic(path)
    if not is_adapter(path):
        _check_whole(path)
        return
    check_adapter(path)
    check_factors(path)
    base = adapter_base(path)
    if file := gguf_file(base):
        check_gguf(file)
    elif Path(base).is_dir():
        _check_whole(base)
    else:
        check_hub_name(base, f". It is the 'base_model_name_or_path' of {path}/adapter_config.json")


def check_adapter(path: str | Path) -> None:
    """Raise UserError for an adapter whose files are missing or cut short, that is a critic's, or of a
    kind which no program can use.
    """
    folder = Path(path)
    refuse_critic(path)
    kind = read_json(folder / "adapter_config.json").get("peft_type")
    kinds = adapter_kinds()
    if kinds and kind not in kinds:
        raise UserError(
            f"{path}/adapter_config.json: 'peft_type' is {kind}, a kind of adapter that PEFT does not have."
            f"{did_you_mean(str(kind), kinds)} If a newer version has it: pip install --upgrade peft"
        )
    if kind in NOT_USABLE:
        raise UserError(
            f"{path}/adapter_config.json: 'peft_type' is {kind}, which changes what a model reads and not its "
            "weights: roles on one base cannot hold it. Train a LoRA adapter instead (launch/sft.py)"
        )
    if not any((folder / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        raise UserError(
            f"{path}: adapter_config.json is there, adapter_model.safetensors is not. Copy it again"
        )
    check_weights(path)
    read_identity(path)


def refuse_critic(path: str | Path) -> None:
    """Raise UserError for a folder with the critic of a PPO run, an adapter or a decoder."""
    if (Path(path) / VALUE_HEAD_FILE).is_file():
        raise UserError(
            f"{path}: the critic of a PPO run, not a policy or reward model; the policy is in {Path(path).parent}"
        )


def require_policy(path: str) -> None:
    """Raise UserError if the adapter in a folder is a reward model's."""
    task = read_json(Path(path) / "adapter_config.json").get("task_type")
    if task == "SEQ_CLS" or (Path(path) / REWARD_FILE).is_file():
        raise UserError(
            f"{path}: a reward model, not a policy. Start from a base model, or from a run of launch/sft.py, "
            "launch/dpo.py or launch/ppo.py"
        )


def check_not_quantized(path: str) -> None:
    """Raise UserError for a folder of weights that another program has quantised."""
    file = Path(path) / "config.json"
    settings = read_json(file).get("quantization_config") if file.is_file() else None
    if settings:
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
        raise UserError(
            f"{path}: its weights are quantised already ({method}), which is not read here. Start from the weights "
            "that it was made from, with load_in_4bit or load_in_8bit"
        )


def _check_whole(path: str) -> None:
    """Raise UserError for a folder without settings or weights, or with damaged ones."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{path}: no model there: neither config.json nor adapter_config.json. Name the folder that holds one"
        )
    settings = read_json(folder / "config.json")
    kind = settings.get("model_type")
    if not kind:
        raise UserError(f"{folder / 'config.json'}: names no 'model_type'. Save the model again")
    # transformers itself says that code which comes with a model is not run
    if "auto_map" not in settings and not is_model_type(kind):
        raise UserError(
            f"{folder / 'config.json'}: 'model_type' is {kind}, which transformers does not have. If a newer version "
            "has it: pip install --upgrade transformers"
        )
    check_not_quantized(path)
    for index in sorted(folder.glob("*.index.json")):
        parts = read_json(index).get("weight_map", {})
        absent = sorted(name for name in set(parts.values()) if not (folder / name).is_file())
        if absent:
            raise UserError(f"{index}: names {absent[0]}, which is not there. Copy it again")
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        raise UserError(f"{path}: config.json is there, model.safetensors is not. Copy it again")
    check_weights(path)


def check_tokenizer(path: str) -> None:
    """Raise UserError for a folder without a tokenizer, or with a damaged one."""
    files = [Path(path) / name for name in TOKENIZER_FILES if (Path(path) / name).is_file()]
    # transformers would return an empty tokenizer without a word
    if not files:
        raise UserError(f"{path}: no tokenizer files; save the tokenizer beside the weights")
    for file in files:
        if file.suffix == ".json":
            read_json(file)
    check_template(path)


def check_template(path: str) -> None:
    """Raise UserError for a chat template that is no Jinja, as far as Jinja alone can tell."""
    import jinja2

    beside, settings = Path(path) / "chat_template.jinja", Path(path) / "tokenizer_config.json"
    with loading(path, "chat template"):
        if beside.is_file():
            template = beside.read_text(encoding="utf-8")
        else:
            template = read_json(settings).get("chat_template") if settings.is_file() else None
        if not isinstance(template, str):
            return
        try:
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        except jinja2.TemplateSyntaxError as error:
            # transformers adds tags
            if "unknown tag" not in str(error):
                raise


def stated_positions(path: str) -> int | None:
    """Return the tokens that the positions of a model reach, as its config.json says; None where it
    does not, or scales them, which transformers works out.
    """
    base = adapter_base(path) if is_adapter(path) else path
    file = Path(base) / "config.json"
    if not file.is_file():
        return None
    settings = read_json(file)
    settings = settings.get("text_config") or settings
    scalings = [settings.get(name) for name in ("rope_scaling", "rope_parameters", "alibi")]
    limit = settings.get("max_position_embeddings")
    is_scaled = any(scaling is True or "factor" in str(scaling) for scaling in scalings)
    return limit if isinstance(limit, int) and not is_scaled else None


def check_positions(
    path: str, limit: int | None, max_prompt_length: int, max_response_length: int
) -> None:
    """Raise UserError where a prompt and a response of the greatest lengths go beyond the positions
    of a model; None: nothing limits them.
    """
    asked = max_prompt_length + max_response_length
    if limit is not None and asked > limit:
        raise UserError(
            f"max_prompt_length {max_prompt_length} + max_response_length {max_response_length} = {asked} tokens, but "
            f"{path} has positions for {limit}. Lower one of them"
        )


def check_hub_name(name: str, more: str = "") -> None:
    """Raise UserError for what is no folder here and no model on the Hub, or in the cache of its
    files where the Hub is not asked.
    """
    is_here = "/" in name and Path(name).parent.is_dir()
    if is_here or name.startswith(("./", "../", "runs/")) or not HUB_NAME.fullmatch(name):
        raise UserError(f"{name}: no such folder{near_file(name)}{more}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, "config.json")
    except Exception as error:
        # the Hub has the name, without this file
        is_known = isinstance(error, EntryNotFoundError)
        if is_known and not isinstance(error, LocalEntryNotFoundError):
            return
        offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(
            f"{name}: neither a folder here nor a model that the Hub gave ({first_line(error)}).{offline}"
            f"{near_file(name).removeprefix('.')} Check the name, or fetch it where the Hub can be "
            f"reached: hf download {name}{more}"
        ) from None
