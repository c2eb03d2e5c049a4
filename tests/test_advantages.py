import math

import torch

from rlhf.advantages import KLController, gae, kl_k1, kl_k3, token_rewards

MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_k1_and_k3_of_one_token():
    # p = 1/2, p_ref = 1/4: k1 = ln 2; r = 1/2, k3 = (1/2 - 1) - ln(1/2) = ln 2 - 1/2
    p, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert math.isclose(kl_k1(p, ref).item(), math.log(2), abs_tol=1e-6)
    assert math.isclose(kl_k3(p, ref).item(), math.log(2) - 0.5, abs_tol=1e-6)


def test_k1_and_k3_have_the_true_kl_as_their_mean():
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln 2/3
    p, ref = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    truth = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    for estimate in (kl_k1, kl_k3):
        assert math.isclose((p.exp() * estimate(p, ref)).sum().item(), truth, abs_tol=1e-6)


def test_the_score_stands_on_the_last_true_token():
    # kl_coef 0.1: tokens get -0.1 kl; row 0 has 3 tokens, row 1 has 2 (its third column stays 0, whatever is there)
    kl = torch.tensor([[1.0, 2.0, 3.0], [1.0, -1.0, 9.0]])
    rewards = token_rewards(torch.tensor([5.0, -2.0]), kl, MASK, 0.1)
    expected = torch.tensor([[-0.1, -0.2, 4.7], [-0.1, -1.9, 0.0]])
    torch.testing.assert_close(rewards, expected, atol=1e-6, rtol=0)


def test_gae_by_hand():
    # gamma 1/2, lambda 1/2, row 0: rewards 0, 0, 1; values 1, 2, 4; after the end 0
    #   delta_2 = 1 - 4 = -3;  delta_1 = 0 + 2 - 2 = 0;  delta_0 = 0 + 1 - 1 = 0
    #   A_2 = -3;  A_1 = 0 + 1/4 * -3 = -0.75;  A_0 = 1/4 * -0.75 = -0.1875;  R = A + V
    # row 1 ends after two tokens: rewards 0, 2; values 1, 3 (a 7 stands behind the end)
    #   delta_1 = 2 - 3 = -1;  delta_0 = 0 + 1.5 - 1 = 0.5;  A_1 = -1;  A_0 = 0.5 - 0.25 = 0.25
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 9.0]])
    values = torch.tensor([[1.0, 2.0, 4.0], [1.0, 3.0, 7.0]])
    advantages, returns = gae(rewards, values, MASK, 0.5, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[-0.1875, -0.75, -3.0], [0.25, -1.0, 0.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, torch.tensor([[0.8125, 1.25, 1.0], [1.25, 2.0, 0.0]]), atol=1e-6, rtol=0)


def test_gae_with_lambda_one_is_return_minus_value():
    # gamma 1, lambda 1: A_t = sum of the rewards from t on, minus V_t
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, -1.0, 4.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    torch.testing.assert_close(returns, torch.tensor([[6.0, 5.0, 3.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(advantages, torch.tensor([[5.5, 6.0, -1.0]]), atol=1e-6, rtol=0)


def test_adaptive_controller_moves_by_the_clipped_error():
    # target 6, horizon 100, 50 responses: KL 6.6 -> e = 0.1 -> x 1.05; 60 -> clipped to 0.2 -> x 1.1; 0 -> x 0.9
    for kl, factor in ((6.6, 1.05), (60.0, 1.1), (0.0, 0.9)):
        controller = KLController(0.2, target=6.0, horizon=100)
        controller.update(kl, 50)
        assert math.isclose(controller.coef, 0.2 * factor, abs_tol=1e-6)


def test_fixed_controller_stays():
    controller = KLController(0.2)
    controller.update(100.0, 1000)
    assert controller.coef == 0.2
