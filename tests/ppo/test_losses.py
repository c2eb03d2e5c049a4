import math

import torch

from rlhf.ppo.advantages import KL_ESTIMATORS
from rlhf.ppo.losses import kl_loss, policy_loss, ptx_loss, value_loss

ONE = torch.tensor([[True]])


def token(x):
    return torch.tensor([[float(x)]])


def test_clip_holds_a_good_action_at_one_plus_epsilon():
    # r = e, A = +1, eps = 0.2  ->  min(e, 1.2) = 1.2  ->  loss = -1.2
    loss, metrics = policy_loss(token(1), token(0), token(1), ONE, 0.2)
    assert math.isclose(loss.item(), -1.2, abs_tol=1e-6)
    assert metrics["ppo/clip_fraction"].item() == 1.0


def test_clip_does_not_hold_a_bad_action_that_became_likelier():
    # r = e, A = -1: min(-e, -1.2) = -e  ->  loss = e, nothing clipped
    loss, metrics = policy_loss(token(1), token(0), token(-1), ONE, 0.2)
    assert math.isclose(loss.item(), math.e, abs_tol=1e-5)
    assert metrics["ppo/clip_fraction"].item() == 0.0


def test_clip_holds_a_bad_action_at_one_minus_epsilon():
    # r = 1/e, A = -1: min(-1/e, -0.8) = -0.8  ->  loss = 0.8, and no gradient
    logprobs = token(-1).requires_grad_()
    loss, _ = policy_loss(logprobs, token(0), token(-1), ONE, 0.2)
    loss.backward()
    assert math.isclose(loss.item(), 0.8, abs_tol=1e-6) and logprobs.grad.item() == 0.0


def test_clip_higher_moves_the_upper_bound_alone():
    # eps 0.2, high 0.5.  A = +1: r = e -> 1.5; r = 1.4 -> 1.4, though above 1.2; r = 1/e -> 1/e
    for logprob, expected in ((1.0, 1.5), (math.log(1.4), 1.4), (-1.0, 1 / math.e)):
        loss, _ = policy_loss(token(logprob), token(0), token(1), ONE, 0.2, clip_range_high=0.5)
        assert math.isclose(loss.item(), -expected, abs_tol=1e-6)
    # A = -1: r = 1/e -> held at 0.8, not at 0.5; r = e -> e
    for logprob, expected in ((-1.0, 0.8), (1.0, math.e)):
        loss, _ = policy_loss(token(logprob), token(0), token(-1), ONE, 0.2, clip_range_high=0.5)
        assert math.isclose(loss.item(), expected, abs_tol=1e-5)


def test_clip_fraction_counts_tokens_that_are_held():
    # ratios 1.3, 1.3, 1.1 with A = 1, -1, 1 and a masked e: only the first is held
    logprobs = torch.tensor([[math.log(1.3), math.log(1.3), math.log(1.1), 1.0]])
    mask = torch.tensor([[True, True, True, False]])
    _, metrics = policy_loss(
        logprobs, torch.zeros(1, 4), torch.tensor([[1.0, -1.0, 1.0, 1.0]]), mask, 0.2
    )
    assert math.isclose(metrics["ppo/clip_fraction"].item(), 1 / 3, abs_tol=1e-6)
    assert math.isclose(metrics["ppo/ratio"].item(), (1.3 + 1.3 + 1.1) / 3, abs_tol=1e-6)
    # k3 of new against old: r - 1 - ln r, for 1.3 twice and 1.1
    apart = (2 * (0.3 - math.log(1.3)) + 0.1 - math.log(1.1)) / 3
    assert math.isclose(metrics["ppo/approx_kl"].item(), apart, abs_tol=1e-6)


def test_gradient_at_ratio_one_is_minus_the_advantage():
    # d/dlogp of -r A at r = 1 is -A; two tokens, mean over 2, the third is masked
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    loss, metrics = policy_loss(
        logprobs, logprobs.detach(), torch.tensor([[2.0, -4.0, 8.0]]), mask, 0.2
    )
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0, 2.0, 0.0]]), atol=1e-6, rtol=0)
    assert metrics["ppo/approx_kl"].item() == 0.0 and metrics["ppo/ratio"].item() == 1.0


def test_value_loss_takes_the_worse_of_clipped_and_unclipped():
    # V = 2, V_old = 0, R = 3, eps = 0.5: (2-3)^2 = 1; clipped V = 0.5: 6.25  ->  1/2 * 6.25
    loss, metrics = value_loss(token(2), token(0), token(3), ONE, 0.5)
    assert (
        math.isclose(loss.item(), 3.125, abs_tol=1e-6)
        and metrics["value/clip_fraction"].item() == 1.0
    )
    # V = 2, V_old = 0, R = -1: 9 against 2.25 -> 1/2 * 9
    loss, metrics = value_loss(token(2), token(0), token(-1), ONE, 0.5)
    assert (
        math.isclose(loss.item(), 4.5, abs_tol=1e-6)
        and metrics["value/clip_fraction"].item() == 0.0
    )


def test_value_loss_without_clipping():
    loss, metrics = value_loss(token(2), token(0), token(3), ONE, None)
    assert math.isclose(loss.item(), 0.5, abs_tol=1e-6) and metrics == {}


def test_parts_add_up_with_the_count_of_the_step():
    generator = torch.Generator().manual_seed(0)
    new, old, advantage = (
        torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    mask = torch.rand(8, 5, generator=generator) < 0.6
    whole, _ = policy_loss(new, old, advantage, mask, 0.2)
    count = mask.sum()
    parts = [
        policy_loss(new[i], old[i], advantage[i], mask[i], 0.2, count)[0]
        for i in ([0, 1, 2], [3], [4, 5, 6, 7])
    ]
    torch.testing.assert_close(sum(parts), whole, atol=1e-12, rtol=0)


P, Q = (0.5, 0.3, 0.2), (0.2, 0.2, 0.6)  # policy and reference over three tokens


def expected_gradient(name):
    """Of the loss with respect to the policy's logits, each token as often as the policy samples
    it.
    """
    logits = torch.tensor(P, dtype=torch.float64).log().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    weights = logprobs.detach().exp()
    total = 0.0
    for a in range(3):
        other = torch.tensor([[math.log(Q[a])]], dtype=torch.float64)
        total = total + weights[a] * kl_loss(
            logprobs[a].reshape(1, 1), other, ONE, KL_ESTIMATORS[name]
        )
    total.backward()
    return logits.grad.tolist()


def test_k2_in_the_loss_has_the_gradient_of_the_kl_of_one_token():
    # d/dz_a sum_b p_b ln(p_b / q_b) = p_a (ln(p_a / q_a) - KL)
    kl = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))
    for got, p, q in zip(expected_gradient("k2"), P, Q, strict=True):
        assert math.isclose(got, p * (math.log(p / q) - kl), abs_tol=1e-12)


def test_k3_in_the_loss_has_the_gradient_of_the_kl_the_other_way_round():
    # d/dz_a -sum_b q_b ln p_b = p_a - q_a
    for got, p, q in zip(expected_gradient("k3"), P, Q, strict=True):
        assert math.isclose(got, p - q, abs_tol=1e-12)


def test_k2_in_the_loss_lacks_what_the_first_token_does_to_the_kl_of_the_second():
    # Two tokens of two kinds. First: p (1/2, 1/2), q (3/4, 1/4). Second after a: p (4/5, 1/5),
    # after b: p (1/2, 1/2), q (1/2, 1/2) after both. KL of the second: D_a = ln 2 + 4/5 ln 4/5 +
    # 1/5 ln 1/5 = 0.1927448 after a, 0 after b. d/dz_a of the sequence KL = p_a (ln(p_a / q_a) -
    # KL_1) + p_a p_b (D_a - D_b); k2 in the loss has the first part.
    half, ref = (
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        torch.tensor([[0.75, 0.25], [0.5, 0.5]]),
    )
    first = half.log().requires_grad_()
    second = torch.tensor([[0.8, 0.2], [0.5, 0.5]], dtype=torch.float64).log()
    total = 0.0
    for a in range(2):
        for b in range(2):
            logprobs = torch.stack([torch.log_softmax(first, 0)[a], second[a, b]])[None]
            other = torch.stack([ref[0, a], ref[1, b]]).log().double()[None]
            weight = 0.5 * second[a, b].exp()
            loss = kl_loss(
                logprobs, other, torch.ones(1, 2, dtype=torch.bool), KL_ESTIMATORS["k2"], count=1
            )
            total = total + weight * loss
    total.backward()
    kl_first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    of_token = 0.5 * (math.log(0.5 / 0.75) - kl_first)
    of_sequence = of_token + 0.25 * (math.log(2) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert math.isclose(first.grad[0].item(), of_token, abs_tol=1e-7)
    assert math.isclose(of_sequence - of_token, 0.25 * 0.1927448, abs_tol=1e-7)


def test_k1_in_the_loss_pulls_nowhere():
    assert all(math.isclose(g, 0.0, abs_tol=1e-12) for g in expected_gradient("k1"))


def test_kl_loss_is_the_mean_over_true_tokens_of_the_step():
    logprobs, mask = torch.tensor([[1.0, 2.0, 100.0]]), torch.tensor([[True, True, False]])
    given = (logprobs, torch.zeros(1, 3), mask, KL_ESTIMATORS["k1"])
    assert math.isclose(kl_loss(*given).item(), 1.5, abs_tol=1e-6)
    assert math.isclose(kl_loss(*given, 6).item(), 0.5, abs_tol=1e-6)


def test_ptx_loss_is_minus_the_mean_log_probability():
    # ln 1/2 and ln 1/8, the third masked: (ln 2 + ln 8) / 2 = 2 ln 2; as part of a step of 8 tokens
    # a quarter of it
    logprobs = torch.tensor([[math.log(1 / 2), math.log(1 / 8), -50.0]])
    mask = torch.tensor([[True, True, False]])
    assert math.isclose(ptx_loss(logprobs, mask).item(), 2 * math.log(2), abs_tol=1e-6)
    assert math.isclose(ptx_loss(logprobs, mask, 8).item(), math.log(2) / 2, abs_tol=1e-6)


def test_padding_gives_k3_in_the_loss_no_gradient_that_is_no_number():
    """Under False stand log p of the pad token, here -95, and 0 for the reference: exp(95)
    overflows float32.
    """
    logprobs = torch.tensor([[-1.0, -95.0]], requires_grad=True)
    reference, mask = torch.tensor([[-1.1, 0.0]]), torch.tensor([[True, False]])
    kl_loss(logprobs, reference, mask, KL_ESTIMATORS["k3"]).backward()
    # d/dx (exp(r - x) - 1 - (r - x)) = 1 - exp(r - x) = 1 - exp(-0.1) = 0.0951626
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0951626, 0.0]]), atol=1e-6, rtol=0)
