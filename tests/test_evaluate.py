import math
from types import SimpleNamespace

import pytest
import torch

from rlhf import stages
from rlhf.data.encode import encode_prompts
from rlhf.data.records import Prompt, Scores
from rlhf.engines.hf import generate
from rlhf.engines.sampling import Sampling
from rlhf.evaluate import (
    EvalRow,
    Evaluation,
    eos_probability,
    knowledge_of_ends,
    sample_table,
    summarise,
)
from rlhf.model.adapters import lora_config
from rlhf.model.loading import load_model
from rlhf.options.shared import SamplingConfig
from rlhf.ranks.distributed import DistributedContext
from rlhf.roles.one_base import Roles
from rlhf.stats import clustered_se


def by_length(samples):
    totals = [float(len(ids)) for ids in samples.response_ids]
    return Scores(totals, {"length": totals, "odd": [t if t % 2 else math.nan for t in totals]})


@pytest.fixture()
def roles(sft_path):
    """A policy that has moved away from its reference."""
    roles = Roles(load_model(sft_path), lora_config())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in roles.parameters_of("policy"):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return roles


def evaluation(tokenizer, **more):
    records = [
        Prompt(prompt=[{"role": "user", "content": t}], metadata={"item": t})
        for t in ("one", "three two")
    ]
    values = {
        "prompts": encode_prompts(records, tokenizer, 99),
        "tokenizer": tokenizer,
        "stop_ids": [2, *range(3, 320, 9)],
        "sampling": Sampling(max_new_tokens=6, temperature=0.7),
        "scorer": by_length,
        "samples_per_prompt": 2,
    }
    return Evaluation(**(values | more))


def policy(roles):
    return lambda: roles.use("policy")


def reference(roles):
    return lambda: roles.use("reference")


def test_sequence_kl_is_the_sum_of_log_ratios_at_the_sampling_temperature(roles, tokenizer):
    seen = {}

    def spy(*args, **more):
        seen["done"] = generate(*args, **more)
        return seen["done"]

    task = evaluation(tokenizer, generate=spy)
    rows = task.run(roles.trunk, policy(roles), reference(roles), DistributedContext())
    wanted = [p["prompt_ids"] for p in task.prompts for _ in range(2)]
    for row, prompt, response in zip(rows, wanted, seen["done"].response_ids, strict=True):
        expected = 0.0
        for name, sign in (("policy", 1), ("reference", -1)):
            with torch.no_grad(), roles.use(name):
                logits = (
                    roles.trunk(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
                    / 0.7
                )
            chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(response)[:, None])
            expected += sign * chosen.sum().item()
        assert row.kl == pytest.approx(expected, abs=1e-4) and row.length == len(response)
        assert row.scores["length"] == len(response) and row.ended == (
            response[-1] in task.stop_ids
        )
    assert max(abs(row.kl) for row in rows) > 0.05


def test_the_reference_itself_has_no_kl_and_costs_no_pass(roles, tokenizer, monkeypatch):
    task, context = evaluation(tokenizer), policy(roles)
    monkeypatch.setattr("rlhf.evaluate.response_logprobs", None)
    rows = task.run(roles.trunk, context, context, DistributedContext())
    assert [row.kl for row in rows] == [0.0] * 4


def test_eval_prompts_are_taken_by_the_hash_of_their_group(sft_path):
    # groups a-0 to a-29, then b-0 to b-29; by name the first 20 would all be a's. sd sqrt(20 / 4 *
    # 40 / 59) = 1.8
    names = [f"{kind}-{i:02}" for kind in "ab" for i in range(30)]
    rows = [
        {"record": Prompt(prompt=[{"role": "user", "content": n}], group=n), "prompt_ids": [5]}
        for n in names
    ]
    options = SamplingConfig(model_name_or_path="x", data=["x"], output_dir="x", eval_prompts=20)
    run = SimpleNamespace(config=options, data=SimpleNamespace(rows=lambda *_: rows))
    chosen = [
        row["record"].group for row in stages.evaluation(run, load_model(sft_path), None).prompts
    ]
    assert len(chosen) == 20 and 4 < sum(name.startswith("a") for name in chosen) < 16


def test_kl_of_a_policy_to_itself_is_exactly_zero(roles, tokenizer):
    rows = evaluation(tokenizer).run(
        roles.trunk, policy(roles), policy(roles), DistributedContext()
    )
    assert [row.kl for row in rows] == [0.0] * 4


def test_without_a_reference_kl_is_not_a_number(roles, tokenizer):
    rows = evaluation(tokenizer).run(roles.trunk, policy(roles), None, DistributedContext())
    assert all(math.isnan(row.kl) for row in rows) and "eval/kl/sequence" not in summarise(rows)


def test_a_reference_may_be_a_model_of_its_own(roles, tokenizer, base_path):
    base = load_model(base_path).model
    bare = Roles(load_model(base_path), lora_config())
    rows = evaluation(tokenizer).run(bare.trunk, policy(bare), base, DistributedContext())
    assert [row.kl for row in rows] == pytest.approx([0.0] * 4, abs=1e-5)


def test_two_steps_meet_the_same_luck_and_two_samples_do_not(roles, tokenizer):
    task = evaluation(tokenizer)
    first = task.run(roles.trunk, policy(roles), None, DistributedContext())
    again = task.run(roles.trunk, policy(roles), None, DistributedContext())
    assert [r.response for r in first] == [r.response for r in again]
    assert first[0].response != first[1].response
    assert first[0].metadata["item"] == "one" and first[0].metadata["group"] == first[0].group


def test_means_by_hand():
    def row(kl, length, score, group):
        return EvalRow(
            prompt=[],
            group=group,
            sample=0,
            response="",
            length=length,
            ended=length < 5,
            kl=kl,
            scores=score,
        )

    # lengths 2 and 6: mean 4; KL 1 and 3: mean 2, per token 4/8, standard error sqrt(2)/sqrt(2) =
    # 1; NaN does not apply
    metrics = summarise(
        [row(1.0, 2, {"a": 1.0, "b": math.nan}, "g"), row(3.0, 6, {"a": 2.0, "b": 5.0}, "h")]
    )
    assert metrics == {
        "eval/response/length": 4.0,
        "eval/response/ended": 0.5,
        "eval/score/a": 1.5,
        "eval/score/b": 5.0,
        "eval/kl/sequence": 2.0,
        "eval/kl/token": 0.5,
        "eval/kl/sequence_se": 1.0,
    }


def test_the_standard_error_is_clustered():
    # mean 3; deviations -2, 0 | 1, 1 summed to -2 and 2: sqrt(2/1 (4 + 4)) / 4 = 1
    assert clustered_se([1.0, 3.0, 4.0, 4.0], ["a", "a", "b", "b"]) == pytest.approx(1.0, abs=1e-12)
    # one value in each cluster: s / sqrt(n) = sqrt(6/3) / sqrt(4)
    assert clustered_se([1.0, 3.0, 4.0, 4.0], list("abcd")) == pytest.approx(
        math.sqrt(2) / 2, abs=1e-12
    )
    # unequal: mean 2; a: (0-2)+(3-2) = -1, b: 1: sqrt(2 (1 + 1)) / 3 = 2/3
    assert clustered_se([0.0, 3.0, 3.0], ["a", "a", "b"]) == pytest.approx(2 / 3, abs=1e-12)
    assert clustered_se([1.0, 2.0], ["a", "a"]) is None


def test_the_table_shows_prompt_response_and_scores(roles, tokenizer):
    (first, *_) = sample_table(
        evaluation(tokenizer).run(roles.trunk, policy(roles), None, DistributedContext()), 1
    )
    assert first["prompt"] == "one" and {"response", "ended", "kl", "score/length"} <= set(first)


def test_the_probability_of_eos_is_read_where_answers_end(base_path):
    model = load_model(base_path).model
    rows = [
        {"prompt_ids": [5, 6, 7], "response_ids": [20, 2]},
        {"prompt_ids": [8], "response_ids": [9, 10, 11, 2]},
    ]
    with torch.no_grad():
        after_20 = model(torch.tensor([[5, 6, 7, 20]])).logits[0, -1].softmax(-1)[2]
        after_11 = model(torch.tensor([[8, 9, 10, 11]])).logits[0, -1].softmax(-1)[2]
    expected = float(after_20 + after_11) / 2
    assert eos_probability(model, rows, 0, True, DistributedContext()) == pytest.approx(
        expected, rel=1e-5
    )
    assert eos_probability(model, rows, 0, False, DistributedContext()) == pytest.approx(
        expected, rel=1e-5
    )


def test_what_a_model_knows_of_ends_is_a_median_and_of_other_tokens_a_mean(base_path):
    model = load_model(base_path).model
    rows = [
        {"prompt_ids": [5, 6, 7], "response_ids": [20, 2]},
        {"prompt_ids": [8], "response_ids": [9, 10, 11, 2]},
        {"prompt_ids": [8, 9], "response_ids": [2]},
    ]
    ends, others = [], []
    for row in rows:
        ids = row["prompt_ids"] + row["response_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = [float(logprobs[i - 1, ids[i]]) for i in range(len(row["prompt_ids"]), len(ids))]
        ends.append(found[-1])
        others += found[:-1]
    assert len(others) == 4
    assert knowledge_of_ends(model, rows, 0, True, DistributedContext()) == pytest.approx(
        (sorted(ends)[1], sum(others) / 4), rel=1e-5
    )
