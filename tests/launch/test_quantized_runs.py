"""The four programs on a base in 4 bits, 8-bit AdamW, and what cannot be done with them."""

import json
from pathlib import Path

import pytest

from rlhf.model.files import read_identity
from rlhf.model.loading import load_model
from rlhf.runs.tracking import read_metrics
from tests.launch.conftest import SMALL, differences, door, flags_of, ppo_flags

pytest.importorskip("bitsandbytes")

PACKED = ["--load_in_4bit", "true", "--optim", "adamw_8bit"]


@pytest.fixture(scope="module")
def packed_runs(base_path, files, tmp_path_factory) -> Path:
    """SFT, reward, DPO and PPO, one after the other, on a base in 4 bits."""
    folder = tmp_path_factory.mktemp("packed")

    def start(name, model, data, *more):
        door(name)([*flags_of(name, model, data, folder / name), *PACKED, *more])

    start("sft", base_path, files["instructions"], *SMALL, "--learning_rate", "1e-2")
    start("reward", folder / "sft", files["pairs"], *SMALL)
    start("dpo", folder / "sft", files["pairs"], *SMALL, "--learning_rate", "1e-2")
    start("ppo", folder / "sft", files["pairs"], *ppo_flags(folder))
    return folder


def test_the_programs_start_at_equal_policies_on_a_packed_base(packed_runs, base_path):
    rows = {name: read_metrics(packed_runs / name / "metrics.jsonl") for name in ("dpo", "ppo")}
    losses = [row["loss/total"] for row in rows["dpo"] if "loss/total" in row]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)  # ln 2: the policy is its reference
    first = next(row for row in rows["ppo"] if "ppo/ratio_first" in row)
    assert first["kl/sequence"] == 0.0
    assert first["ppo/ratio_first"] == pytest.approx(1.0, abs=1e-6)
    # the engine's numbers are the learner's
    assert first["rollout/logprob_gap"] < 1e-5

    # one base, whole or packed, has one name
    whole = load_model(base_path).fingerprint
    for name in ("sft", "reward", "dpo", "ppo"):
        identity = read_identity(packed_runs / name)
        assert (identity["quantization"], identity["base_fingerprint"]) == ("nf4", whole)
    moved = load_model(str(packed_runs / "ppo"))
    assert moved.quantization == "nf4" and moved.fingerprint == whole


def test_a_run_on_a_packed_base_resumes_to_the_last_bit(packed_runs, files, tmp_path):
    flags = [*flags_of("ppo", packed_runs / "sft", files["pairs"], tmp_path / "ppo"), *PACKED]
    flags += ppo_flags(packed_runs)
    flags[flags.index("--total_episodes") + 1] = "8"
    constant = ["--lr_scheduler_type", "constant", "--save_steps", "1"]
    door("ppo")([*flags, *constant])
    flags[flags.index("--total_episodes") + 1] = "16"
    door("ppo")([*flags, *constant])
    whole = [*flags, *constant]
    whole[whole.index("--output_dir") + 1] = str(tmp_path / "whole")
    door("ppo")(whole)
    found = differences(tmp_path / "ppo", tmp_path / "whole")
    # evaluated at step 1, where the first part ended
    assert [line for line in found if ".safetensors" in line] == []


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_8_bit_moments_of_the_other_programs_resume_to_the_last_bit(
    packed_runs, base_path, files, tmp_path, name
):
    start, kind = (base_path, "instructions") if name == "sft" else (packed_runs / "sft", "pairs")
    steps = ["--per_device_train_batch_size", "4", "--learning_rate", "1e-2"]
    steps += ["--lr_scheduler_type", "constant", "--lora_r", "64"]

    def run(folder, count):
        flags = [*flags_of(name, start, files[kind], tmp_path / folder), *PACKED, *steps]
        door(name)([*flags, "--max_steps", count])

    run("parts", "2")
    run("parts", "4")
    run("whole", "4")
    found = differences(tmp_path / "parts", tmp_path / "whole")
    assert [line for line in found if ".safetensors" in line] == []


def refused(capsys, name, *flags) -> str:
    with pytest.raises(SystemExit) as ended:
        door(name)(list(flags))
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--load_in_4bit", "true", "--load_in_8bit", "true"], "are both true"),
        (["--load_in_8bit", "true", "--use_peft", "false"], "its whole weights cannot be trained"),
        (["--load_in_4bit", "true", "--dtype", "float64"], "does not go with dtype float64"),
        (["--optim", "adamw_8bit", "--dtype", "float64"], "does not go with dtype float64"),
    ],
)
def test_what_a_packed_base_cannot_be_is_refused(capsys, base_path, files, tmp_path, flags, said):
    start = flags_of("sft", base_path, files["instructions"], tmp_path / "run")
    assert said in refused(capsys, "sft", *start, *flags)
    assert not (tmp_path / "run").exists()


def test_without_bitsandbytes_4_bits_are_refused_and_8_are_not(
    capsys, monkeypatch, base_path, files, tmp_path
):
    monkeypatch.setattr("rlhf.options.shared.find_spec", lambda name: None)
    start = flags_of("sft", base_path, files["instructions"], tmp_path / "run")
    for flags in (["--load_in_4bit", "true"], ["--optim", "adamw_8bit"]):
        said = refused(capsys, "sft", *start, *flags)
        assert "needs bitsandbytes" in said and "pip install 'rlhf[quant]'" in said
    door("sft")([*start, *SMALL, "--load_in_8bit", "true"])
    assert read_identity(tmp_path / "run")["quantization"] == "int8"


def test_weights_that_are_quantised_already_are_refused(capsys, files, base_path, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in Path(base_path).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    start = flags_of("sft", folder, files["instructions"], tmp_path / "run")
    said = refused(capsys, "sft", *start)
    assert "quantised already (gptq)" in said and "load_in_4bit" in said


def test_an_adapter_of_a_packed_base_goes_on_with_a_whole_one_and_says_so(
    capsys, packed_runs, files, tmp_path
):
    sft = packed_runs / "sft"
    door("dpo")([*flags_of("dpo", sft, files["pairs"], tmp_path / "dpo"), *SMALL])
    assert (
        "trained on a base that was kept in 4 bits, which is kept whole" in capsys.readouterr().err
    )
    assert "quantization" not in read_identity(tmp_path / "dpo")


def test_a_merged_run_is_what_was_trained_rounding_included(
    packed_runs, base_path, files, tmp_path
):
    import torch

    from rlhf.model.loading import trainable_policy

    start = flags_of("sft", base_path, files["instructions"], tmp_path / "merged")
    same = ["--load_in_4bit", "true", "--learning_rate", "1e-2", *SMALL]
    door("sft")([*start, *same, "--merge", "true"])
    start[start.index("--output_dir") + 1] = str(tmp_path / "adapter")
    door("sft")([*start, *same])
    ids = torch.arange(3, 20)[None]
    merged = load_model(str(tmp_path / "merged"))
    policy = trainable_policy(load_model(str(tmp_path / "adapter")), None)
    assert merged.quantization is None
    with torch.no_grad():
        expected = policy(ids).logits
        torch.testing.assert_close(merged.model(ids).logits, expected, atol=1e-4, rtol=0)
        # the whole base under the same adapter is another policy
        other = trainable_policy(load_model(str(tmp_path / "adapter"), quantization=None), None)
        assert (other(ids).logits - expected).abs().max() > 0.1


def test_runs_on_packed_and_whole_bases_are_compared_each_on_its_own(
    packed_runs, runs, files, tmp_path
):
    import torch

    from rlhf.compare.runs import load_policies

    paths = [str(folder / name) for folder in (packed_runs, runs) for name in ("sft", "dpo")]
    policies = load_policies(paths, torch.device("cpu"), 64, 12)
    models = [model for model, _ in policies]
    assert models[0] is models[1] and models[2] is models[3] and models[0] is not models[2]


@pytest.mark.parametrize("to", ["merged", "vllm"])
def test_a_run_on_a_packed_base_is_exported_as_it_computes(packed_runs, tmp_path, to):
    from rlhf.export.run import ExportConfig, export

    facts = export(ExportConfig(run=str(packed_runs / "dpo"), to=to, out=str(tmp_path / to)))
    assert facts["check"]["kl_per_token"] < 1e-6
