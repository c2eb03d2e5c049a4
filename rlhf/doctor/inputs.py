"""What a run's configuration names: models, data, a vLLM server, W&B. Nothing large is loaded."""

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf.data.sources import is_path, split_event
from rlhf.doctor.findings import Finding
from rlhf.errors import UserError, near_file
from rlhf.http_client import vllm_service
from rlhf.model.files import HUB_NAME, WEIGHTS, adapter_base, gguf_file, is_adapter
from rlhf.model.weight_files import check_weights
from rlhf.runs.wandb import has_key, server_url

SECONDS = 10
# options that name rows
DATA = ("data", "eval_data", "ptx_data", "reference_data")
# settings alone are a tokenizer of bytes, or what is left of a copy that was cut off
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def extras_of(options: dict[str, Any]) -> tuple[str, ...]:
    """Return the extras of this package that a configuration needs."""
    needed = []
    if options.get("report_to") == "wandb":
        needed.append("wandb")
    # bitsandbytes has the optimizers of 8 bits too
    if options.get("load_in_4bit") or "8bit" in str(options.get("optim", "")):
        needed.append("quant")
    if any(map(_is_gguf, model_names(options))):
        needed.append("gguf")
    return tuple(needed)


def model_names(options: dict[str, Any]) -> Iterator[str]:
    """Yield the models that a configuration loads: where training starts, and reward models."""
    if options.get("model_name_or_path"):
        yield str(options["model_name_or_path"])
    for entry in _scorers(options):
        # of a judge it is the name at its address
        if "model" in entry and "openai" not in entry:
            yield str(entry["model"])
        if isinstance(entry.get("ensemble"), list):
            yield from map(str, entry["ensemble"])


def _is_gguf(name: str) -> bool:
    try:
        return gguf_file(name) is not None
    # of a GGUF file that is missing, or one of several
    except UserError:
        return True


def _scorers(options: dict[str, Any]) -> list[dict[str, Any]]:
    return [*(options.get("reward") or []), *(options.get("eval_scorers") or [])]


def models(options: dict[str, Any]) -> Iterator[Finding]:
    """Look at each model, and at the base of each adapter."""
    names = list(dict.fromkeys(model_names(options)))
    # grows by the bases that adapters name
    for name in names:
        yield from check_model(name)
        if not is_adapter(name):
            continue
        # as the programs look for it
        try:
            base = adapter_base(name)
        except UserError as error:
            yield Finding("model", str(error), "make it again, or name its base there")
            continue
        if base not in names:
            names.append(base)


def check_model(name: str) -> Iterator[Finding]:
    """Look at one model: a folder, a GGUF file, or a name on the Hub."""
    path = Path(name).expanduser()
    if path.is_file():
        yield Finding("model", f"{name}: {path.stat().st_size / 2**30:.2f} GiB")
        return
    if not path.is_dir():
        if path.is_absolute() or not HUB_NAME.fullmatch(name) or near_file(path):
            remedy = f"make it first, or check the path{near_file(path)}"
            yield Finding("model", f"{name}: not there", remedy)
        else:
            yield hub_finding("model", name)
        return

    # heads of files alone are read
    try:
        file = gguf_file(str(path))
        check_weights(path)
    except UserError as error:
        yield Finding("model", str(error), "name another file, or copy or make it again")
        return
    if file:
        yield Finding("model", f"{name}: {file.stat().st_size / 2**30:.2f} GiB")
        return
    weights = list(chain.from_iterable(map(path.glob, WEIGHTS)))
    missing = []
    if not weights:
        missing.append("weights")
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        missing.append("config.json")
    if not any((path / file).is_file() for file in TOKENIZER):
        missing.append("a tokenizer")
    size = sum(file.stat().st_size for file in weights)
    if missing:
        remedy = "the run that makes it has not ended, or files were left behind when it was copied"
        yield Finding("model", f"{name}: {' and '.join(missing)} missing", remedy)
    else:
        yield Finding("model", f"{name}: {size / 2**30:.2f} GiB")


def scorers(options: dict[str, Any]) -> Iterator[Finding]:
    """Look whether the voice of each scorer is there, and the template and guide of a judge."""
    for entry in _scorers(options):
        judge = entry.get("judge") or entry
        files = [entry.get("voice")]
        # functions have options of any name
        if "openai" in judge:
            files += [judge.get("template"), judge.get("guide")]
        for name in filter(None, files):
            if Path(name).is_file():
                yield Finding("scorers", f"{name}: there")
            else:
                yield Finding("scorers", f"{name}: not there", f"check the path{near_file(name)}")


def data(options: dict[str, Any]) -> Iterator[Finding]:
    """Look whether each source is there; `rlhf data show` reads it."""
    sources = chain.from_iterable(map(_listed, map(options.get, DATA)))
    # each once, in order
    for source in dict.fromkeys(sources):
        name = split_event(source)[0]
        path = Path(name).expanduser()
        # as the programs decide between a file and a name on the Hub
        if not is_path(source) and not path.exists():
            yield hub_finding("data", name.partition("@")[0].partition(":")[0], "dataset")
        elif not path.exists():
            yield Finding("data", f"{source}: not there", f"check the path{near_file(path)}")
        elif path.is_file() and not path.stat().st_size:
            yield Finding("data", f"{source}: empty", "make it again: nothing was written to it")
        elif not os.access(path, os.R_OK):
            yield Finding("data", f"{source}: cannot be read", "change its permissions")
        else:
            yield Finding("data", f"{source}: there")


def hub_finding(kind: str, name: str, repo_type: str = "model") -> Finding:
    """Look for a model or data set in the local cache, else on the Hub."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    # one file stands for all: downloads are whole or none
    file = "config.json" if repo_type == "model" else "README.md"
    if isinstance(huggingface_hub.try_to_load_from_cache(name, file, repo_type=repo_type), str):
        return Finding(kind, f"{name}: in the Hub's local cache")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        of_type = "" if repo_type == "model" else f" --repo-type {repo_type}"
        remedy = (
            f"a path: make it first; a name on the Hub: unset HF_HUB_OFFLINE, or where there is a network: "
            f"hf download {name}{of_type}"
        )
        found = f"{name}: neither here nor in the Hub's cache, and HF_HUB_OFFLINE is set"
        return Finding(kind, found, remedy)
    try:
        api = huggingface_hub.HfApi()
        api.repo_info(name, repo_type=repo_type, timeout=SECONDS)
    except GatedRepoError:
        return Finding(kind, f"{name}: asks for an agreement", "accept it there; hf auth login")
    except RepositoryNotFoundError:
        remedy = "a path: make it first; a name: check it; where it is private: hf auth login"
        return Finding(kind, f"{name}: neither here nor on the Hub", remedy)
    except Exception as error:
        remedy = "check the network and HF_ENDPOINT, or download it elsewhere and give its folder"
        return Finding(kind, f"{name}: the Hub does not answer ({type(error).__name__})", remedy)
    return Finding(kind, f"{name}: on the Hub")


def vllm(options: dict[str, Any]) -> Iterator[Finding]:
    """Ask a vLLM server whether it is there."""
    url = options.get("vllm_url")
    if url:
        service = vllm_service(str(url), SECONDS, retries=0)
        yield _answers("vLLM", f"{service.url}/models", "start it (docs/models.md)")


def wandb(options: dict[str, Any]) -> Iterator[Finding]:
    """Look at W&B's package, key and server, where a run reports to it."""
    if options.get("report_to") != "wandb":
        return
    # whether its package is there is among the versions
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled", "dryrun"):
        yield Finding("W&B", f"WANDB_MODE is {mode}: nothing is sent")
        return
    if not has_key():
        remedy = "wandb login, or WANDB_MODE=offline to keep it here"
        yield Finding("W&B", "no key in WANDB_API_KEY or netrc: runs are kept offline", remedy)
        return
    remedy = "check the network and WANDB_BASE_URL, or WANDB_MODE=offline"
    yield _answers("W&B", server_url(), remedy)


def _answers(name: str, url: str, remedy: str) -> Finding:
    """Ask for a page; any answer shows that there is a server."""
    import requests

    host = urlsplit(url).netloc
    try:
        status = requests.get(url, timeout=SECONDS).status_code
    except requests.RequestException as error:
        return Finding(name, f"{host} does not answer ({type(error).__name__})", remedy)
    if status >= 500:
        return Finding(name, f"{host} answers {status}", remedy)
    return Finding(name, f"{host} answers")


def _listed(value: Any) -> list[str]:
    """Return the sources of an option, which YAML gives as a list or as one text with commas."""
    if value is None:
        return []
    if isinstance(value, list):
        return list(map(str, value))
    return str(value).split(",")
