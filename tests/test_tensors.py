import math

import torch

from rlhf.tensors import (
    explained_variance,
    masked_mean,
    masked_sum,
    masked_sum_rows,
    masked_whiten,
    pad_right,
    selected_logprobs,
)

NAN = float("nan")


def test_masked_mean_never_reads_what_is_masked():
    # (1 + 3) / 2 = 2, although a NaN stands under False
    values, mask = torch.tensor([[1.0, NAN, 3.0]]), torch.tensor([[True, False, True]])
    assert masked_mean(values, mask).item() == 2.0


def test_parts_of_a_mean_add_up_with_the_count_of_the_whole():
    # five tokens 1..5, cut 2 + 3: 3/5 + 12/5 = 3, while the mean of the parts' means is 2.75
    values, mask = torch.tensor([[1.0, 2, 3, 4, 5]]), torch.ones(1, 5, dtype=torch.bool)
    parts = [masked_mean(values[:, a:b], mask[:, a:b], 5) for a, b in ((0, 2), (2, 5))]
    assert math.isclose(sum(p.item() for p in parts), 3.0, abs_tol=1e-6)


def test_sums_of_rows_and_of_all_never_read_what_is_masked():
    # 1 + 3, nothing, 2 + 5: 4, 0, 7 and 11 in all
    values = torch.tensor([[1.0, 3.0, NAN], [NAN, NAN, NAN], [2.0, NAN, 5.0]])
    mask = torch.tensor([[True, True, False], [False] * 3, [True, False, True]])
    assert masked_sum_rows(values, mask).tolist() == [4.0, 0.0, 7.0]
    assert masked_sum(values, mask).item() == 11.0


def test_the_mean_of_nothing_is_zero():
    assert masked_mean(torch.tensor([[NAN]]), torch.tensor([[False]])).item() == 0.0


def test_a_masked_entry_gets_no_gradient():
    values = torch.tensor([[1.0, NAN]], requires_grad=True)
    masked_mean(values, torch.tensor([[True, False]])).backward()
    assert values.grad.tolist() == [[1.0, 0.0]]


def test_whiten_uses_the_population_variance_of_true_tokens():
    # 1 and 3: mean 2, variance 1 -> -1 and 1; the masked 100 changes nothing and becomes 0
    white = masked_whiten(torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(white, torch.tensor([[-1.0, 1.0, 0.0]]), atol=1e-6, rtol=0)


def test_whiten_without_shift_keeps_the_mean():
    white = masked_whiten(
        torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool), shift_mean=False
    )
    torch.testing.assert_close(white, torch.tensor([[1.0, 3.0]]), atol=1e-6, rtol=0)
    white = masked_whiten(
        torch.tensor([[2.0, 6.0]]), torch.ones(1, 2, dtype=torch.bool), shift_mean=False
    )
    torch.testing.assert_close(white, torch.tensor([[3.0, 5.0]]), atol=1e-6, rtol=0)  # mean 4, sd 2


def test_selected_logprobs_and_entropy_at_a_temperature():
    # logits (0, ln 3) -> p = (1/4, 3/4); at temperature 2 the odds are sqrt 3
    logits = torch.tensor([[0.0, math.log(3.0)]])
    logprob, entropy = selected_logprobs(logits, torch.tensor([1]))
    assert math.isclose(logprob.item(), math.log(0.75), abs_tol=1e-6)
    assert math.isclose(
        entropy.item(), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), abs_tol=1e-6
    )
    logprob, _ = selected_logprobs(logits, torch.tensor([1]), temperature=2.0)
    assert math.isclose(logprob.item(), math.log(3**0.5 / (1 + 3**0.5)), abs_tol=1e-6)


def test_pad_right():
    assert pad_right([[1, 2], [3]], 0).tolist() == [[1, 2], [3, 0]]


def test_explained_variance():
    # returns 1, 3 (variance 1); values 1, 2: residual 0, 1 with variance 1/4 -> 3/4
    mask = torch.ones(1, 2, dtype=torch.bool)
    got = explained_variance(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]), mask)
    assert math.isclose(got.item(), 0.75, abs_tol=1e-6)
