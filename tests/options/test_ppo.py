"""What each option of PPO does to a step, on numbers known beforehand."""

import math

import pytest
import torch

from rlhf.data.records import Scores
from rlhf.model.loading import load_model
from rlhf.ppo.batches import MicroBatch
from rlhf.ranks.distributed import DistributedContext
from rlhf.ranks.optimizer_engine import make_engine
from tests.ppo.test_trainer import STOPS, config, trainer


def without_critic(estimator, **more):
    return config(advantage_estimator=estimator, samples_per_prompt=2, **more)


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce"])
def test_only_gae_has_a_critic(sft_path, estimator):
    learner = trainer(sft_path, without_critic(estimator))
    assert not any(
        ".value." in n or n.startswith("heads.value") for n, _ in learner.roles.named_parameters()
    )
    metrics, rollout = learner.step(0)
    assert not any(k.startswith("value/") or k == "loss/value" for k in metrics)
    assert not rollout.values.any()
    # two epochs of the policy alone
    whole = int(rollout.batch["attention"].sum())
    assert learner.budget.tokens_trained == 2 * whole


def test_advantages_are_whitened_for_gae_unless_asked_otherwise():
    assert config().whitens and not without_critic("rloo").whitens
    assert (
        without_critic("rloo", whiten_advantages=True).whitens
        and not config(whiten_advantages=False).whitens
    )


def seen_advantages(learner, steps):
    """The advantages that each step learns from, and its rollout."""
    seen, learn = [], learner.learn

    def spy(experience, step):
        seen.append((experience.rollout, experience.advantages.clone()))
        return learn(experience, step)

    learner.learn = spy
    for step in range(steps):
        learner.step(step)
    return seen


def test_rloo_by_hand_on_a_rollout(sft_path):
    # kl_coef 0: the reward is the length of the response, the baseline that of the prompt's other
    # sample
    ((rollout, advantages),) = seen_advantages(
        trainer(sft_path, without_critic("rloo", kl_coef=0.0, missing_eos_score=None)), 1
    )
    lengths = [len(ids) for ids in rollout.samples.response_ids]
    for row, (mine, other) in enumerate(
        zip(lengths, [lengths[i ^ 1] for i in range(8)], strict=True)
    ):
        assert (
            advantages[row, :mine].tolist() == [mine - other] * mine
            and not advantages[row, mine:].any()
        )


def test_the_baseline_of_reinforce_is_the_mean_of_all_earlier_rewards(sft_path):
    learner = trainer(sft_path, without_critic("reinforce", kl_coef=0.0, missing_eos_score=None))
    learner.collector.stop_ids = STOPS
    seen = seen_advantages(learner, 3)
    lengths = [[len(ids) for ids in rollout.samples.response_ids] for rollout, _ in seen]
    assert len({n for row in lengths for n in row}) > 1
    # the first step has none but its own
    earlier = [lengths[0], lengths[0], lengths[0] + lengths[1]]
    for now, before, (_, advantages) in zip(lengths, earlier, seen, strict=True):
        for row, length in enumerate(now):
            assert math.isclose(
                float(advantages[row, 0]), length - sum(before) / len(before), abs_tol=1e-5
            )


def test_scores_are_normalised_by_all_that_were_seen(sft_path):
    learner = trainer(
        sft_path, config(normalize_scores=True, score_clip=0.5, missing_eos_score=None)
    )
    learner.collector.stop_ids = STOPS
    rollouts = [learner.step(step) for step in range(2)]
    every = [float(len(ids)) for _, rollout in rollouts for ids in rollout.samples.response_ids]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in every) / len(every))
    metrics, rollout = rollouts[1]
    expected = [
        max(-0.5, min(0.5, (len(ids) - mean) / deviation)) for ids in rollout.samples.response_ids
    ]
    assert math.isclose(metrics["score/total"], sum(expected) / 8, abs_tol=1e-5) and 0.5 in expected
    assert math.isclose(metrics["score/mean_running"], mean, abs_tol=1e-6)
    assert math.isclose(metrics["score/std_running"], deviation, abs_tol=1e-6)


def test_the_length_penalty_is_taken_from_each_score(sft_path):
    learner = trainer(sft_path, config(length_penalty=0.25, missing_eos_score=None))
    metrics, _ = learner.step(0)
    assert math.isclose(metrics["score/total"], 0.75 * metrics["response/length"], abs_tol=1e-6)


def test_kl_in_the_loss_is_not_in_the_reward(sft_path):
    options = without_critic(
        "rloo", kl_in="loss", kl_estimator="k2", kl_coef=0.5, missing_eos_score=None
    )
    learner = trainer(sft_path, options)
    learner.collector.stop_ids = STOPS
    first, _ = learner.step(0)
    assert first["ppo/reward"] == first["score/total"] and first["loss/kl"] > 0.0
    second, _ = learner.step(1)
    assert second["kl/sequence"] != 0.0 and math.isclose(
        second["ppo/reward"], second["score/total"], abs_tol=1e-6
    )
    assert math.isclose(
        second["loss/total"], second["loss/policy"] + second["loss/kl"], abs_tol=1e-6
    )


def test_the_entropy_bonus_raises_the_entropy(base_path):
    # no reward, no KL: what is left pulls towards the uniform distribution, or away from it
    def nothing(samples):
        return Scores([0.0] * len(samples))

    options = without_critic("rloo", kl_coef=0.0, missing_eos_score=None, entropy_coef=1.0)
    learner = trainer(base_path, options, nothing)
    rows = [learner.step(step)[0] for step in range(4)]
    assert rows[-1]["response/entropy"] > rows[0]["response/entropy"] + 0.05
    assert rows[0]["loss/policy"] == 0.0 and rows[0]["loss/entropy"] == rows[0]["loss/total"] < 0.0


PTX = [{"prompt_ids": [20 + i, 30], "response_ids": [40 + i, 41, 2]} for i in range(5)]


def test_ptx_makes_the_given_answers_likelier(base_path):
    def nothing(samples):
        return Scores([0.0] * len(samples))

    options = without_critic(
        "rloo", kl_coef=0.0, missing_eos_score=None, ptx_coef=2.0, ptx_data=["x"], temperature=0.5
    )
    learner = trainer(base_path, options, nothing, ptx=PTX)
    model = load_model(base_path).model
    with torch.no_grad():  # at temperature 1, whatever is sampled at
        nats = [
            -torch.log_softmax(model(torch.tensor([row["prompt_ids"] + row["response_ids"]])).logits[0], -1)
            [torch.arange(1, 4), torch.tensor(row["response_ids"])]
            for row in PTX
        ]  # fmt: skip
    batch = learner.batches.pretraining_batch(0, 5)
    order = [PTX.index({"prompt_ids": r[:2], "response_ids": r[2:]}) for r in batch["ids"].tolist()]
    assert sorted(order) == [0, 1, 2, 3, 4]
    rows = torch.tensor([1, 3])
    own = {name: column[rows] for name, column in batch.items()}
    part = MicroBatch(rows, own, own["mask"], None, own, batch["mask"].sum(), is_idle=False)
    with torch.no_grad(), learner.roles.use("policy"):
        loss, _ = learner.passes.ptx_pass(None, part)
    # of 15 tokens in the step
    expected = 2.0 * sum(float(nats[order[i]].sum()) for i in (1, 3)) / 15
    assert math.isclose(float(loss), expected, rel_tol=1e-5)
    rows = [learner.step(step)[0]["loss/ptx"] for step in range(4)]
    assert rows[-1] < rows[0] - 0.5


def test_each_update_reads_the_next_given_answers(base_path):
    learner = trainer(base_path, config(ptx_coef=1.0, ptx_data=["x"]), ptx=PTX)
    read = [
        learner.batches.pretraining_batch(update, 2)["ids"][:, 0].tolist() for update in range(5)
    ]
    flat = [first for part in read for first in part]
    assert sorted(flat[:5]) == sorted(flat[5:]) == [20, 21, 22, 23, 24]


def test_a_moving_reference_moves_the_penalty_only(sft_path):
    learner = trainer(sft_path, config(reference_ema=0.5, kl_coef=0.5, missing_eos_score=None))
    roles = learner.roles

    def weights(name):
        return [p.detach().clone() for n, p in roles.trunk.named_parameters() if f".{name}." in n]

    frozen, moving = weights("reference"), weights("ema_reference")
    assert all(torch.equal(a, b) for a, b in zip(frozen, moving, strict=True))
    learner.step(0)
    for was, now, policy in zip(moving, weights("ema_reference"), weights("policy"), strict=True):
        torch.testing.assert_close(now, 0.5 * was + 0.5 * policy, atol=1e-7, rtol=0)
    metrics, rollout = learner.step(1)
    assert all(torch.equal(a, b) for a, b in zip(frozen, weights("reference"), strict=True))
    sequence = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0).sum(-1)
    penalty = torch.where(rollout.mask, rollout.logprobs - rollout.penalty_logprobs, 0.0).sum(-1)
    assert math.isclose(metrics["kl/sequence"], float(sequence.mean()), abs_tol=1e-6)
    assert math.isclose(metrics["kl/penalty"], float(penalty.mean()), abs_tol=1e-6)
    assert abs(metrics["kl/sequence"] - metrics["kl/penalty"]) > 1e-3
    expected = metrics["score/total"] - 0.5 * float(penalty.mean())
    assert math.isclose(metrics["ppo/reward"], expected, abs_tol=1e-5)


def test_while_the_critic_warms_up_the_policy_stays_to_the_last_bit(sft_path, reward_path):
    options = config(critic_warmup_steps=2, old_logprobs="learner")
    learner = trainer(sft_path, options, reward=reward_path)
    policy, critic = learner.roles.parameters_of("policy"), learner.roles.parameters_of("value")
    before = [p.detach().clone() for p in policy]
    state = learner.learner.optimizer.state
    for step in range(2):
        values = [p.detach().clone() for p in critic]
        metrics, rollout = learner.step(step)
        assert all(torch.equal(a, b) for a, b in zip(before, policy, strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(values, critic, strict=True))
        assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
        assert abs(metrics["ppo/ratio"] - 1) < 1e-6
        assert not any(state[p] for p in policy)  # no moments, no count of steps
        assert all(state[p]["step"] == 4 * (step + 1) for p in critic)  # two epochs of two updates
    learner.step(2)
    assert any(not torch.equal(a, b) for a, b in zip(before, policy, strict=True))
    # Adam's bias correction counts the policy's own gradients
    assert all(state[p]["step"] == 4 for p in policy)


def test_a_policy_loss_that_does_not_count_spoils_no_step_of_the_critic(sft_path, reward_path):
    learner = trainer(sft_path, config(critic_warmup_steps=1), reward=reward_path)
    look = learner.passes.policy_pass

    def infinite(*arguments):
        loss, metrics = look(*arguments)
        return loss * math.inf, metrics

    learner.passes.by_name["policy"] = infinite
    critic = [p.detach().clone() for p in learner.roles.parameters_of("value")]
    metrics, _ = learner.step(0)
    assert metrics["ppo/updates"] == 4 and math.isfinite(metrics["grad/norm"])
    assert math.isclose(metrics["loss/total"], 0.1 * metrics["loss/value"], rel_tol=1e-6)  # vf_coef
    assert not same(critic, learner.roles.parameters_of("value"))


def test_one_update_after_a_warm_up_is_as_long_as_one_without(sft_path):
    # Adam's first step is rate * g / (|g| + eps) whatever came before; zeros counted as gradients would make it
    # 0.1 / (1 - 0.9^9) / sqrt(0.001 / (1 - 0.999^9)) = 0.49 of that after the eight updates of the warm-up
    learner = trainer(
        sft_path, config(critic_warmup_steps=2, lr_scheduler_type="constant", adam_epsilon=1e-12)
    )
    for step in range(2):
        learner.step(step)
    policy = learner.roles.parameters_of("policy")
    before, longest = [p.detach().clone() for p in policy], []
    step = learner.learner.step

    def spy(rates, **how):
        norm = step(rates, **how)
        longest.append(
            max(float((p.detach() - b).abs().max()) for p, b in zip(policy, before, strict=True))
        )
        return norm

    learner.learner.step = spy
    learner.step(2)
    assert math.isclose(longest[0], 1e-2, rel_tol=1e-3)


def kept(learner) -> list[torch.Tensor]:
    """All that an optimizer step changes: weights, moments, counts of steps."""
    moments = [v.clone() for s in learner.learner.optimizer.state.values() for v in s.values()]
    return [p.detach().clone() for p in learner.roles.parameters() if p.requires_grad] + moments


def same(before, after) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )


def test_a_step_that_is_taken_back_leaves_no_trace(sft_path, reward_path):
    learner = trainer(sft_path, reward=reward_path)
    learner.step(0)
    parameters = [p for p in learner.roles.parameters() if p.requires_grad]
    before = kept(learner)
    learner.learner.backward(sum((p**2).sum() for p in parameters), last=True)
    assert math.isnan(learner.learner.step([1.0, 1.0], discard=True))
    assert same(before, kept(learner)) and all(p.grad is None for p in parameters)
    learner.learner.backward(sum((p**2).sum() for p in parameters), last=True)
    assert math.isfinite(learner.learner.step([1.0, 1.0])) and not same(before, kept(learner))


def test_the_gradient_norm_of_each_group_by_hand():
    # 3 a + 4 b has gradients 3 and 4, norm 5; 12 c has 12; jointly sqrt(9 + 16 + 144) = 13, before
    # clipping to 1
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in "abc"]
    groups = [{"params": weights[:2], "lr": 0.1}, {"params": weights[2:], "lr": 0.1}]
    engine = make_engine(
        torch.nn.ParameterList(weights), groups, DistributedContext(), max_grad_norm=1.0
    )
    engine.backward((3 * weights[0] + 4 * weights[1] + 12 * weights[2]).sum(), last=True)
    assert engine.step([0.1, 0.1]) == pytest.approx(13.0)
    assert engine.group_norms == pytest.approx([5.0, 12.0])


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_what_a_guard_takes_back_is_not_made_where_all_that_was_last_is_clipped(
    estimator, sft_path
):
    """One row a pass, and ranges so narrow that half of the last ones have no gradient, whatever
    their loss is.
    """
    options = config(
        per_device_train_batch_size=1, num_mini_batches=1, num_ppo_epochs=2, guards={"target_kl": 1e-9},
        advantage_estimator=estimator, samples_per_prompt=1 if estimator == "gae" else 8, missing_eos_score=None,
        clip_range=1e-6, value_clip_range=1e-6, lr_scheduler_type="constant", total_episodes=10 * 8, kl_coef=0.0,
    )  # fmt: skip
    learner = trainer(sft_path, options)
    learner.collector.stop_ids = STOPS
    changed, clipped, step = {True: [], False: []}, [], learner.learner.step
    last = {"gae": "value", "rloo": "policy"}[estimator]
    make = learner.passes.by_name[last]

    def spy_pass(*arguments):
        loss, metrics = make(*arguments)
        gradients = torch.autograd.grad(loss, learner.roles.parameters_of(last), retain_graph=True)
        learner.clipped = not any(g.any() for g in gradients)
        return loss, metrics

    def spy_step(rates, *, discard=False):
        before = kept(learner)
        norm = step(rates, discard=discard)
        changed[discard].append(not same(before, kept(learner)))
        clipped.append(discard and learner.clipped)
        return norm

    learner.learner.step = spy_step
    learner.passes.by_name[last] = spy_pass
    for number in range(10):
        learner.step(number)
    assert changed == {True: [False] * 10, False: [True] * 10}
    assert sum(clipped) >= 2
    assert learner.guards.decisions.counts["shortened_rollouts"] == 10


def test_a_large_gradient_of_the_critic_shortens_the_step_of_the_policy():
    # joint norm clipped to 1: the policy's 1e-4 beside 100 becomes 1e-6, and Adam's first step rate
    # * g / (|g| + 1e-5) falls from 1e-4 / 1.1e-4 = 0.909 of the rate to 1e-6 / 1.1e-5 = 0.0909
    for critic, expected in ((0.0, 1e-4 / 1.1e-4), (100.0, 1e-6 / 1.1e-5)):
        both = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
        )
        learner = make_engine(
            both, [{"params": [p]} for p in both], DistributedContext(), adam_eps=1e-5
        )
        learner.backward(1e-4 * both[0].sum() + critic * both[1].sum(), last=True)
        learner.step([1.0, 1.0])
        assert math.isclose(-float(both[0].detach()), expected, rel_tol=1e-5)


def test_the_adaptive_coefficient_is_the_next_step_s(sft_path):
    learner = trainer(sft_path, config(kl_coef=0.2, kl_target=0.5, kl_horizon=16))
    first, _ = learner.step(0)  # a KL of 0: e = -0.2, times 8 / 16
    assert first["kl/coef"] == 0.2 and math.isclose(
        learner.estimator.kl.coef, 0.2 * (1 - 0.2 * 8 / 16), abs_tol=1e-12
    )
    second, _ = learner.step(1)
    assert second["kl/coef"] == 0.2 * (1 - 0.2 * 8 / 16)
