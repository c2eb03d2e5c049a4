"""The pretrained base of the package is the one of the default settings, and is what a world gets."""

import json
import math

import numpy
import pytest
from safetensors.numpy import load_file

from rlhf.sandbox import base, build, corpus, packaged
from tests.sandbox.test_build import config

ANEW = f"""{packaged.FOLDER} is not what the code makes any more. Make it anew, and the tables that rest on it:
    rlhf sandbox build --pretrain --output_dir runs/new
    python -m rlhf.sandbox.packaged runs/new/base"""
DEFAULT = build.SandboxConfig()


@pytest.fixture(scope="module")
def texts():
    world = corpus.make_world(DEFAULT.world_seed, DEFAULT.n_items, DEFAULT.n_intents)
    train = build.pretraining_documents(DEFAULT, world, DEFAULT.pretrain_documents)
    return [train, build.pretraining_documents(DEFAULT, world, 500, split="validation")]


@pytest.fixture(scope="module")
def default_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default")
    return folder, build.build(build.SandboxConfig(output_dir=str(folder)))


def held_out_loss(folder, texts) -> float:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return base.evaluate(model, tokenizer, base.encode(tokenizer, texts[1]), 32)


def test_it_is_made_from_the_default_settings_and_todays_texts(texts):
    assert packaged.read_record()["made_from"] == build.made_from(DEFAULT, texts), ANEW


def test_its_tokenizer_and_shape_are_those_that_the_code_makes(texts, tmp_path):
    tokenizer = base.train_tokenizer(base.tokenizer_texts(texts[0]), DEFAULT.vocab_size)
    tokenizer.save_pretrained(tmp_path)
    base.make_model(tokenizer, DEFAULT.base_config()).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (packaged.FOLDER / name).read_text(), ANEW
    made, kept = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, packaged.FOLDER)
    )
    made.pop("transformers_version"), kept.pop("transformers_version")
    assert made == kept, ANEW


def test_a_world_of_default_settings_gets_it_with_32_bit_weights(default_world, texts):
    folder, report = default_world
    written, kept = (
        load_file(folder / "base/model.safetensors"),
        load_file(packaged.FOLDER / "model.safetensors"),
    )
    assert written.keys() == kept.keys()
    for name, weights in written.items():
        assert weights.dtype == numpy.float32 and kept[name].dtype == numpy.float16
        assert numpy.array_equal(weights, kept[name])
    assert report["base"] == packaged.read_record()
    # rounding to 16 bits moves the loss in the fourth decimal place at most
    loss = held_out_loss(folder / "base", texts)
    assert loss == pytest.approx(report["base"]["loss/held_out"], abs=5e-4)


def test_it_is_taken_unless_another_one_is_wanted(tmp_path, monkeypatch, capsys):
    def said(**options) -> str:
        capsys.readouterr()
        build.build(config(tmp_path / "world", **options))
        return capsys.readouterr().out

    assert "pretrained in" in said()
    # as if the package had the base of these small settings
    small = json.loads((tmp_path / "world/base/sandbox.json").read_text())
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "pretrained")
    packaged.package(tmp_path / "world/base")
    record = packaged.read_record()
    assert record["made_from"] == small["made_from"] and "seconds" not in record

    # one that was pretrained is replaced, by name, and back
    found = said()
    assert "remaking the base" in found and "from the package" in found
    assert "reusing" in said()
    found = said(pretrain=True)
    assert "remaking the base" in found and "pretrained in" in found
    assert "reusing" in said(pretrain=True)
    # other settings, and other texts
    assert "pretrained in" in said(pretrain_steps=2)
    assert "from the package" in said()
    monkeypatch.setattr(corpus, "plain_sentence", lambda world, rng: "Another corpus.")
    assert "pretrained in" in said()


@pytest.mark.slow
def test_pretraining_it_anew_gives_one_as_good(default_world, texts, tmp_path):
    # one minute on one core. Weights differ with the processor, losses hardly: with AVX2 0.3261, with
    # AVX-512 0.3254
    measured = base.train_base(*texts, DEFAULT.base_config(), tmp_path / "base")
    kept = held_out_loss(default_world[0] / "base", texts)
    apart = measured["loss/held_out"] - kept
    print(
        f"held-out loss of the packaged base {kept:.4f}, pretrained anew {measured['loss/held_out']:.4f}: "
        f"{apart:+.4f} nats, perplexity {math.exp(kept):.4f} and {math.exp(measured['loss/held_out']):.4f}"
    )
    assert abs(apart) < 0.01, ANEW


def test_its_eos_token_was_trained_and_one_drawn_at_random_was_not(default_world):
    import types

    import torch

    from rlhf import stages
    from rlhf.data.encode import encode
    from rlhf.data.load import load
    from rlhf.data.records import Instruction
    from rlhf.model.loading import load_model
    from rlhf.ranks.distributed import DistributedContext

    folder, _ = default_world
    initial = load_model(str(folder / "base"))
    records = load([str(folder / "instructions.jsonl")], Instruction)[:64]
    rows, _ = encode(records, initial.tokenizer, 256, 256)
    settings = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_peft": True}
    settings |= {"lora_target_modules": ["all-linear"], "train_eos": "auto", "deepspeed": "zero2"}
    said = []
    run = types.SimpleNamespace(
        config=types.SimpleNamespace(**settings),
        log=said.append,
        world=DistributedContext(),
        resumed=None,
    )
    assert stages.new_lora(run, initial, answers=rows).trainable_token_indices is None and not said
    head, eos = initial.model.get_output_embeddings(), initial.tokenizer.eos_token_id
    with torch.no_grad():
        head.weight[eos] = 0.02 * torch.randn(96, generator=torch.Generator().manual_seed(0))
    assert stages.new_lora(run, initial, answers=rows).trainable_token_indices == [eos]
    assert "median P(EOS) where 16 given answers end" in said[-1]
