import math

import torch

from rlhf.engines.sampling import Sampling, draw, gumbel, restrict, sample_key


def test_gumbel_noise_draws_from_the_softmax():
    # p = (1/2, 1/3, 1/6); 20,000 draws: standard errors below 0.0036, so five of them are 0.018
    logits = torch.tensor([0.5, 1 / 3, 1 / 6]).log().expand(20_000, 3)
    keys = torch.tensor([sample_key(0, "p", [1], s) for s in range(20_000)])
    tokens, logprobs = draw(logits, keys, 0, Sampling())
    shares = torch.bincount(tokens, minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 1 / 3, 1 / 6]), atol=0.018, rtol=0)
    assert math.isclose(logprobs[tokens == 2][0].item(), math.log(1 / 6), abs_tol=1e-6)


def test_gumbel_noise_has_the_moments_of_a_gumbel_and_no_correlation():
    # mean = Euler's 0.57722, variance = pi^2 / 6; over positions, rows and columns alike
    keys = torch.tensor([sample_key(1, "x", [2], s) for s in range(300)])
    noise = torch.stack([gumbel(keys, t, 300) for t in range(4)])
    n = noise.numel()
    assert abs(noise.mean().item() - 0.57722) < 5 * math.sqrt(1.645 / n)
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.03
    for a, b in (
        (noise[0], noise[1]),
        (noise[0, :-1], noise[0, 1:]),
        (noise[0][:, :-1], noise[0][:, 1:]),
    ):
        correlation = torch.corrcoef(torch.stack([a.reshape(-1), b.reshape(-1)]))[0, 1]
        assert abs(correlation.item()) < 5 / math.sqrt(a.numel())


def test_top_k_and_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert torch.isfinite(restrict(logits, 2, 1.0)).tolist() == [[True, True, False, False]]
    # top_p 0.6: 0.5 does not reach it, 0.8 does
    assert torch.isfinite(restrict(logits, 0, 0.6)).tolist() == [[True, True, False, False]]
    assert torch.isfinite(restrict(logits, 0, 0.5)).tolist() == [[True, False, False, False]]


def test_keys_differ_by_seed_purpose_prompt_and_sample():
    keys = {
        sample_key(seed, purpose, prompt, sample)
        for seed in (0, 1)
        for purpose in ("collect", "evaluate", "rollout/0", "rollout/1")
        for prompt in ([5, 6], [56])
        for sample in (0, 1)
    }
    assert len(keys) == 2 * 4 * 2 * 2 and all(0 <= k < 2**63 for k in keys)
