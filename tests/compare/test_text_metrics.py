import math
from contextlib import nullcontext

import pytest
import torch

from rlhf.compare.text_metrics import (
    TextLoss,
    distinct_n,
    encode_texts,
    perplexity,
    repetition,
    text_losses,
)
from rlhf.data.records import Instruction
from rlhf.model.adapters import lora_config
from rlhf.model.loading import load_model
from rlhf.ranks.distributed import DistributedContext
from rlhf.roles.one_base import Roles


def test_distinct_n_by_hand():
    # words: a b a b a b alone -> 3 different of 7; pairs: ab ba ab | ab -> 2 of 4; triples: aba bab
    # -> 2 of 2
    texts = ["a b a b", "a b", "alone"]
    assert distinct_n(texts, 1) == pytest.approx(3 / 7, abs=1e-12)
    assert distinct_n(texts, 2) == 0.5
    assert distinct_n(texts, 3) == 1.0
    assert distinct_n(texts, 5) == 0.0 and distinct_n([], 1) == 0.0


def test_repetition_is_the_share_of_what_came_before():
    # a b c d a b c d: abcd bcda cdab dabc abcd -> the fifth of five came before
    assert repetition("a b c d a b c d") == pytest.approx(0.2, abs=1e-12)
    # of three the second and third
    assert repetition("no no no no no no") == pytest.approx(2 / 3, abs=1e-12)
    assert repetition("a b c d e f") == 0.0
    assert repetition("no no no") == 0.0 and repetition("") == 0.0


def test_perplexity_is_exp_of_the_mean_over_tokens_with_an_error_over_groups():
    # x: 2 + 4 nats on 1 + 3 tokens, y: 6 nats on 2 tokens.  L = 12 / 6 = 2; residuals x: 6 - 2*4 = -2, y: 6 - 2*2 = 2
    # se(L) = sqrt(2/1 * (4 + 4)) / 6 = 4/6
    found, se = perplexity([TextLoss("x", 2.0, 1), TextLoss("y", 6.0, 2), TextLoss("x", 4.0, 3)])
    assert found == pytest.approx(math.exp(2), abs=1e-9)
    assert se == pytest.approx(math.exp(2) * 4 / 6, abs=1e-9)
    # of one group nothing is known of its error
    assert math.isnan(perplexity([TextLoss("x", 2.0, 1)])[1])


def test_the_error_of_a_perplexity_is_that_of_repeated_draws():
    # the delta method against 2,000 fresh draws of 40 groups: 7 % of the spread is four standard
    # errors of it
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 9, (2000, 40), generator=rng)
    nll = tokens * (1.5 + 0.5 * torch.randn(2000, 40, generator=rng))
    found = [
        perplexity([TextLoss(str(g), float(nll[i, g]), int(tokens[i, g])) for g in range(40)])
        for i in range(2000)
    ]
    spread = torch.tensor([value for value, _ in found]).std().item()
    assert sum(se for _, se in found) / len(found) == pytest.approx(spread, rel=0.07)


@pytest.fixture()
def roles(sft_path):
    roles = Roles(load_model(sft_path), lora_config())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in roles.parameters_of("policy"):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return roles


def test_text_losses_are_those_of_the_policy_in_whose_context_they_are_read(roles, tokenizer):
    texts = [
        ("where is my parcel?", "on its way"),
        ("hello", "we are happy to help you today"),
        ("a", "b"),
    ]
    records = [
        Instruction(prompt=[{"role": "user", "content": p}], response=r, group=g)
        for (p, r), g in zip(texts, "xyx", strict=True)
    ]
    rows = encode_texts(records, tokenizer, 99, 99)
    assert [row["group"] for row in rows] == ["x", "y", "x"]
    assert all(row["response_ids"][-1] == tokenizer.eos_token_id for row in rows)
    by_role = {}
    for name in ("policy", "reference"):
        found = text_losses(
            roles.trunk,
            lambda n=name: roles.use(n),
            rows,
            tokenizer.pad_token_id,
            DistributedContext(),
            batch_size=2,
        )
        by_role[name] = [loss.nll for loss in found]
        for row, loss in zip(rows, found, strict=True):
            with torch.no_grad(), roles.use(name):
                logits = roles.trunk(
                    torch.tensor([row["prompt_ids"] + row["response_ids"]])
                ).logits[0]
            logprobs = torch.log_softmax(logits[len(row["prompt_ids"]) - 1 : -1], -1)
            expected = -logprobs.gather(-1, torch.tensor(row["response_ids"])[:, None]).sum().item()
            assert loss.nll == pytest.approx(expected, abs=1e-3)
            assert (loss.group, loss.tokens) == (row["group"], len(row["response_ids"]))
    assert by_role["policy"] != pytest.approx(by_role["reference"], abs=0.01)


def test_texts_that_are_too_long_are_left_out(tokenizer):
    records = [
        Instruction(prompt=[{"role": "user", "content": "a"}], response=r) for r in ("b", "b " * 50)
    ]
    assert len(encode_texts(records, tokenizer, 99, 20)) == 1
    assert text_losses(torch.nn.Linear(1, 1), nullcontext, [], 0, DistributedContext()) == []
