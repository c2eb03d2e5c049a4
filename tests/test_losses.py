import math

import torch

from rlhf.losses import policy_loss, value_loss

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


def test_gradient_at_ratio_one_is_minus_the_advantage():
    # d/dlogp of -r A at r = 1 is -A; two tokens, mean over 2, the third is masked
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    loss, metrics = policy_loss(logprobs, logprobs.detach(), torch.tensor([[2.0, -4.0, 8.0]]), mask, 0.2)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0, 2.0, 0.0]]), atol=1e-6, rtol=0)
    assert metrics["ppo/approx_kl"].item() == 0.0 and metrics["ppo/ratio"].item() == 1.0


def test_value_loss_takes_the_worse_of_clipped_and_unclipped():
    # V = 2, V_old = 0, R = 3, eps = 0.5: (2-3)^2 = 1; clipped V = 0.5: 6.25  ->  1/2 * 6.25
    loss, metrics = value_loss(token(2), token(0), token(3), ONE, 0.5)
    assert math.isclose(loss.item(), 3.125, abs_tol=1e-6) and metrics["value/clip_fraction"].item() == 1.0
    # V = 2, V_old = 0, R = -1: 9 against 2.25 -> 1/2 * 9
    loss, metrics = value_loss(token(2), token(0), token(-1), ONE, 0.5)
    assert math.isclose(loss.item(), 4.5, abs_tol=1e-6) and metrics["value/clip_fraction"].item() == 0.0


def test_value_loss_without_clipping():
    loss, metrics = value_loss(token(2), token(0), token(3), ONE, None)
    assert math.isclose(loss.item(), 0.5, abs_tol=1e-6) and metrics == {}


def test_parts_add_up_with_the_count_of_the_step():
    generator = torch.Generator().manual_seed(0)
    new, old, advantage = (torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(8, 5, generator=generator) < 0.6
    whole, _ = policy_loss(new, old, advantage, mask, 0.2)
    count = mask.sum()
    parts = [policy_loss(new[i], old[i], advantage[i], mask[i], 0.2, count)[0] for i in ([0, 1, 2], [3], [4, 5, 6, 7])]
    torch.testing.assert_close(sum(parts), whole, atol=1e-12, rtol=0)
