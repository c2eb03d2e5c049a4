"""Starting, loading and reading a reward model, on a tiny base (width 32)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reward.loaded import reward_scorer
from reward.model import (
    last_token_scores,
    load_reward,
    normalisation,
    raw_scores,
    score_model,
    trainable_reward,
    write_reward,
)
from rlhf.data.encode import encode_prompt, encode_response
from rlhf.data.records import Samples
from rlhf.errors import UserError
from rlhf.model.adapters import lora_config
from rlhf.model.loading import load_model
from rlhf.ppo.rollout import padded_batch
from tests.conftest import random_adapter

ROWS = [[5, 6, 7, 2], [9, 8, 2], [4, 11, 12, 13, 14, 2]]


def test_the_score_is_read_at_the_last_true_token():
    hidden = torch.arange(12.0).reshape(2, 3, 2)  # rows: (0,1)(2,3)(4,5) and (6,7)(8,9)(10,11)
    head = nn.Linear(2, 1, bias=False)
    head.weight.data = torch.tensor([[1.0, 10.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])  # tokens 1 and 2: 2 + 30, 10 + 110
    assert last_token_scores(hidden, mask, head).squeeze(-1).tolist() == [32.0, 120.0]


def test_a_response_that_ends_in_the_pad_id_is_read_at_its_end(base_path):
    # transformers' own classification forward takes the rightmost token that is not the pad id (0):
    # token 1, not 2
    initial = load_model(base_path)
    model = score_model(initial.model)
    row, mask = torch.tensor([[5, 6, 0]]), torch.ones(1, 3, dtype=torch.long)
    hidden = initial.model.base_model(input_ids=row, attention_mask=mask).last_hidden_state
    ours = model(input_ids=row, attention_mask=mask).logits.item()
    assert ours == pytest.approx(model.score(hidden[:, 2]).item(), abs=1e-6)
    assert abs(ours - model.score(hidden[:, 1]).item()) > 1e-3


def test_a_row_does_not_change_with_its_batch(base_path):
    model = score_model(load_model(base_path).model, seed=3)
    alone = [raw_scores(model, [row], 0)[0] for row in ROWS]
    assert raw_scores(model, ROWS, 0, batch_size=3) == pytest.approx(alone, abs=1e-5)
    assert raw_scores(model, ROWS, 0, batch_size=2) == pytest.approx(alone, abs=1e-5)


def test_the_fresh_head_is_seeded(base_path):
    heads = [score_model(load_model(base_path).model, seed=s).score.weight for s in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(1 / 33**0.5, rel=0.4)


def test_training_starts_from_the_sft_adapter(base_path, sft_path):
    saved = load_file(Path(sft_path) / "adapter_model.safetensors")
    model = trainable_reward(load_model(sft_path), None)
    state = model.state_dict()
    for name, tensor in saved.items():
        placed = name.replace(".weight", ".default.weight")
        assert torch.equal(state[placed], tensor)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("score.modules_to_save.default" in n for n in trainable)
    assert all("lora_" in n or "score.modules_to_save" in n for n in trainable)
    # the trunk under the adapter is the SFT policy's: same hidden states
    from peft import PeftModel

    ids = torch.tensor([ROWS[0]])
    policy = PeftModel.from_pretrained(load_model(base_path).model, sft_path).get_base_model()
    trunk = model.get_base_model().base_model
    assert torch.allclose(
        policy.base_model(ids).last_hidden_state, trunk(ids).last_hidden_state, atol=1e-6
    )


def test_new_lora_and_whole_model(base_path):
    adapter = trainable_reward(load_model(base_path), lora_config("SEQ_CLS", r=2))
    assert {
        n.split(".")[-3]
        for n, p in adapter.named_parameters()
        if p.requires_grad and "score" not in n
    } == {
        "lora_A",
        "lora_B",
    }
    assert not any("score.lora" in n for n, _ in adapter.named_parameters())
    whole = trainable_reward(load_model(base_path), None)
    assert all(p.requires_grad for p in whole.parameters())


def saved_adapter(model, initial, folder):
    model.save_pretrained(folder)
    initial.tokenizer.save_pretrained(folder)
    return str(folder)


def test_saved_and_loaded_adapter_scores_the_same(sft_path, tmp_path):
    initial = load_model(sft_path)
    model = trainable_reward(initial, None, seed=5)
    with torch.no_grad():  # as if trained: neither SFT's adapter nor the fresh head
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(name))
                )
    before = raw_scores(model, ROWS, 0)
    path = saved_adapter(model, initial, tmp_path)
    write_reward(path, -1.5, 2.0, base_fingerprint=initial.fingerprint)
    loaded = load_reward(path, "cpu")
    assert (loaded.bias, loaded.scale) == (-1.5, 2.0)
    assert raw_scores(loaded.model, ROWS, 0) == pytest.approx(before, abs=1e-6)
    assert loaded.score_ids(ROWS) == pytest.approx([2.0 * s - 1.5 for s in before], abs=1e-5)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert [n for n in names if "score" in n] == ["base_model.model.score.weight"]


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["norm", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [2], "lm_head": [2]}},
    ],
)
def test_all_that_an_sft_adapter_holds_is_trained_saved_and_a_role(base_path, tmp_path, settings):
    from rlhf.roles.one_base import Roles

    sft = random_adapter(base_path, tmp_path / "sft", seed=5, **settings)
    initial = load_model(sft)
    model = trainable_reward(initial, None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.tensor([[5, 2, 7, 3]])
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) != p.requires_grad for n, p in model.named_parameters())
    trained = raw_scores(model, ROWS, 0)
    path = saved_adapter(model, initial, tmp_path / "reward")
    assert raw_scores(load_reward(path, "cpu").model, ROWS, 0) == pytest.approx(trained, abs=1e-6)
    roles = Roles(load_model(sft), lora_config(), path)
    for row, score in zip(ROWS, trained, strict=True):
        batch = padded_batch([row[:-1]], [row[-1:]], 0, "cpu")
        with torch.no_grad(), roles.use("reward"):
            assert roles.scores(batch).item() == pytest.approx(score, abs=1e-5)


def test_saved_and_loaded_whole_model_scores_the_same(base_path, tmp_path):
    initial = load_model(base_path)
    model = trainable_reward(initial, None, seed=5)
    before = raw_scores(model, ROWS, 0)
    loaded = load_reward(saved_adapter(model, initial, tmp_path), "cpu")
    assert raw_scores(loaded.model, ROWS, 0) == pytest.approx(before, abs=1e-6)


def test_the_reward_role_of_ppo_scores_the_same(base_path, sft_path, reward_path):
    from rlhf.roles.one_base import Roles

    roles = Roles(load_model(sft_path), lora_config(r=2), reward_path)
    expected = load_reward(reward_path, "cpu").score_ids(ROWS)
    with torch.no_grad(), roles.use("reward"):
        for row, score in zip(ROWS, expected, strict=True):
            batch = padded_batch([row[:-1]], [row[-1:]], 0, "cpu")
            assert roles.scores(batch).item() == pytest.approx(score, abs=1e-5)


def test_an_adapter_without_head_is_refused(sft_path):
    with pytest.raises(UserError, match="no score head"):
        load_reward(sft_path)


def test_a_causal_model_is_refused_as_reward_model(base_path):
    with pytest.raises(
        UserError, match=r"do not fit LlamaForSequenceClassification: 1 missing \(score\.weight\)"
    ):
        load_reward(base_path)


def test_an_adapter_on_another_base_is_refused(base_path, reward_path, tmp_path):
    other, adapter = tmp_path / "base", tmp_path / "reward"
    shutil.copytree(base_path, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(reward_path, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(other)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="fingerprint"):
        load_reward(str(adapter))
    # without rlhf.json the fingerprint in reward.json still tells
    (adapter / "rlhf.json").unlink()
    write_reward(adapter, 0.0, 1.0, base_fingerprint="0123456789abcdef")
    with pytest.raises(UserError, match="0123456789abcdef"):
        load_reward(str(adapter))


def samples_of(tokenizer, ended=True):
    prompts = [
        [{"role": "user", "content": "where is my parcel?"}],
        [{"role": "user", "content": "hi"}],
    ]
    responses = ["on its way", "kind regards"]
    prompt_ids = [encode_prompt(tokenizer, p) for p in prompts]
    response_ids = [encode_response(tokenizer, r)[: None if ended else -1] for r in responses]
    return Samples(prompts, responses, prompt_ids, response_ids, [ended] * 2, [{}, {}])


@pytest.mark.parametrize("ended", [True, False])
def test_scorer_reads_ids_or_encodes_anew_to_the_same_scores(reward_path, tokenizer, ended):
    samples = samples_of(tokenizer, ended)
    by_ids = reward_scorer(reward_path, "reward", tokenizer=tokenizer, device="cpu")(samples)
    by_text = reward_scorer(reward_path, "reward", device="cpu")(samples)
    assert by_ids.total == pytest.approx(by_text.total, abs=1e-6)
    assert by_ids.breakdown == {"reward": by_ids.total}


def test_ids_win_where_the_tokenizer_is_the_same_and_text_where_not(reward_path, tokenizer):
    samples = samples_of(tokenizer)
    shifted = samples_of(tokenizer)
    shifted.response_ids = [[7, 7, 2], [8, 2]]  # ids that do not spell the text
    same = reward_scorer(reward_path, "reward", tokenizer=tokenizer, device="cpu")
    assert same(shifted).total != pytest.approx(same(samples).total, abs=1e-3)
    from tests.conftest import make_tokenizer

    other = make_tokenizer()
    other.chat_template = "another"
    foreign = reward_scorer(reward_path, "reward", tokenizer=other, device="cpu")
    assert foreign(shifted).total == pytest.approx(same(samples).total, abs=1e-6)


def test_normalisation_by_hand():
    # 1, 3: mean 2, population deviation 1; 0, 4: mean 2, deviation 2 -> scale 1/2, bias -1
    assert normalisation([1.0, 3.0], "mean") == (-2.0, 1.0)
    assert normalisation([0.0, 4.0], "mean_std") == (-1.0, 0.5)
    assert normalisation([0.0, 4.0], "none") == (0.0, 1.0)
    assert normalisation([2.0, 2.0], "mean_std") == (-2.0, 1.0)
    assert normalisation([], "mean") == (0.0, 1.0)
