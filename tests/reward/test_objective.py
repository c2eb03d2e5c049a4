"""The objective against numbers worked by hand.

log sigmoid(0) = -ln 2 = -0.6931472; log sigmoid(1) = -0.3132617; log sigmoid(-1) = -1.3132617;
log sigmoid(2) = -0.1269280; log sigmoid(-2) = -2.1269280
"""

import math

import pytest
import torch

from reward.objective import reward_loss, tie_probability

NAN = math.nan


def loss_of(chosen, rejected, **options):
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}
    return reward_loss(torch.tensor(chosen), torch.tensor(rejected), **options)


def test_plain_pairs_are_minus_log_sigmoid_of_the_difference():
    # d = 2 and d = -1: (0.1269280 + 1.3132617) / 2 = 0.7200949
    loss, _ = loss_of([3.0, 0.0], [1.0, 1.0])
    assert loss.item() == pytest.approx(0.7200949, abs=1e-6)


def test_margin_asks_for_that_much_distance():
    # 3 - 1 - 2 = 0 -> ln 2;  2 - 1 - 0 = 1 -> 0.3132617;  mean 0.5032045
    loss, metrics = loss_of([3.0, 2.0], [1.0, 1.0], margin=[2.0, 0.0])
    assert loss.item() == pytest.approx(0.5032045, abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(1.5)  # reported before the margin is taken off


def test_label_prob_mixes_both_directions():
    # d = 1, p = 0.75: 0.75 * 0.3132617 + 0.25 * 1.3132617 = 0.5632617
    loss, _ = loss_of([2.0], [1.0], label_prob=[0.75])
    assert loss.item() == pytest.approx(0.5632617, abs=1e-6)


def test_a_row_without_label_prob_takes_the_label_smoothing():
    # d = 1 twice: p = 0.9 -> 0.3132617 + 0.1 = 0.4132617;  p = 1 given -> 0.3132617;  mean 0.3632617
    loss, _ = loss_of([2.0, 2.0], [1.0, 1.0], label_prob=[NAN, 1.0], label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.3632617, abs=1e-6)


def test_soft_label_is_least_where_sigmoid_of_the_gap_is_p():
    # stationary at d = logit(0.8) = ln 4; with margin 0.5 at ln 4 + 0.5
    chosen = torch.tensor([math.log(4) + 0.5], dtype=torch.float64, requires_grad=True)
    one = torch.tensor([0.8], dtype=torch.float64)
    loss, _ = reward_loss(
        chosen, torch.zeros_like(chosen), label_prob=one, margin=torch.full_like(one, 0.5)
    )
    loss.backward()
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_centring_pulls_the_sum_of_scores_to_zero():
    # d = 1 -> 0.3132617; 0.01 * (2 + 1)^2 = 0.09
    loss, _ = loss_of([2.0], [1.0], center_coefficient=0.01)
    assert loss.item() == pytest.approx(0.4032617, abs=1e-6)
    # already centred: nothing is added
    loss, _ = loss_of([0.5], [-0.5], center_coefficient=0.01)
    assert loss.item() == pytest.approx(0.3132617, abs=1e-6)


def test_weights_count_rows_and_the_mean_is_over_rows():
    # (2 * 0.3132617 + 0 * 1.3132617) / 2 = 0.3132617
    loss, metrics = loss_of([2.0, 0.0], [1.0, 1.0], weight=[2.0, 0.0])
    assert loss.item() == pytest.approx(0.3132617, abs=1e-6)
    assert metrics["accuracy"].item() == pytest.approx(0.5)  # metrics are not weighted


def test_two_micro_batches_average_to_the_whole_batch():
    c, r, w = (
        torch.randn(4, dtype=torch.float64),
        torch.randn(4, dtype=torch.float64),
        torch.tensor([1.0, 3, 0, 2]),
    )
    whole, _ = reward_loss(c, r, weight=w)
    halves = [reward_loss(c[i : i + 2], r[i : i + 2], weight=w[i : i + 2])[0] for i in (0, 2)]
    assert whole.item() == pytest.approx((halves[0] + halves[1]).item() / 2, abs=1e-12)


def test_metrics_count_a_tie_as_half():
    # right, tie, wrong -> 1.5 / 3; gaps 1, 0, -2 -> -1/3; rewards: (2+1+1 + 1+1+3)/6 = 1.5
    _, metrics = loss_of([2.0, 1.0, 1.0], [1.0, 1.0, 3.0])
    assert metrics["accuracy"].item() == pytest.approx(0.5)
    assert metrics["margin"].item() == pytest.approx(-1 / 3)
    assert metrics["reward"].item() == pytest.approx(1.5)


def test_gradient_of_one_pair_is_minus_sigmoid_of_minus_d():
    # dL/dr_c = -sigmoid(-1) = -0.2689414, dL/dr_r = +0.2689414
    c, r = torch.tensor([2.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    reward_loss(c, r)[0].backward()
    assert c.grad.item() == pytest.approx(-0.2689414, abs=1e-6)
    assert r.grad.item() == pytest.approx(0.2689414, abs=1e-6)


def test_bf16_scores_are_compared_in_fp32():
    # 3.0 - 1.0 - 1.999 = 0.001 would be 0 in bf16: ln 2 - 0.0005 = 0.6926473
    c, r = torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)
    loss, _ = reward_loss(c, r, margin=torch.tensor([1.999]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.6926473, abs=1e-6)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="rejected has shape"):
        reward_loss(torch.zeros(2, 1), torch.zeros(2))


# Davidson with v = 1.5 at d = 2 ln 2: exp(d/2) = 2, exp(-d/2) = 1/2, Z = 2 + 1.5 + 0.5 = 4, so that
# P(chosen) = 1/2, P(tie) = 3/8, P(rejected) = 1/8
TIE, GAP = math.log(1.5), 2 * math.log(2)


@pytest.mark.parametrize(
    ("label_prob", "tie_prob", "expected"),
    [(1.0, 0.0, math.log(2)), (0.5, 1.0, math.log(8 / 3)), (0.0, 0.0, math.log(8))],
)
def test_davidson_gives_three_outcomes_their_probabilities(label_prob, tie_prob, expected):
    loss, _ = loss_of([GAP], [0.0], label_prob=[label_prob], tie_prob=[tie_prob], log_tie=TIE)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert tie_probability(torch.tensor([GAP]), TIE).item() == pytest.approx(3 / 8, abs=1e-6)


def test_davidson_takes_shares_of_votes():
    # of eight votes 5 for chosen, 2 ties, 1 for rejected: label_prob 6/8, tie_prob 2/8
    # (5 ln 2 + 2 ln(8/3) + 1 ln 8) / 8 = 0.9383545
    loss, _ = loss_of([GAP], [0.0], label_prob=[0.75], tie_prob=[0.25], log_tie=TIE)
    expected = (5 * math.log(2) + 2 * math.log(8 / 3) + math.log(8)) / 8
    assert expected == pytest.approx(0.9383545, abs=1e-6)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_gradient_of_davidson_is_the_expected_lean_less_the_label_s():
    # dL/dd = ((P(chosen) - P(rejected)) - (a - b)) / 2: a win (3/8 - 1) / 2, a tie (3/8 - 0) / 2
    for label_prob, tie_prob, expected in ((1.0, 0.0, -0.3125), (0.5, 1.0, 0.1875)):
        c, r = torch.tensor([GAP], requires_grad=True), torch.zeros(1, requires_grad=True)
        more = {"label_prob": torch.tensor([label_prob]), "tie_prob": torch.tensor([tie_prob])}
        reward_loss(c, r, **more, log_tie=TIE)[0].backward()
        assert c.grad.item() == pytest.approx(expected, abs=1e-6)
        assert r.grad.item() == pytest.approx(-expected, abs=1e-6)


def test_davidson_without_ties_is_bradley_terry():
    plain, _ = loss_of([3.0, 0.0], [1.0, 1.0], label_prob=[0.8, NAN], label_smoothing=0.1)
    davidson, _ = loss_of(
        [3.0, 0.0], [1.0, 1.0], label_prob=[0.8, NAN], label_smoothing=0.1, log_tie=-60.0
    )
    assert davidson.item() == pytest.approx(plain.item(), abs=1e-6)


def test_a_tie_is_least_at_equal_scores_and_as_a_soft_label_too():
    for log_tie in (None, TIE):
        c = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        half, one = torch.full_like(c, 0.5), torch.ones_like(c)
        reward_loss(c, torch.zeros_like(c), label_prob=half, tie_prob=one, log_tie=log_tie)[
            0
        ].backward()
        assert c.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_offset_is_added_to_the_gap_and_to_nothing_else():
    # 2 - 1 - 1 + 2 = 2 -> 0.1269280; log_loss without the margin: 1 + 2 = 3 -> 0.0485874
    loss, metrics = loss_of([2.0], [1.0], margin=[1.0], offset=[2.0])
    assert loss.item() == pytest.approx(0.1269280, abs=1e-6)
    assert metrics["log_loss"].tolist() == pytest.approx([0.0485874], abs=1e-6)
    assert metrics["margin"].item() == 1.0


def test_log_loss_is_the_likelihood_alone():
    # d = 1: labels certain 0.3132617, p = 0.75 0.5632617; no weight, centring or smoothing
    _, metrics = loss_of(
        [2.0, 2.0],
        [1.0, 1.0],
        label_prob=[NAN, 0.75],
        weight=[2.0, 0.0],
        label_smoothing=0.2,
        center_coefficient=0.5,
    )
    assert metrics["log_loss"].tolist() == pytest.approx([0.3132617, 0.5632617], abs=1e-6)


def test_accuracy_is_that_of_the_pairs_with_a_winner():
    # right, no winner (and scored the wrong way round): 1 of 1
    _, metrics = loss_of([2.0, 0.0], [1.0, 5.0], label_prob=[NAN, 0.5])
    assert metrics["accuracy"].item() == 1.0
