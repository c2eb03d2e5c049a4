"""What every engine promises, held against the plain one: `rlhf.engines.hf.generate`."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf.engines import batched, hf
from rlhf.engines.sampling import Sampling
from rlhf.model.adapters import use_adapter
from tests.kinds import build

ENGINES = {"hf": hf.generate, "batched": batched.generate}
# plain attention, grouped heads, learned positions with Conv1D, experts, latent attention, a window
# and a recurrent state (which fall back)
KINDS = ["llama", "qwen3", "gpt2", "mixtral", "deepseek_v3", "mistral", "mamba"]
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16, 17], [18], [5, 6, 7], [19, 20, 21, 22]]
STOPS = list(range(2, 320, 9))
KEYS = [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    return ENGINES[request.param]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return build(request.param)[0]


def sample(engine, model, rows=range(6), sampling=None, stops=STOPS, **more):
    sampling = sampling or Sampling(max_new_tokens=10)
    return engine(
        model, [PROMPTS[i] for i in rows], [KEYS[i] for i in rows], sampling, stops, 0, **more
    )


def assert_same(found, expected):
    """The same tokens and, to rounding in float32, the same log-probabilities."""
    assert found.response_ids == expected.response_ids
    assert found.ended == expected.ended
    for own, other in zip(found.logprobs, expected.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(own), torch.tensor(other), atol=1e-5, rtol=0)


def adapted(kind: str = "llama", **more) -> nn.Module:
    """A model with two LoRA adapters, "policy" and "other", that change it."""
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **more
    )
    model = get_peft_model(build(kind)[0], config, "policy")
    model.add_adapter("other", config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_tokens_and_logprobs_are_those_of_the_plain_engine(engine, model, temperature):
    sampling = Sampling(max_new_tokens=10, temperature=temperature)
    expected = sample(hf.generate, model, sampling=sampling)
    ragged = len({len(row) for row in expected.response_ids}) > 1
    assert ragged or temperature == 0
    assert_same(sample(engine, model, sampling=sampling), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_response_depends_on_its_key_alone(engine, batch_size):
    model = build("llama")[0]
    expected = sample(engine, model)
    assert_same(sample(engine, model, batch_size=batch_size), expected)
    backwards = sample(engine, model, rows=range(5, -1, -1), batch_size=batch_size)
    assert backwards.response_ids == expected.response_ids[::-1]
    subset = sample(engine, model, rows=[4, 2], batch_size=batch_size)
    assert subset.response_ids == [expected.response_ids[4], expected.response_ids[2]]
    # the same prompt under another key
    assert expected.response_ids[0] != expected.response_ids[4]


def test_top_k_and_top_p_are_kept(engine):
    model = build("llama")[0]
    sampling = Sampling(max_new_tokens=10, temperature=0.7, top_k=5, top_p=0.8)
    assert_same(
        sample(engine, model, sampling=sampling), sample(hf.generate, model, sampling=sampling)
    )


def test_responses_end_with_any_of_the_stop_ids_or_at_the_limit(engine):
    model = build("llama")[0]
    for row, ended in zip(*vars_of(sample(engine, model)), strict=True):
        assert ended == (row[-1] in STOPS)
        assert ended or len(row) == 10
        assert not set(row[:-1]) & set(STOPS)
    free = sample(engine, model, stops=[])
    assert [len(row) for row in free.response_ids] == [10] * 6 and not any(free.ended)
    none = sample(engine, model, sampling=Sampling(max_new_tokens=0))
    assert none.response_ids == [[]] * 6 and not any(none.ended)


def vars_of(done):
    return done.response_ids, done.ended


def test_progress_counts_every_response_once(engine):
    counted = []
    sample(engine, build("llama")[0], batch_size=2, progress=counted.append)
    assert sum(counted) == 6 and 0 not in counted


@pytest.mark.parametrize("batch_size", [2, 64])
def test_each_token_is_told_when_it_is_drawn_and_can_end_its_response(engine, batch_size):
    model = build("llama")[0]
    expected = sample(engine, model)
    told = {row: [] for row in range(6)}

    def each_token(row, token, logprob):
        told[row].append((token, logprob))
        # the first row ends with its second token
        return row == 0 and len(told[0]) == 2

    found = sample(engine, model, batch_size=batch_size, each_token=each_token)
    assert len(expected.response_ids[0]) > 2
    assert found.response_ids[0] == expected.response_ids[0][:2] and not found.ended[0]
    assert found.response_ids[1:] == expected.response_ids[1:]
    assert found.ended[1:] == expected.ended[1:]
    for row, (ids, logprobs) in enumerate(zip(found.response_ids, found.logprobs, strict=True)):
        assert told[row] == list(zip(ids, logprobs, strict=True))


def test_the_mode_of_the_model_stays(engine):
    model = build("llama")[0].train()
    sample(engine, model)
    assert model.training and model.model.layers[0].training


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_the_active_adapter_is_the_one_that_samples(engine, more):
    model = adapted(**more)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    answers = []
    for name in ("policy", "other", None, "policy"):
        with use_adapter(model, name):
            expected = sample(hf.generate, model)
            assert_same(sample(engine, model), expected)
            answers.append(expected.response_ids)
    assert answers[0] == answers[3]
    assert answers[0] != answers[1] and answers[1] != answers[2] and answers[0] != answers[2]
    # the base is never written to
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_changed_adapter_is_seen(engine):
    model = adapted()
    first = sample(engine, model).response_ids
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.policy" in name:
                parameter.mul_(-1)
    second = sample(engine, model)
    assert second.response_ids != first
    assert_same(second, sample(hf.generate, model))
