"""Adapters of one base by name, and what an answer has room for."""

from pathlib import Path

import pytest
import torch

from rlhf.data.encode import encode_prompt
from rlhf.engines import merged as merging
from rlhf.engines.sampling import Sampling
from rlhf.errors import UserError
from rlhf.serve.policies import load
from tests.serve.conftest import QUESTION


def test_adapters_share_their_base_and_it_is_served_too(policies, base_path):
    assert list(policies) == ["sft", "ppo", base_path.rpartition("/")[2]]
    sft, ppo, base = policies.values()
    assert (sft.base, ppo.base, base.base) == (base.name, base.name, None)
    # embeddings are in memory once, what the adapters change three times
    embeddings = {p.model.get_input_embeddings().weight.data_ptr() for p in policies.values()}
    assert len(embeddings) == 1
    folded = {p.model.model.layers[0].mlp.up_proj.weight.data_ptr() for p in policies.values()}
    assert len(folded) == 3


def test_greedy_tokens_are_those_of_the_plain_sampler(policies, runs, base_path, sampler):
    answers = []
    for policy, path in zip(policies.values(), [*runs, base_path], strict=True):
        _, ids, logprobs = sampler(path, QUESTION, 24)
        assert greedy(policy, 24) == ids
        done = policy.generate([encoded(policy)], [0], Sampling(24, 0.0), lambda *_: None)
        torch.testing.assert_close(
            torch.tensor(done.logprobs[0]), torch.tensor(logprobs), atol=1e-5, rtol=0
        )
        answers.append(tuple(ids))
    # three policies, three answers
    assert len(set(answers)) == 3


def encoded(policy):
    return encode_prompt(policy.tokenizer, QUESTION)


def greedy(policy, tokens):
    """Return the tokens that are told, which are those of the response."""
    told = []
    done = policy.generate(
        [encoded(policy)], [0], Sampling(tokens, 0.0), lambda row, token, _: told.append(token)
    )
    assert done.response_ids == [told]
    return told


def test_an_adapter_that_does_not_fit_twice_stays_beside_the_weights(
    runs, sampler, monkeypatch, capsys
):
    monkeypatch.setattr(merging, "SHARE_OF_FREE_MEMORY", 0.0)
    sft, ppo = load(runs, with_bases=False)
    assert sft.model is ppo.model and "beside the weights" in capsys.readouterr().err
    for policy, path in ((sft, runs[0]), (ppo, runs[1])):
        assert greedy(policy, 12) == sampler(path, QUESTION, 12)[1]


def test_a_base_that_is_given_is_loaded_once(runs, base_path):
    base, sft = load([base_path, runs[0]], with_bases=True)
    assert [base.name, sft.name] == [base_path.rpartition("/")[2], "sft"]
    embeddings = {policy.model.get_input_embeddings().weight.data_ptr() for policy in (base, sft)}
    assert len(embeddings) == 1
    assert sft.base == base.name


def test_names_that_are_not_unique_have_more_folders(runs, base_path, tmp_path):
    from tests.conftest import random_adapter

    other = random_adapter(base_path, tmp_path / "sft", seed=3)
    expected = [f"{Path(runs[0]).parent.name}/sft", f"{tmp_path.name}/sft"]
    assert [policy.name for policy in load([runs[0], other], with_bases=False)] == expected


def test_what_is_no_policy_is_refused(runs, reward_path, tmp_path):
    with pytest.raises(UserError, match=r"no such run\. Did you mean .*/sft\?"):
        load([f"{runs[0]}x"], with_bases=False)
    with pytest.raises(UserError, match="a reward model, not a policy"):
        load([reward_path], with_bases=False)


def test_room_is_what_positions_leave(policies):
    policy = policies["sft"]
    # 512 positions
    assert policy.limit == 512
    assert policy.room([1] * 500, None, 64) == 12
    assert policy.room([1] * 500, 12, 64) == 12
    assert policy.room([1] * 10, None, 64) == 64
    for wanted, prompt in ((13, 500), (None, 512)):
        with pytest.raises(UserError, match=f"512 tokens; the prompt has {prompt}"):
            policy.room([1] * prompt, wanted, 64)
