"""What a run is to read, looked at before torch is imported: a wrong path ends it within a second."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from rlhf.data import sources
from rlhf.data.load import load
from rlhf.data.records import Instruction, Preference, Prompt, Record
from rlhf.data.store import Store
from rlhf.errors import UserError
from rlhf.http_client import ask, vllm_service
from rlhf.model.files import (
    check_model,
    check_positions,
    is_adapter,
    require_policy,
    stated_positions,
)
from rlhf.options.shared import RunConfig

Split = Literal["train", "validation"]
# what the rows of `data` are to each program, and those of options that name more of them
KINDS: dict[str, type[Record]] = {
    "sft": Instruction,
    "reward": Preference,
    "dpo": Preference,
    "ppo": Prompt,
}
MORE: dict[str, tuple[type[Record], Split]] = {
    "eval_data": (Prompt, "validation"),
    "reference_data": (Instruction, "validation"),
    "ptx_data": (Instruction, "train"),
}
# bytes of files that are read whole for this; of larger ones the first rows
READ_WHOLE = 16 * 2**20
# seconds for a server to say which models it has, and attempts after the first
TIMEOUT, RETRIES = 30.0, 2


def check_inputs(program: str, config: RunConfig, *, is_resumed: bool = False) -> None:
    """Raise UserError where a run could not begin, as far as can be seen without torch: its start, its
    data, the server that samples for it.

    A resumed run reads its own frozen copy of a preference store.
    """
    path = config.model_name_or_path
    check_model(path)
    limit = stated_positions(path)
    check_positions(path, limit, config.max_prompt_length, config.max_response_length)
    if is_adapter(path):
        check_adapter_start(program, config)
    check_data(config.data, KINDS[program], "train", config, is_resumed=is_resumed)
    for name, (kind, split) in MORE.items():
        if given := getattr(config, name, None):
            check_data(given, kind, split, config, is_resumed=is_resumed)
    if url := getattr(config, "vllm_url", None):
        list_models(url)


def check_adapter_start(program: str, config: RunConfig) -> None:
    """Raise UserError where a program cannot start from the adapter that its options name."""
    path = config.model_name_or_path
    if program != "reward":
        require_policy(path)
    if not getattr(config, "use_peft", True):
        raise UserError(
            f"use_peft is false, but {path} is an adapter. Train its whole weights from a merged run: launch/sft.py "
            "--merge true"
        )


def check_data(
    names: list[str], kind: type[Record], split: Split, config: RunConfig, *, is_resumed: bool
) -> None:
    """Raise UserError for sources that cannot be read, or not as rows of `kind`, or that leave nothing
    in their split.
    """
    files = []
    for name in names:
        if sources.is_store(name):
            if not is_resumed:
                Store.open(sources.split_event(name)[0], readonly=True).close()
        elif sources.is_path(name):
            files.append(name)
        else:
            # of the Hub
            sources.first_rows(name, 1)
    if sum(map(_size, files)) > READ_WHOLE:
        for name in files:
            sources.first_rows(name)
        return
    # rows of other sources may join the groups of these, or fill the split
    is_all = len(files) == len(names)
    if files:
        load(
            files,
            kind,
            split=split if is_all else "validation",
            half=config.half,
            validation_fraction=config.validation_fraction,
            test_fraction=config.test_fraction,
            on_error=config.on_error,
            quiet=True,
        )


def list_models(url: str) -> None:
    """Raise UserError unless a vLLM server answers at `url`."""
    service = vllm_service(url, TIMEOUT, RETRIES)
    ask(replace(service, url=f"{service.url}/models"), None, "list its models")


def _size(name: str) -> int:
    path = Path(name).expanduser()
    return path.stat().st_size if path.is_file() else 0
