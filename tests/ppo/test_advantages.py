import math

import pytest
import torch

from rlhf.ppo.advantages import (
    KL_ESTIMATORS,
    KLController,
    RunningMoments,
    gae,
    grpo,
    kl_k1,
    kl_k2,
    kl_k3,
    reinforce,
    rloo,
    shape_scores,
    token_rewards,
)
from rlhf.tensors import masked_whiten

MASK = torch.tensor([[True, True, True], [True, True, False]])


def close(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), atol=1e-6, rtol=0)


def test_the_three_estimates_of_one_token():
    # p = 1/2, p_ref = 1/4: k1 = ln 2; k2 = (ln 2)^2 / 2; r = p_ref / p = 1/2, k3 = (1/2 - 1) -
    # ln(1/2) = ln 2 - 1/2
    p, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert math.isclose(kl_k1(p, ref).item(), math.log(2), abs_tol=1e-6)
    assert math.isclose(kl_k2(p, ref).item(), math.log(2) ** 2 / 2, abs_tol=1e-6)
    assert math.isclose(kl_k3(p, ref).item(), math.log(2) - 0.5, abs_tol=1e-6)


def test_the_other_way_round_k1_is_negative_and_k2_and_k3_are_not():
    # p = 1/4, p_ref = 1/2: k1 = -ln 2; k2 as before; r = 2, k3 = 1 - ln 2
    p, ref = torch.tensor([math.log(0.25)]), torch.tensor([math.log(0.5)])
    assert math.isclose(kl_k1(p, ref).item(), -math.log(2), abs_tol=1e-6)
    assert math.isclose(kl_k2(p, ref).item(), math.log(2) ** 2 / 2, abs_tol=1e-6)
    assert math.isclose(kl_k3(p, ref).item(), 1 - math.log(2), abs_tol=1e-6)


def test_k1_and_k3_have_the_true_kl_as_their_mean_and_k2_another():
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln 2/3 = 0.1438;
    # k2: 1/2 (ln 2)^2 / 2 + 1/2 (ln 2/3)^2 / 2 = 0.1612
    p, ref = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    truth = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    for estimate in (kl_k1, kl_k3):
        assert math.isclose((p.exp() * estimate(p, ref)).sum().item(), truth, abs_tol=1e-6)
    biased = 0.25 * (math.log(2) ** 2 + math.log(2 / 3) ** 2)
    assert math.isclose((p.exp() * kl_k2(p, ref)).sum().item(), biased, abs_tol=1e-6)


def test_the_names_are_those_of_the_estimators():
    assert {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3} == KL_ESTIMATORS


def test_scores_are_normalised_then_clipped_then_replaced_then_charged_for_length():
    # mean 2, std 4: (10, -10, 3, 7) -> (2, -3, 0.25, 1.25); clip 1: (1, -1, 0.25, 1); the third has
    # no end: -5; minus 0.1 a token: lengths 3, 1, 4, 10 -> (0.7, -1.1, -5.4, 0)
    got = shape_scores(
        torch.tensor([10.0, -10.0, 3.0, 7.0]), torch.tensor([True, True, False, True]), torch.tensor([3, 1, 4, 10]),
        moments=(2.0, 4.0), clip=1.0, missing_eos_score=-5.0, length_penalty=0.1,
    )  # fmt: skip
    close(got, [0.7, -1.1, -5.4, 0.0])


@pytest.mark.parametrize(
    "options,expected",
    [
        ({}, [10.0, -10.0]),
        ({"moments": (2.0, 4.0)}, [2.0, -3.0]),
        ({"clip": 4.0}, [4.0, -4.0]),
        # no more than 0, and it was less: not ending never pays
        ({"missing_eos_score": 0.0}, [10.0, -10.0]),
        ({"missing_eos_score": -11.0}, [10.0, -11.0]),
        ({"missing_eos_score": 0.0, "missing_eos": "replace"}, [10.0, 0.0]),
        ({"missing_eos_score": -3.0, "missing_eos": "subtract"}, [10.0, -13.0]),
        ({"length_penalty": 0.5}, [8.5, -12.0]),
        ({"length_penalty": -0.5}, [11.5, -8.0]),  # paid for length
    ],
)
def test_each_step_of_shaping_is_switched_on_alone(options, expected):
    # the second response has not ended; lengths 3 and 4
    got = shape_scores(
        torch.tensor([10.0, -10.0]), torch.tensor([True, False]), torch.tensor([3, 4]), **options
    )
    close(got, expected)


def test_the_score_stands_on_the_last_true_token():
    # kl_coef 0.1: tokens get -0.1 kl; row 0 has 3 tokens, row 1 has 2 (its third column stays 0,
    # whatever is there)
    kl = torch.tensor([[1.0, 2.0, 3.0], [1.0, -1.0, 9.0]])
    close(
        token_rewards(torch.tensor([5.0, -2.0]), kl, MASK, 0.1),
        [[-0.1, -0.2, 4.7], [-0.1, -1.9, 0.0]],
    )


def test_without_a_kl_coefficient_rewards_are_the_score_alone():
    kl = torch.tensor([[1.0, 2.0, 3.0], [1.0, -1.0, math.nan]])
    close(
        token_rewards(torch.tensor([5.0, -2.0]), kl, MASK, 0.0), [[0.0, 0.0, 5.0], [0.0, -2.0, 0.0]]
    )


def test_whitened_rewards_keep_their_mean():
    # 1, 3 and 2, 6, the 9 is masked: mean 3, population variance (4 + 0 + 1 + 9) / 4 = 3.5
    rewards = torch.tensor([[1.0, 3.0, 9.0], [2.0, 6.0, 9.0]])
    mask = torch.tensor([[True, True, False]] * 2)
    white = masked_whiten(rewards, mask, shift_mean=False)
    s = math.sqrt(3.5)
    close(white, [[3 - 2 / s, 3.0, 0.0], [3 - 1 / s, 3 + 3 / s, 0.0]])


def test_gae_by_hand():
    # gamma 1/2, lambda 1/2, row 0: rewards 0, 0, 1; values 1, 2, 4; after the end 0
    #   delta_2 = 1 - 4 = -3;  delta_1 = 0 + 2 - 2 = 0;  delta_0 = 0 + 1 - 1 = 0
    #   A_2 = -3;  A_1 = 0 + 1/4 * -3 = -0.75;  A_0 = 1/4 * -0.75 = -0.1875;  R = A + V
    # row 1 ends after two tokens: rewards 0, 2; values 1, 3 (NaN stands behind the end, and is
    # never read)
    #   delta_1 = 2 - 3 = -1;  delta_0 = 0 + 1.5 - 1 = 0.5;  A_1 = -1;  A_0 = 0.5 - 0.25 = 0.25
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, math.nan]])
    values = torch.tensor([[1.0, 2.0, 4.0], [1.0, 3.0, math.nan]])
    advantages, returns = gae(rewards, values, MASK, 0.5, 0.5)
    close(advantages, [[-0.1875, -0.75, -3.0], [0.25, -1.0, 0.0]])
    close(returns, [[0.8125, 1.25, 1.0], [1.25, 2.0, 0.0]])


def test_gae_with_lambda_one_is_return_minus_value():
    # gamma 1, lambda 1: A_t = sum of the rewards from t on, minus V_t
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, -1.0, 4.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    close(advantages, [[5.5, 6.0, -1.0]])
    close(returns, [[6.0, 5.0, 3.0]])


def test_gae_with_lambda_zero_is_the_error_of_one_step():
    # gamma 1: delta = 1 - 1 - 0.5, 2 + 4 - -1, 3 - 4
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, -1.0, 4.0]])
    close(
        gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.0)[0], [[-0.5, 7.0, -1.0]]
    )


# Two prompts, rows interleaved. Totals: prompt 7: 1 + 2 = 3, 6, 0; prompt 4: 10, 4 (a 9 or a NaN
# stands under False)
GROUP = torch.tensor([7, 4, 7, 4, 7])
REWARDS = torch.tensor(
    [[1.0, 2.0, 9.0], [4.0, 5.0, 1.0], [6.0, math.nan, 9.0], [1.0, 3.0, 9.0], [0.0, 0.0, 0.0]]
)
RAGGED = torch.tensor(
    [
        [True, True, False],
        [True, True, True],
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
)


def on_tokens(*rows):
    return [[a if t else 0.0 for t in mask] for a, mask in zip(rows, RAGGED.tolist(), strict=True)]


def test_rloo_compares_with_the_mean_of_the_others():
    # prompt 7: 3 - (6+0)/2 = 0; 6 - (3+0)/2 = 4.5; 0 - (3+6)/2 = -4.5.  prompt 4: 10 - 4 = 6; 4 - 10 = -6
    close(rloo(REWARDS, RAGGED, GROUP), on_tokens(0.0, 6.0, 4.5, -6.0, -4.5))


def test_grpo_divides_by_the_deviation_of_the_group():
    # prompt 7: mean 3, squares 0 + 9 + 9, std sqrt(18 / 2) = 3.  prompt 4: mean 7, squares 9 + 9, std sqrt 18
    three, root = 3 / (3 + 1e-4), 3 / (math.sqrt(18) + 1e-4)
    close(grpo(REWARDS, RAGGED, GROUP), on_tokens(0.0, root, three, -root, -three))


def test_grpo_of_a_group_that_agrees_is_zero():
    same = torch.tensor([[2.0], [2.0]])
    close(grpo(same, torch.ones(2, 1, dtype=torch.bool), torch.tensor([0, 0])), [[0.0], [0.0]])


def test_reinforce_subtracts_the_baseline():
    # totals 3, 10, 6, 4, 0 minus 2.5
    close(reinforce(REWARDS, RAGGED, 2.5), on_tokens(0.5, 7.5, 3.5, 1.5, -2.5))


def test_moments_of_merged_batches_are_those_of_all_numbers():
    # 1, 2, 3 | 10 | 4, 4: mean 4, squared deviations 9 + 4 + 1 + 36 + 0 + 0 = 50
    moments = RunningMoments()
    for batch in ([1.0, 2.0, 3.0], [10.0], [4.0, 4.0]):
        moments.update(torch.tensor(batch))
    assert moments.count == 6
    assert math.isclose(moments.mean, 4.0, abs_tol=1e-12)
    assert math.isclose(moments.std, math.sqrt(50 / 6), abs_tol=1e-12)
    whole = RunningMoments()
    whole.update(torch.tensor([1.0, 2.0, 3.0, 10.0, 4.0, 4.0]))
    assert math.isclose(whole.mean, moments.mean, abs_tol=1e-12) and math.isclose(
        whole.std, moments.std, abs_tol=1e-12
    )
    assert RunningMoments(**moments.state_dict()) == moments


def test_moments_far_from_zero_are_exact():
    # 1e8 + (0, 1, 2): mean 1e8 + 1, variance 2/3; sum of squares minus square of the sum would lose
    # it all
    moments = RunningMoments()
    for number in (0.0, 1.0, 2.0):
        moments.update(torch.tensor([1e8 + number], dtype=torch.float64))
    assert moments.mean == 1e8 + 1 and math.isclose(moments.std, math.sqrt(2 / 3), rel_tol=1e-9)


def test_the_deviation_of_equal_numbers_is_taken_as_one():
    moments = RunningMoments()
    assert moments.std == 1.0
    moments.update(torch.tensor([3.0, 3.0]))
    assert moments.mean == 3.0 and moments.std == 1.0


def test_adaptive_controller_moves_by_the_clipped_error():
    # target 6, horizon 100, 50 responses: KL 6.6 -> e = 0.1 -> x 1.05; 60 -> clipped to 0.2 -> x
    # 1.1; 0 -> x 0.9
    for kl, factor in ((6.6, 1.05), (60.0, 1.1), (0.0, 0.9)):
        controller = KLController(0.2, target=6.0, horizon=100)
        controller.update(kl, 50)
        assert math.isclose(controller.coef, 0.2 * factor, abs_tol=1e-6)


def test_fixed_controller_stays():
    controller = KLController(0.2)
    controller.update(100.0, 1000)
    assert controller.coef == 0.2
