"""What is known of models and libraries without torch, beyond the faults of tests/faults."""

import json
import shutil
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from safetensors.torch import save_file

from rlhf import library_names
from rlhf.errors import UserError
from rlhf.library_names import adapter_kinds, is_model_type, optimizers, trl_options
from rlhf.model.files import (
    check_adapter,
    check_model,
    check_positions,
    check_template,
    stated_positions,
)
from rlhf.model.weight_files import check_factors, check_gguf, check_weights
from rlhf.options.offline import SFTRunConfig


@pytest.mark.parametrize("name", ["SFTConfig", "RewardConfig", "DPOConfig"])
def test_the_options_in_trls_source_are_those_of_its_classes(name):
    import trl

    # what begins with _ is no option
    expected = {option for option in get_type_hints(getattr(trl, name)) if option[0] != "_"}
    assert {option for option in trl_options(name) if option[0] != "_"} == expected


def test_the_other_names_in_sources_are_those_of_the_libraries():
    from peft import PeftType
    from transformers import CONFIG_MAPPING
    from transformers.training_args import OptimizerNames

    assert optimizers() == [member.value for member in OptimizerNames]
    assert adapter_kinds() == [member.value for member in PeftType]
    assert all(map(is_model_type, CONFIG_MAPPING.keys()))
    assert not is_model_type("lama")


def test_a_source_that_is_not_as_expected_says_nothing(monkeypatch):
    base, arguments = library_names.ABOVE
    # another base than expected, one that is not there, and one more above the last
    for above in ((arguments,), (base, (*arguments[:2], "Moved")), (base,)):
        monkeypatch.setattr(library_names, "ABOVE", above)
        assert trl_options("SFTConfig") == []
    monkeypatch.setattr(library_names, "MODEL_TYPES", ("moved.py",))
    assert is_model_type("lama")
    # the files are there, the names have gone elsewhere
    monkeypatch.setattr(library_names, "MODEL_TYPES", ("__init__.py", "file_utils.py"))
    assert is_model_type("lama")
    assert library_names._values("no_such_package", "names.py", "Names") == []


@pytest.mark.parametrize(
    ("members", "values"),
    [
        ('"""Kinds."""\n A = "a"\n B = "b"\n def show(self): ...', ["a", "b"]),
        # one that is not a plain text: nobody can say which there are
        ('A = "a"\n B = auto()', []),
        ('A = "a"\n B = 1', []),
        ('A = "a"\n B: str = "b"', []),
    ],
)
def test_an_enum_whose_members_are_not_texts_says_nothing(monkeypatch, members, values):
    source = f"class Kinds(Enum):\n {members}\n"
    monkeypatch.setattr(library_names, "_source", lambda package, file: source)
    # sources are kept once they are read
    monkeypatch.setattr(library_names, "_class", library_names._class.__wrapped__)
    assert library_names._values("package", "kinds.py", "Kinds") == values


def test_without_the_names_the_libraries_decide(monkeypatch, tmp_path, sft_path):
    monkeypatch.setattr(library_names, "_class", lambda package, file, name: None)
    SFTRunConfig(
        model_name_or_path="m",
        data=["d"],
        output_dir=str(tmp_path),
        optim="nope",
        trl={"packin": 1},
    ).validate()
    folder = Path(shutil.copytree(sft_path, tmp_path / "sft"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "NOPE"}))
    check_adapter(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m %}{% break %}{% endif %}{% endfor %}",
        "{% generation %}{{ messages }}{% endgeneration %}",
        {"not": "a template"},
    ],
)
def test_templates_of_transformers_are_left_to_it(tmp_path, template):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    check_template(str(tmp_path))


def test_a_template_in_the_settings_of_a_tokenizer_is_read_where_none_is_beside_them(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% if %}"}))
    with pytest.raises(UserError, match="no chat template could be loaded"):
        check_template(str(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    check_template(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 512}, 64),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default"}}, 512),
        # 2048 positions
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "linear", "factor": 4}}, None),
        ({"max_position_embeddings": 512, "alibi": True}, None),
        ({"n_positions": 512}, None),
    ],
)
def test_positions_are_known_where_config_json_states_them_plainly(tmp_path, settings, limit):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert stated_positions(str(tmp_path)) == limit


def test_a_prompt_and_a_response_may_fill_all_positions():
    check_positions("model", 512, 500, 12)
    check_positions("model", None, 10**6, 10**6)
    with pytest.raises(UserError, match=r"500 .* 13 = 513 tokens, but model has"):
        check_positions("model", 512, 500, 13)


def adapter(folder: Path, **tensors: torch.Tensor) -> str:
    """Write an adapter with tensors that are named by layer and factor: q_A is q.lora_A.weight."""
    named = {f"{name[:-2]}.lora_{name[-1]}.weight": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return str(folder)


def test_both_factors_of_a_layer_are_there_and_finite(tmp_path):
    one, bad = torch.ones(2), torch.tensor([1.0, float("inf")])
    check_factors(adapter(tmp_path, q_A=one, q_B=one * 2, v_A=one * 3, v_B=one * 4))
    with pytest.raises(UserError, match=r"v.lora_B.weight is there without its lora_A.weight"):
        check_factors(adapter(tmp_path, q_A=one, q_B=one * 2, v_B=one * 3))
    with pytest.raises(UserError, match=r"'q.lora_B.weight' holds numbers that are not finite"):
        check_factors(adapter(tmp_path, q_A=one, q_B=bad))
    # which numpy cannot read, and torch does later
    check_factors(adapter(tmp_path, q_A=one, q_B=bad.bfloat16()))


def test_a_tensor_may_be_called_as_a_wrapper_calls_all(tmp_path):
    save_file({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model.safetensors")
    check_weights(tmp_path)
    save_file({"module.a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"saved through a wrapper .* called module.a and so on"):
        check_weights(tmp_path)


def test_a_gguf_file_begins_with_a_whole_head(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    check_gguf(file)
    for content in (b"GGUF" + bytes(19), b"GGML" + bytes(20), b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match="does not begin as one"):
            check_gguf(file)


def test_the_base_of_an_adapter_may_be_a_folder_with_a_gguf_file(tmp_path, sft_path):
    folder = Path(shutil.copytree(sft_path, tmp_path / "sft"))
    # the folder that it was converted to is gone, and is made again from the file
    for name, base in (("adapter_config.json", "./gone"), ("rlhf.json", str(tmp_path / "base"))):
        settings = json.loads((folder / name).read_text()) | {"base_model_name_or_path": base}
        (folder / name).write_text(json.dumps(settings))
    (tmp_path / "base").mkdir()
    file = tmp_path / "base" / "m.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    check_model(str(folder))
    file.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="does not begin as one"):
        check_model(str(folder))
