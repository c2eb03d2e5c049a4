"""`rlhf plan`: recipes, models that are not there, what makes a run fit."""

import json
import re
from pathlib import Path

import pytest
import yaml

from rlhf.cli import main
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs" / "8b").glob("*.yaml"))
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256,
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN = LLAMA | {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152_064,
    "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4,
}  # fmt: skip


def write_shape(folder: Path, shape: dict) -> str:
    (folder / "config.json").write_text(json.dumps(shape))
    return str(folder)


def plan(capsys, *words: str) -> dict:
    main(["plan", *map(str, words), "--json", "true"])
    return json.loads(capsys.readouterr().out)


def total(found: dict) -> float:
    return max(sum(phase["parts"].values()) for phase in found["phases"])


def shape_of(recipe: Path) -> dict:
    return QWEN if "Qwen" in yaml.safe_load(recipe.read_text())["model_name_or_path"] else LLAMA


def flags_of(recipe: Path) -> list[str]:
    """The flags that the recipe's head plans it with, but for its model."""
    head = " ".join(recipe.read_text().split("\n\n")[0].replace("#", " ").split())
    planned = re.search(rf"rlhf plan {recipe.relative_to(ROOT)} ([^)]*)\)", head)[1]
    return planned.partition(" --model")[0].split()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_planned_from_a_config_alone(recipe, tmp_path, capsys):
    shape = shape_of(recipe) | {"num_hidden_layers": 2}
    model = write_shape(tmp_path, shape)
    found = plan(capsys, recipe, "--model", model, *flags_of(recipe))
    assert not found["remedy"]
    assert sum(part["flops"] for part in found["work"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit(recipe, tmp_path, capsys):
    model = write_shape(tmp_path, shape_of(recipe))
    found = plan(capsys, recipe, "--model", model, *flags_of(recipe))
    assert total(found) <= found["usable"], found["remedy"]


def test_what_does_not_fit_gets_the_one_option_that_makes_it_fit(tmp_path, capsys):
    model = write_shape(tmp_path, LLAMA | {"num_hidden_layers": 2})
    file = tmp_path / "sft.yaml"
    options = {"model_name_or_path": "x/y", "data": ["a/b"], "output_dir": str(tmp_path / "run")}
    options |= {"eval_prompts": 0, "max_steps": 5, "per_device_train_batch_size": 8}
    file.write_text(yaml.safe_dump(options))
    whole = plan(capsys, file, "--model", model, "--launched", "false")
    learn = next(phase for phase in whole["phases"] if phase["name"] == "learn")
    # the activations of the two layers are what is too much
    room = (total(whole) - 0.4 * learn["parts"]["activations"]) * 1.03 + 1e9
    found = plan(
        capsys, file, "--model", model, "--launched", "false", "--gpu_memory", f"{room / 1e9}GB"
    )
    assert found["remedy"].startswith("It fits with gradient_checkpointing: true")


def test_the_tables_say_whether_it_fits_and_what_it_costs(tmp_path, capsys):
    model = write_shape(tmp_path, LLAMA | {"num_hidden_layers": 1})
    given = ["--model", model, "--gpus", "8", "--price", "2.5", "--gpu", "A100"]
    main(["plan", str(ROOT / "configs" / "8b" / "ppo_8gpus.yaml"), *given])
    text = capsys.readouterr().out
    for words in ("KV cache", "by ZeRO stage", "cost", "fits: ", "assumed: 30% of 312 TFLOP/s"):
        assert words in text
    assert "runs/8b/sft is not there: taken for an adapter" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["configs/none.yaml"], "no such file"),
        (["configs/sft.yaml", "--gpu", "H1000"], "Did you mean 'h100'?"),
        (["configs/sft.yaml", "--gpu_memory", "lots"], "is no size of memory"),
        (["configs/sft.yaml"], "no config.json could be read there or on the Hub"),
        (
            ["configs/sft.yaml", "--options", "{lora_q: 3}"],
            "unknown option 'lora_q'. Did you mean 'lora_r'? All options: deepspeed launch/sft.py --help",
        ),
        (
            ["configs/experiments/real.yaml"],
            "found the file of an experiment (rlhf experiment run)",
        ),
        (["configs/voices/shop.yaml"], "found the file of a voice (rlhf voice check)"),
    ],
)
def test_what_is_wrong_is_said(words, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_plan_is_not_made_for_some_program(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("model_name_or_path: m\ndata: x\noutput_dir: y\nhalf: a\nnum_train_epochs: 1\n")
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(file)])
    assert ended.value.code == 2
    assert f"{file}: which program is it for? --program sft or reward or dpo" in (
        capsys.readouterr().err
    )
