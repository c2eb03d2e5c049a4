"""Programs that start from a GGUF file, and from a run that did."""

import json
import os
import shutil

import pytest

from rlhf.cli import main as rlhf
from rlhf.files import cache_folder
from tests.launch.conftest import SMALL, door, flags_of

pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")


def test_sft_dpo_sampling_and_export_start_from_a_gguf_file(
    files, tokenizer, tmp_path, monkeypatch
):
    from tests.model.test_from_gguf import llama_model, write_gguf

    (tmp_path / "models").mkdir()
    write_gguf(tmp_path / "models" / "tiny.gguf", llama_model(tokenizer), tokenizer)
    monkeypatch.chdir(tmp_path)
    path = "models/tiny.gguf"
    sft = [*flags_of("sft", path, files["instructions"], "runs/sft"), *SMALL]
    door("sft")(sft)
    identity = json.loads((tmp_path / "runs/sft/rlhf.json").read_text())
    assert identity["base_model_name_or_path"] == path

    # elsewhere, and without what was converted
    shutil.rmtree(cache_folder())
    os.chdir("/")
    run = str(tmp_path / "runs" / "sft")
    door("dpo")([*flags_of("dpo", run, files["pairs"], tmp_path / "runs" / "dpo"), *SMALL])
    assert json.loads((tmp_path / "runs/dpo/result.json").read_text())["finished"]

    store = str(tmp_path / "pairs.db")
    few = ["--prompts", "2", "--max_prompt_length", "64", "--max_response_length", "8"]
    policies = ["--model_name_or_path", str(tmp_path / path), "--other", run]
    rlhf(["collect", "sample", *policies, "--data", files["pairs"], "--store", store, *few])
    assert (tmp_path / "pairs.db").is_file()

    # and back; the card names the file, not what it was converted to
    rlhf(["export", run, "--to", "gguf", "--check", "2"])
    card = (tmp_path / "runs/sft/export/gguf-f16/README.md").read_text()
    assert "# sft: sft of tiny.gguf" in card and "base_model:" not in card
