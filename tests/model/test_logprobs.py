import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from rlhf.model import logprobs
from rlhf.model.logprobs import completion_batch, response_logprobs, token_logprobs
from rlhf.model.packing import PackedRows, group_rows, packed_inputs, packs, tokens_per_pass
from rlhf.plan.ledger import Ledger
from rlhf.tensors import selected_logprobs

SHAPE = dict(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
PROMPTS, RESPONSES = [[5, 6, 7], [8, 9, 10, 11, 12], [13]], [[20, 21, 22, 2], [30, 31], [7] * 9]


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.fixture()
def model():
    return build(LlamaConfig(**SHAPE))


def alone(model, prompt, response, temperature):
    """Log-probabilities and entropies of one response, from whole logits."""
    ids = torch.tensor([prompt + response], device=next(model.parameters()).device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits / temperature, -1)
    chosen = logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("portion", [1, 2**23])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_rows_have_the_log_probabilities_of_single_ones(
    model, monkeypatch, device, portion, temperature
):
    monkeypatch.setattr(logprobs, f"LOGITS_ON_{'GPU' if device.type == 'cuda' else 'CPU'}", portion)
    model.to(device).lm_head.requires_grad_(False)
    batch = completion_batch(PROMPTS, RESPONSES, 0, device)
    found, entropy = response_logprobs(model, *batch, temperature)
    assert packs(model, 12)
    weights = torch.randn(found.shape, dtype=torch.float64, device=device)
    (weights * found).sum().backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    total = 0.0
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        expected, expected_entropy = alone(model, prompt, response, temperature)
        count = len(response)
        torch.testing.assert_close(found[row, :count], expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(entropy[row, :count], expected_entropy, atol=1e-12, rtol=0)
        assert not found[row, count:].any() and not entropy[row, count:].any()
        total = total + (weights[row, :count] * expected).sum()
    total.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-12, rtol=1e-9)


def test_a_head_by_hand():
    # logits (0, ln 3) at temperature 1: p = (1/4, 3/4), log p_1 = ln 3 - ln 4, and the entropy
    # is ln 4 - 3/4 ln 3. With h = 1 and W = (0, ln 3): d log p_1 / dh = W_1 - E[W] = ln 3 / 4
    head = nn.Linear(1, 2, bias=False).double().requires_grad_(False)
    head.weight.copy_(torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64))
    state = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    found, entropy = token_logprobs(state, head, torch.tensor([1]))
    found.sum().backward()
    assert found.item() == pytest.approx(math.log(3 / 4), abs=1e-12)
    assert entropy.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), abs=1e-12)
    assert state.grad.item() == pytest.approx(math.log(3) / 4, abs=1e-12)
    # at temperature 2 the odds are sqrt(3), and the slope is divided by 2
    state.grad = None
    found, _ = token_logprobs(state, head, torch.tensor([1]), temperature=2.0)
    found.sum().backward()
    p = math.sqrt(3) / (1 + math.sqrt(3))
    assert found.item() == pytest.approx(math.log(p), abs=1e-12)
    assert state.grad.item() == pytest.approx(math.log(3) * (1 - p) / 2, abs=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_frozen_head_keeps_no_logits(monkeypatch, dtype):
    monkeypatch.setattr(logprobs, "LOGITS_ON_GPU", 2**22)
    count, width, vocabulary = 4096, 64, 32_000
    place = {"device": "cuda", "dtype": dtype}
    head = nn.Linear(width, vocabulary, bias=False, **place).requires_grad_(False)
    states = torch.randn(count, width, **place, requires_grad=True)
    ids = torch.randint(0, vocabulary, (count,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    token_logprobs(states, head, ids)[0].sum().backward()
    # (tokens, vocabulary) in float32 are 0.5 GB; a portion of 131 tokens takes 17 MB a few times
    assert torch.cuda.max_memory_allocated() - before < count * vocabulary * 4 / 4


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 8), (torch.bfloat16, 10)])
def test_portions_of_logits_stand_one_at_a_time(monkeypatch, dtype, most):
    # float32 logits and probabilities of a portion, and these in the dtype of the weights
    tokens, vocabulary = 16, 1000
    monkeypatch.setattr(logprobs, "LOGITS_ON_CPU", tokens * vocabulary)
    head = nn.Linear(2, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
    states = torch.randn(4 * tokens, 2, dtype=dtype, requires_grad=True)
    ids = torch.randint(0, vocabulary, (4 * tokens,))
    ledger = Ledger([head.weight, states, ids])
    with ledger:
        token_logprobs(states, head, ids)
    assert most <= ledger.peak.total / (tokens * vocabulary) < most + 0.5


def test_a_head_that_learns_or_whose_entropy_does_keeps_its_logits():
    torch.manual_seed(0)
    head, ids = nn.Linear(4, 7).double(), torch.tensor([1, 6, 0])
    states = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    expected, _ = selected_logprobs(head(states), ids)
    found, _ = token_logprobs(states, head, ids)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert head.weight.grad is not None
    head.requires_grad_(False)
    _, entropy = token_logprobs(states, head, ids, entropy_learns=True)
    assert entropy.requires_grad and not token_logprobs(states, head, ids)[1].requires_grad


def test_rows_within_a_sliding_window_are_packed_and_longer_ones_padded():
    model = build(MistralConfig(**SHAPE, sliding_window=9))
    assert packs(model, 9) and not packs(model, 10)
    batch = completion_batch(PROMPTS, RESPONSES, 0)
    with torch.no_grad():
        found, _ = response_logprobs(model, *batch)
        expected, _ = alone(model, PROMPTS[2], RESPONSES[2], 1.0)
    torch.testing.assert_close(found[2, :9], expected, atol=1e-12, rtol=0)


def test_a_model_that_does_not_pass_arguments_on_gets_padded_rows(model, capsys, monkeypatch):
    forward = model.model.forward

    def deaf(packed_rows=None, **arguments):
        return forward(**arguments)

    monkeypatch.setattr(model.model, "forward", deaf)
    assert not packs(model, 12)
    assert "rows of llama are padded, which is slower (results are off by" in (
        capsys.readouterr().err
    )
    batch = completion_batch(PROMPTS, RESPONSES, 0)
    with torch.no_grad():
        found, _ = response_logprobs(model, *batch)
        expected, _ = alone(model, PROMPTS[1], RESPONSES[1], 1.0)
    torch.testing.assert_close(found[1, :2], expected, atol=1e-12, rtol=0)


def test_gradient_checkpointing_makes_the_same_packed_pass_again(model):
    gradients = []
    batch = completion_batch(PROMPTS, RESPONSES, 0)
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        response_logprobs(model, *batch)[0].sum().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-14, rtol=0)


def test_rows_that_have_no_padding_are_not_copied(model):
    ids = torch.arange(6).reshape(2, 3)
    rows = PackedRows.of(ids, torch.ones_like(ids))
    assert rows.places is None and rows.ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    with torch.no_grad():
        states = model.model(**packed_inputs(rows)).last_hidden_state[0, 3:]
        expected = model.model(ids[1:], use_cache=False).last_hidden_state[0]
    assert packs(model, 3)
    torch.testing.assert_close(states, expected, atol=1e-12, rtol=0)


def test_groups_hold_rows_of_similar_length_within_both_limits():
    lengths = [3, 9, 4, 8, 1, 5]
    groups = group_rows(lengths, tokens=12, rows=3)
    assert sorted(row for group in groups for row in group) == list(range(6))
    assert all(sum(lengths[row] for row in group) <= 12 and len(group) <= 3 for group in groups)
    # by length, so that little is padded in attention
    assert [lengths[row] for group in groups for row in group] == [9, 8, 5, 4, 3, 1]
    # attention pads to the longest: one row of 100 tokens does not take 50 short ones with it
    lengths = [100] + [2] * 50
    groups = group_rows(lengths, tokens=200, rows=60)
    assert all(len(group) * lengths[group[0]] <= 1.5 * 200 for group in groups)
    # a row that is longer than the limit goes alone
    assert group_rows([20, 1], tokens=12, rows=3) == [[0], [1]]
    assert group_rows([2, 2, 2], tokens=12, rows=1) == [[0], [1], [2]]
    assert group_rows([], tokens=12, rows=3) == []


def test_passes_that_keep_their_logits_are_bounded_by_the_vocabulary():
    gpu = torch.device("cuda")
    assert tokens_per_pass(gpu) == 16_384
    # 2^28 logits of 2^17 entries
    assert tokens_per_pass(gpu, 2**17) == 2048
    assert tokens_per_pass(gpu, 2**10) == 16_384
    assert tokens_per_pass(torch.device("cpu"), 2**17) == 1024
    assert tokens_per_pass(gpu, 2**29) == 1


def test_the_gradient_of_a_confident_token_does_not_cancel_in_bfloat16():
    # rows of the head share a large part, and the token is all but certain: W_y - E_p[W] is small
    # beside either of them
    torch.manual_seed(0)
    head = nn.Linear(64, 500, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(500, 64) + 3 * torch.randn(64))
    head.weight[7] += 0.5 * torch.randn(64)
    direction = head.weight[7] - head.weight.mean(0)
    state = 12 * direction[None] / direction.square().sum()
    state, weight = state.bfloat16(), head.weight.bfloat16()
    slopes = []
    for dtype in (torch.bfloat16, torch.float64):
        own = nn.Linear(64, 500, bias=False, dtype=dtype).requires_grad_(False)
        own.weight.copy_(weight.to(dtype))
        given = state.to(dtype, copy=True).requires_grad_()
        found, _ = token_logprobs(given, own, torch.tensor([7]))
        found.sum().backward()
        slopes.append(given.grad.double())
    assert 0.97 < float(found.exp()) < 0.999
    assert float((slopes[0] - slopes[1]).norm() / slopes[1].norm()) < 0.03


def test_a_capped_head_is_not_plain_however_small_its_logits_are():
    from transformers import Gemma2Config

    from rlhf.model.packing import head_is_plain

    shape = {**SHAPE, "head_dim": 4}
    assert not head_is_plain(build(Gemma2Config(**shape, final_logit_softcapping=30.0)))
