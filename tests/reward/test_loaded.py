"""Reward models that share a base score as each does alone."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from reward.compose import build_scorer
from reward.loaded import RewardModels, reward_scorer
from reward.model import load_reward
from rlhf.data.encode import encode_prompt, encode_response
from rlhf.data.records import Samples
from rlhf.errors import UserError
from tests.conftest import random_reward

ROWS = [[5, 6, 7, 2], [9, 8, 2], [4, 11, 12, 13, 14, 2]]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_members_on_a_shared_base_score_as_each_does_alone(member_paths, order):
    paths, bases = [member_paths[i] for i in order], []
    models = RewardModels(on_base=bases.append)
    together = [models.load(path, "cpu") for path in paths]
    assert len(bases) == 1 and all(member.model is bases[0] for member in together)
    # after each other, and again in another order: none leaves itself active
    for path, member in [*zip(paths, together, strict=True)] * 2:
        alone = load_reward(path, "cpu").score_ids(ROWS)
        assert member.score_ids(ROWS) == pytest.approx(alone, abs=1e-5)
    first = [member.score_ids(ROWS)[0] for member in together]
    assert len({round(score, 1) for score in first}) == 3


def test_a_shared_base_is_not_copied(member_paths):
    models = RewardModels()
    for path in member_paths:
        model = models.load(path, "cpu").model
    layers = model.config.num_hidden_layers
    names = [name for name, _ in model.named_parameters() if "q_proj" in name]
    # of each layer one weight, and two factors of each member
    assert len(names) == layers * (1 + 2 * len(member_paths))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_is_loaded_once_for_each_dtype(reward_path, monkeypatch):
    models = RewardModels()
    monkeypatch.chdir(Path(reward_path).parent)
    assert models.load(reward_path, "cpu") is models.load(Path(reward_path).name, "cpu")
    assert models.load(reward_path, "cpu", "float64").model.dtype.itemsize == 8


def test_what_stands_on_another_base_or_reads_other_ids_has_its_own(
    base_path, reward_path, tokenizer, tmp_path
):
    base = shutil.copytree(base_path, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    elsewhere = random_reward(str(base), tmp_path / "elsewhere", seed=2)

    reads_otherwise = shutil.copytree(reward_path, tmp_path / "reads")
    own = type(tokenizer).from_pretrained(reward_path)
    own.chat_template = "another"
    own.save_pretrained(reads_otherwise)
    identity = json.loads((reads_otherwise / "rlhf.json").read_text())
    identity.pop("tokenizer_fingerprint")
    (reads_otherwise / "rlhf.json").write_text(json.dumps(identity))

    bases = []
    models = RewardModels(on_base=bases.append)
    for path in (reward_path, elsewhere, str(reads_otherwise)):
        alone = load_reward(path, "cpu").score_ids(ROWS)
        assert models.load(path, "cpu").score_ids(ROWS) == pytest.approx(alone, abs=1e-6)
    assert len(bases) == 3


def test_a_member_of_a_base_that_was_replaced_is_refused(reward_path, tmp_path):
    other = shutil.copytree(reward_path, tmp_path / "other")
    models = RewardModels()
    models.load(reward_path, "cpu")
    identity = json.loads((other / "rlhf.json").read_text())
    (other / "rlhf.json").write_text(json.dumps({**identity, "base_fingerprint": "0" * 16}))
    with pytest.raises(UserError, match=f"trained on base {'0' * 16}"):
        models.load(str(other), "cpu")


def test_an_ensemble_loads_one_base(member_paths, tokenizer, monkeypatch):
    loaded = []
    load = RewardModels.load
    monkeypatch.setattr(
        RewardModels, "load", lambda *given: (loaded.append(load(*given)), loaded[-1])[1]
    )
    prompts = [[{"role": "user", "content": text}] for text in ("where is it?", "hi")]
    responses = ["on its way", "kind regards"]
    samples = Samples(
        prompts,
        responses,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        [encode_response(tokenizer, response) for response in responses],
        [True] * 2,
        [{}, {}],
    )
    specs = [{"ensemble": member_paths, "how": "worst"}, {"model": member_paths[0], "weight": 0}]
    scores = build_scorer(specs, tokenizer)(samples)
    assert len(loaded) == 4 and len({id(member.model) for member in loaded}) == 1
    alone = [reward_scorer(path, tokenizer=tokenizer)(samples).total for path in member_paths]
    assert scores.total == pytest.approx(
        [min(column) for column in zip(*alone, strict=True)], abs=1e-5
    )
