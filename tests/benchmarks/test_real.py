"""The driver of `make real`: its plan by hand, its rows, and the whole of it on a tiny model."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.real import page, pipeline, plan
from rlhf.ranks import distributed
from rlhf.sandbox import packaged


def test_weights_of_the_model_are_those_of_its_matrices():
    # a layer: q and o 576 x 576, k and v 576 x 192, gate, up and down 576 x 1536
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    # rank 16: 16 (inputs + outputs) of each
    adapter = 16 * (2 * 1152 + 2 * 768 + 3 * 2112)
    # a multiply-add is two FLOPs; of 10 positions 4 have logits
    passed = 2 * (10 * 30 * (layer + adapter) + 4 * 576 * 49152)
    assert plan.forward(10, 4, rank=16) == passed


def test_flops_of_the_plan_are_those_that_the_programs_count():
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf.runs.budget import active_adapters, decoder_shape

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    decoder = model.get_base_model().model
    shape = decoder_shape(decoder, active_adapters(decoder))
    assert plan.forward(10, 0, rank=16) == shape.forward(10, 0)
    # embeddings are frozen: no gradient flows to what q, k and v of the first layer read
    back = shape.backward(10, 0, to_embeddings=False, fused=True, recomputed=False)
    # the programs count the product with A of these three all the same
    products_with_a = 2 * 10 * 3 * 16 * 576
    counted = shape.forward(10, 0) + back
    assert plan.learning(10, 0, rank=16) + products_with_a == counted


def test_the_plan_keeps_within_eight_hours_with_forty_updates_of_ppo():
    stages = {stage.name: stage for stage in plan.planned()}
    assert sum(plan.hours(stage.flops) for stage in stages.values()) <= 8
    updates, pairs = (int(stages[name].what.split()[0]) for name in ("PPO", "DPO"))
    assert updates >= 40
    assert pairs >= 1000
    # what a run of either method spends on training, pairs and reward model is the budget, 3.9e14
    shared = stages["pairs"].flops + stages["reward model"].flops
    per_seed = (stages["PPO"].flops + shared) / 3
    assert per_seed == pytest.approx(3.9e14, rel=0.02)
    assert (stages["DPO"].flops + stages["pairs"].flops) / 3 == pytest.approx(3.9e14)


def test_hours_by_hand():
    # an hour of two cores
    assert plan.hours(2 * 120e9 * 3600) == 1
    assert plan.hours(2 * 40e9 * 3600, "float32") == 1


def test_an_update_of_ppo_by_hand(monkeypatch):
    monkeypatch.setattr(plan, "forward", lambda positions, head, rank: positions + head)
    monkeypatch.setattr(plan, "learning", lambda positions, head, rank: 100 * positions)
    monkeypatch.setattr(plan, "QUESTION", 3)
    monkeypatch.setattr(plan, "ANSWER", 2)
    # 4 answers of 5 positions: sampling and reference 20 + 8 each, reward 20, two epochs 2000 each
    options = {"rollout_batch_size": 4, "num_ppo_epochs": 2}
    assert plan.ppo_update_flops(options, rank=1) == 28 + 28 + 20 + 4000


def test_runs_of_dpo_by_hand(monkeypatch):
    # a pair of 10 positions with 4 to predict: 1000 to learn, 14 for the reference
    monkeypatch.setattr(plan, "dpo_pair_flops", lambda rank: (1000, 14))
    # 10 references once, and (10140 - 140) / 1000 = 10 pairs, two passes over 5
    stage = plan.dpo_stage(10140, 5, references=10, seeds=2, rank=1)
    assert stage.what == "10 pairs a seed, 2.0 epochs" and stage.flops == 2 * 10140
    # less than a pass: 3042 / 1014 = 3
    assert plan.dpo_stage(3042, 5, references=10, seeds=2, rank=1).what.startswith("3 pairs")


def test_without_bfloat16_all_is_float32_and_what_was_begun_keeps_its_dtype(tmp_path, monkeypatch):
    experiment = small_experiment(tmp_path)
    for multiplies, words in ((True, []), (False, ["--dtype", "float32"])):
        monkeypatch.setattr(
            distributed, "multiplies_bfloat16", lambda device, is_so=multiplies: is_so
        )
        assert pipeline.dtype_options(experiment) == words
    begun = tmp_path / "real"
    begun.mkdir()
    (begun / "experiment.yaml").write_text("dtype: bfloat16\n")
    assert pipeline.dtype_options(experiment) == ["--dtype", "bfloat16"]


def small_experiment(folder: Path) -> Path:
    """Write the experiment of make real-quick with a few steps of few tokens; return its file."""
    options = yaml.safe_load(pipeline.QUICK_EXPERIMENT.read_text())
    sample = {"prompts": 12, "samples_per_prompt": 2}
    # every annotator's habit is to call answers of this model bad: the noise alone makes votes
    annotate = {"voice": "configs/voices/outdoor.yaml", "habits": False, "noise": 0.1}
    for name, content in (("sample", sample), ("annotate", annotate)):
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content))
        options["pairs"][name] = str(file)
    few = {"lora_r": 4, "max_dropped": 1.0}
    options["reward"]["options"] = few | {"max_steps": 2, "per_device_train_batch_size": 4}
    options["methods"]["dpo"]["options"] = few | {"max_steps": 2, "per_device_train_batch_size": 4}
    options["methods"]["ppo"]["options"] = few | {"rollout_batch_size": 8, "total_episodes": 16}
    options["methods"]["best_of_n"]["sweep"] = {"n": [2]}
    options |= {
        "output_dir": str(folder / "real"),
        "initial_policy": str(folder / "sft"),
        "n_prompts": 20,
        "max_prompt_length": 128,
        "max_response_length": 64,
    }
    options["perplexity"] = {"neutral": ["rlhf/brand_data/outdoor/neutral.jsonl"]}
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(options))
    return file


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_driver_on_a_tiny_model(tmp_path, monkeypatch):
    # the sandbox's base: half a million parameters, and its answers end, so that they can be learnt
    base = tmp_path / "base"
    packaged.copy_to(base)
    monkeypatch.setattr(page, "PAGE", tmp_path / "real.md")
    monkeypatch.setattr(page, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    sft = ["--model_name_or_path", str(base), "--data", "rlhf/brand_data/outdoor/answers.jsonl"]
    sft += ["--max_prompt_length", "128", "--max_response_length", "256"]
    sft += ["--max_steps", "2", "--eval_prompts", "2"]
    experiment = small_experiment(tmp_path)
    assert pipeline.run_all(experiment, sft) == 0
    page.write(tmp_path / "real")

    text = (tmp_path / "real.md").read_text()
    assert text.startswith("# A real model in a brand's voice")
    # ten questions, each answered by four policies
    assert text.count(", gold ") == 10 * 4
    rows = {row["id"]: row for row in json.loads((tmp_path / "real.json").read_text())["rows"]}
    assert rows["real-ppo-updates"]["value"] == 2 and not rows["real-ppo-updates"]["holds"]
    assert rows["real-ppo-seeds"]["value"] == 1
    assert rows["real-hours"]["holds"] and "real-dpo-forgetting" in rows

    # all is done: nothing is made again
    before = (tmp_path / "real" / "seed-0" / "ppo-kl_coef-0.05" / "result.json").stat().st_mtime_ns
    assert pipeline.run_all(experiment, sft) == 0
    after = (tmp_path / "real" / "seed-0" / "ppo-kl_coef-0.05" / "result.json").stat().st_mtime_ns
    assert after == before
