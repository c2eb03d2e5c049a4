"""`rlhf export`: every form of a run, what its check says, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.cli import main as rlhf
from rlhf.errors import UserError
from rlhf.export import gguf_file
from rlhf.export.check import Answer, compare, differences, greedy_answers, summary
from rlhf.export.run import ExportConfig, check, export
from rlhf.model.loading import load_model, trainable_policy
from tests.conftest import random_adapter

pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")


def test_differences_of_an_answer_worked_by_hand():
    # two tokens of a vocabulary of two. First: p = (3/4, 1/4) against (1/2, 1/2):
    # KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812. Second: the same distribution, KL 0
    logits = torch.tensor([[3.0, 1.0], [1.0, 9.0]]).log()
    answer = Answer([0], torch.tensor([0, 1]), logits)
    others = torch.tensor([[1.0, 1.0], [1.0, 9.0]]).log()
    found = differences(answer, torch.tensor([1, 1]), others)
    # the argmax of equal logits is the first; by itself the other chose token 1
    assert found["tokens"] == 2 and found["equal"] == 2
    assert found["kl"] == pytest.approx(0.130812, abs=1e-6)
    assert found["first"] == 0
    # ln 3 - ln 1
    assert found["logit_gap"] == pytest.approx(math.log(3), abs=1e-6)

    same = differences(answer, torch.tensor([0, 1]), logits)
    assert same == {"tokens": 2, "equal": 2, "kl": 0.0, "first": None, "logit_gap": None}
    # a stop token that was lost: the other goes on where the policy has ended, or the other way round
    for own_tokens in ([0, 1, 1], [0]):
        longer = differences(answer, torch.tensor(own_tokens), logits)
        assert (longer["first"], longer["logit_gap"]) == (min(2, len(own_tokens)), None)

    total = summary([found, same, {**same, "tokens": 1, "equal": 0, "kl": 0.2}])
    assert total["tokens_equal"] == 4 / 5
    assert total["kl_per_token"] == pytest.approx((0.130812 + 0.2) / 5, abs=1e-6)
    assert total["answers_equal"] == 2
    assert total["differing"] == [{"prompt": 0, "token": 0, "logit_gap": found["logit_gap"]}]


def test_a_policy_is_equal_to_itself_and_not_to_its_base(sft_path):
    initial = load_model(sft_path)
    policy = trainable_policy(initial, None).eval()
    answers = greedy_answers(policy, initial.tokenizer, 3)
    # the logits of decoding with a cache are those of one pass
    same = compare(policy, initial.tokenizer, answers)
    assert same["same_ids"] and same["answers_equal"] == 3 and same["tokens_equal"] == 1.0
    assert abs(same["kl_per_token"]) < 1e-6
    with policy.disable_adapter():
        other = compare(policy, initial.tokenizer, answers)
    assert other["answers_equal"] == 0 and other["kl_per_token"] > 0.1


def test_merged_safetensors_are_the_policy(sft_path, tmp_path):
    rlhf(["export", sft_path, "--to", "merged", "--out", str(tmp_path / "m")])
    facts = json.loads((tmp_path / "m" / "export.json").read_text())
    assert facts["check"]["answers_equal"] == facts["check"]["prompts"] == 8
    assert abs(facts["check"]["kl_per_token"]) < 1e-6

    # without this project
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    initial = load_model(sft_path)
    policy = trainable_policy(initial, None).eval()
    ids = torch.tensor([tokenizer("where is my parcel?").input_ids])
    torch.testing.assert_close(model(ids).logits, policy(ids).logits, atol=1e-4, rtol=1e-4)
    assert tokenizer.chat_template == initial.tokenizer.chat_template


def test_merged_weights_have_the_dtype_of_the_base(base_path, tmp_path):
    """A base in bfloat16 stays one; what is rounded away shows as KL."""
    model = load_model(base_path).model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base_path).save_pretrained(tmp_path / "base")
    run = random_adapter(str(tmp_path / "base"), tmp_path / "run", seed=1)
    found = export(ExportConfig(run=run, to="merged"))
    assert found["form"] == "safetensors in bfloat16"
    weights = load_file(tmp_path / "run/export/merged/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert 1e-7 < found["check"]["kl_per_token"] < 0.05


@pytest.mark.parametrize(("to", "kind"), [("gguf", "f16"), ("gguf", "q8_0"), ("ollama", "f16")])
def test_gguf_is_the_policy(to, kind, sft_path, tmp_path, capsys):
    run = shutil.copytree(sft_path, tmp_path / "sft")
    facts = export(ExportConfig(run=str(run), to=to, type=kind))
    folder = run / "export" / f"{to}-{kind}"
    assert (folder / f"sft-{kind}.gguf").stat().st_size == facts["files"][f"sft-{kind}.gguf"]
    assert facts["check"]["same_ids"]
    assert facts["check"]["kl_per_token"] < {"f16": 1e-4, "q8_0": 0.1}[kind]
    if kind == "f16":
        # or the logits were nearly equal where the answers part
        assert all(place["logit_gap"] < 0.05 for place in facts["check"]["differing"])
    assert "greedy answers equal" in capsys.readouterr().out
    if to == "ollama":
        lines = (folder / "Modelfile").read_text().splitlines()
        assert lines[0] == "FROM ./sft-f16.gguf" and 'PARAMETER stop "<|im_end|>"' in lines

    # any program starts from it
    assert load_model(str(folder)).base_path == str(folder)


def test_a_row_of_eos_and_a_whole_head_are_exported(base_path, tmp_path):
    """What is trained beside LoRA: the row of EOS in tied embeddings, and a head of its own."""
    row = random_adapter(base_path, tmp_path / "row", seed=5, trainable_token_indices=[2])
    head = random_adapter(base_path, tmp_path / "head", seed=5, modules_to_save=["lm_head"])
    for run in (row, head):
        for to in ("merged", "gguf"):
            found = export(ExportConfig(run=run, to=to))["check"]
            assert found["kl_per_token"] < 1e-4, (run, to)
    assert "lm_head.weight" in load_file(tmp_path / "head/export/merged/model.safetensors")


def test_a_lora_folder_for_vllm_is_the_adapter(sft_path, base_path, tmp_path):
    facts = export(ExportConfig(run=sft_path, to="vllm", out=str(tmp_path / "lora")))
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(Path(base_path).resolve())
    assert facts["check"]["answers_equal"] == 8
    saved, own = (
        load_file(f"{p}/adapter_model.safetensors") for p in (tmp_path / "lora", sft_path)
    )
    assert saved.keys() == own.keys() and all(torch.equal(saved[n], own[n]) for n in own)
    # ranks that vLLM allows begin at 8
    assert "--max-lora-rank 8 --lora-modules" in facts["load"]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"use_dora": True}, "'use_dora'"),
        ({"rank_pattern": {"q_proj": 2}}, "'rank_pattern'"),
        ({"trainable_token_indices": [2]}, "trainable_token_indices"),
    ],
)
def test_what_vllm_would_pass_over_is_refused(settings, what, base_path, tmp_path):
    run = random_adapter(base_path, tmp_path / "run", seed=5, **settings)
    with pytest.raises(UserError, match=f"vLLM does not serve an adapter with .*{what}"):
        export(ExportConfig(run=run, to="vllm"))
    assert not list((tmp_path / "run" / "export").iterdir())


def test_an_export_is_whole_or_not_there(sft_path, tmp_path, monkeypatch):
    out = tmp_path / "out"
    config = ExportConfig(run=sft_path, to="gguf", out=str(out), check=2)
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "_add_tokenizer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(config)
    assert not list(tmp_path.iterdir())

    # rows in the wrong order: the check finds it
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "_layout", lambda name, weight, config: weight)
        with pytest.raises(UserError, match="this is an error of the export"):
            export(config)
    assert not out.exists() and (tmp_path / "out.partial" / "export.json").is_file()

    export(config)
    with pytest.raises(UserError, match="exists already"):
        export(config)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_tokenizer_and_numbers_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="other ids than the run's"):
        check({"same_ids": False, "kl_per_token": 0.0}, 0.1, tmp_path)
    with pytest.raises(UserError, match="KL to the run is nan"):
        check({"same_ids": True, "kl_per_token": math.nan}, 0.1, tmp_path)


def test_bad_requests_have_a_remedy(base_path, tmp_path):
    with pytest.raises(UserError, match=r"whole weights, no adapter. Take --to merged"):
        export(ExportConfig(run=base_path, to="vllm", out=str(tmp_path / "a")))
    with pytest.raises(UserError, match="Say where to write with --out"):
        ExportConfig(run="org/name", to="gguf").validate()
