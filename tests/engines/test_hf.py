import pytest
import torch

from rlhf.engines.hf import cache_is_exact, generate
from rlhf.engines.sampling import Sampling
from rlhf.model.loading import load_model
from rlhf.model.logprobs import completion_batch, response_logprobs
from rlhf.model.packing import head_is_plain
from tests.kinds import build


@pytest.fixture(scope="module")
def initial(base_path):
    return load_model(base_path)


PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]


def run(initial, prompts=PROMPTS, keys=(1, 2, 3), sampling=None, **more):
    sampling = sampling or Sampling(max_new_tokens=12)
    stops = [initial.tokenizer.eos_token_id]
    return generate(
        initial.model, prompts, list(keys), sampling, stops, initial.tokenizer.pad_token_id, **more
    )


def test_greedy_is_what_transformers_generates(initial):
    done = run(initial, sampling=Sampling(max_new_tokens=12, temperature=0))
    for prompt, response in zip(PROMPTS, done.response_ids, strict=True):
        ids = initial.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=initial.tokenizer.eos_token_id,
            pad_token_id=initial.tokenizer.pad_token_id,
        )
        assert response == ids[0, len(prompt) :].tolist()


def test_a_sample_depends_on_its_key_alone_not_on_its_batch(initial):
    together = run(initial).response_ids
    alone = [
        run(initial, [p], [k]).response_ids[0] for p, k in zip(PROMPTS, (1, 2, 3), strict=True)
    ]
    assert together == alone
    assert run(initial, PROMPTS[::-1], (3, 2, 1)).response_ids == together[::-1]
    assert run(initial, batch_size=2).response_ids == together
    assert run(initial, keys=(4, 5, 6)).response_ids != together


def test_responses_stop_at_the_stop_token_and_say_so(initial):
    free = run(initial, keys=(7, 8, 9)).response_ids
    stop = free[0][3]
    done = generate(initial.model, PROMPTS, [7, 8, 9], Sampling(max_new_tokens=12), [stop], 0)
    assert done.response_ids[0] == free[0][: free[0].index(stop) + 1] and done.ended[0]
    for row, ended in zip(done.response_ids, done.ended, strict=True):
        assert ended == (row[-1] == stop) and stop not in row[:-1] and len(row) <= 12


def test_logprobs_are_those_of_a_full_forward_pass(initial):
    sampling = Sampling(max_new_tokens=6, temperature=0.7)
    done = run(initial, sampling=sampling)
    for prompt, response, logprobs in zip(PROMPTS, done.response_ids, done.logprobs, strict=True):
        logits = (
            initial.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.7
        )
        expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "cached"),
    [
        ("lfm2", True),  # a cache of convolution states beside attention
        ("qwen3_next", True),  # linear attention
        ("granitemoehybrid", True),
        ("falcon_h1", True),  # both in one layer
        ("mistral", True),  # a window of 6, shorter than the prompts
        ("recurrent_gemma", False),  # keeps its state in its layers, where no row can leave
        ("mamba", False),  # takes another cache
        ("minimax", False),
    ],
)
def test_rows_of_every_kind_of_cache_can_leave_the_batch(kind, cached, capsys):
    model, _ = build(kind)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20, 21, 22]]
    done = generate(
        model, prompts, [1, 2, 3, 4], Sampling(max_new_tokens=12), list(range(2, 320, 9)), 0
    )
    assert len({len(row) for row in done.response_ids}) > 1 and cache_is_exact(model) == cached
    assert ("without its cache" in capsys.readouterr().err) == (not cached)
    batch = completion_batch(prompts, done.response_ids, 0)
    with torch.no_grad():
        logprobs, _ = response_logprobs(model, *batch, plain_head=head_is_plain(model))
    found = torch.cat([torch.tensor(row) for row in done.logprobs])
    torch.testing.assert_close(found, logprobs[batch[-1]], atol=1e-5, rtol=0)


def test_the_routers_loss_is_left_out_while_sampling():
    # TRL turns it on in the config for SFT; over a cached step its mask and its logits have
    # different lengths
    model, _ = build("mixtral")
    model.config.output_router_logits = True
    done = generate(model, PROMPTS, [1, 2, 3], Sampling(max_new_tokens=4), [2], 0)
    assert (
        len(done.response_ids) == 3 and cache_is_exact(model) and model.config.output_router_logits
    )


@pytest.mark.parametrize(
    "more", [{"trainable_token_indices": [3]}, {"target_modules": ["embed_tokens"]}]
)
def test_the_cache_is_used_where_an_adapter_holds_rows_of_the_embeddings(base_path, more):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **more})
    assert cache_is_exact(get_peft_model(load_model(base_path).model, config, "policy"))
