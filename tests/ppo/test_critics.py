"""Where the critic's head reads: an adapter of its own, the reward model's trunk, the policy's."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from rlhf.errors import UserError
from rlhf.model.adapters import lora_config
from rlhf.model.loading import load_model
from rlhf.ppo.experience import Estimator
from rlhf.ppo.rollout import padded_batch, role_scorer
from rlhf.roles.critic import CriticStart, LeastSquaresCritic, critic_start
from rlhf.roles.one_base import Roles
from tests.ppo.test_trainer import config, trainer


def with_critic(sft_path, reward_path, trunk, **options):
    """A trainer whose scorer is the reward role."""
    options = config(critic_trunk=trunk, **options)
    learner = trainer(sft_path, options, reward=reward_path)
    learner.collector.scorer = role_scorer(learner.roles, 0, name="score")
    return learner


def passes_of(learner):
    """Count the trunk's passes by role from here on."""
    counted = {}
    use = learner.roles._activate
    active = ["policy"]

    def activate(role):
        active[0] = role
        use(role)

    def count(*_):
        counted[active[0]] = counted.get(active[0], 0) + 1

    learner.roles._activate = activate
    learner.roles.trunk.get_base_model().model.register_forward_hook(count)
    return counted


def test_ridge_regression_by_hand():
    # one feature of 1 and the constant, returns 1 and 3: moments (2 2; 2 2), products (4, 4), mean
    # squares (1, 1). With a ridge of 30, w = (a, a): (4 + 30) a = 4, and the value is 2 a = 4 / 17
    head = torch.nn.Linear(1, 1).double()
    critic = LeastSquaresCritic(head)
    critic.fit(torch.ones(2, 1), torch.tensor([1.0, 3.0]))
    assert head(torch.ones(1, 1).double()).item() == pytest.approx(4 / 17, abs=1e-12)
    # a second rollout of one token of return 5: the first counts 0.8, so moments are 2.6 each and
    # products 0.8 * 4 + 5 = 8.2; (5.2 + 30) a = 8.2
    critic.fit(torch.ones(1, 1), torch.tensor([5.0]))
    assert head(torch.ones(1, 1).double()).item() == pytest.approx(16.4 / 35.2, abs=1e-12)


def test_a_linear_function_is_found_whatever_the_scale_of_its_features():
    torch.manual_seed(0)
    states = torch.randn(4000, 3, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e3])
    returns = states @ torch.tensor([2e3, -1.0, 5e-3]).double() + 7
    head = torch.nn.Linear(3, 1).double()
    LeastSquaresCritic(head).fit(states, returns)
    gaps = head(states)[:, 0] - returns
    # a ridge of 30 tokens beside 4000 shrinks by less than 1 %
    assert float(gaps.std() / returns.std()) < 0.02


def test_a_feature_that_is_always_zero_has_no_weight():
    states = torch.randn(50, 3) * torch.tensor([1.0, 0.0, 1.0])
    head = torch.nn.Linear(3, 1)
    LeastSquaresCritic(head).fit(states, states[:, 0])
    assert head.weight[0, 1] == 0 and head.weight[0, 0] > 0.4


def test_a_rollout_that_is_not_finite_is_left_out_of_the_fit():
    states, returns = torch.randn(9, 2), torch.randn(9)
    critic, other = (LeastSquaresCritic(torch.nn.Linear(2, 1)) for _ in range(2))
    critic.fit(states, returns)
    before = critic.head.weight.clone()
    for bad in (float("nan"), float("inf")):
        critic.fit(states, returns.index_fill(0, torch.tensor([3]), bad))
        assert torch.equal(critic.head.weight, before)
    # it neither counts nor ages what was seen
    critic.fit(states, returns)
    for _ in range(2):
        other.fit(states, returns)
    assert torch.equal(critic.moments, other.moments)


def test_ranks_that_bring_their_own_tokens_fit_what_one_rank_does(monkeypatch):
    torch.manual_seed(1)
    states, returns = torch.randn(60, 4), torch.randn(60)
    whole, parts = (LeastSquaresCritic(torch.nn.Linear(4, 1)) for _ in range(2))
    whole.fit(states, returns)
    # 17 tokens on this rank, in portions of 5, and 43 on the other
    monkeypatch.setattr("rlhf.roles.critic.PORTION", 5)
    features = torch.cat([states[17:], torch.ones(43, 1)], 1).double()
    of_other = {2: features.T @ features, 1: features.T @ returns[17:].double()}
    parts.fit(states[:17], returns[:17], total=lambda own: own + of_other[own.dim()])
    torch.testing.assert_close(parts.head.weight, whole.head.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts.moments, whole.moments, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("weight", "options", "trunk"),
    [
        (1.0, {}, "reward"),
        # a model that is only watched
        (0.0, {}, "own"),
        # what the user says of the critic's learning is done
        (1.0, {"critic_from": "policy"}, "own"),
        (1.0, {"value_learning_rate": 1e-4}, "own"),
        (1.0, {"critic_warmup_steps": 2}, "own"),
        (1.0, {"critic_trunk": "own"}, "own"),
        (1.0, {"critic_trunk": "policy"}, "policy"),
    ],
)
def test_the_critic_reads_the_reward_model_unless_told_otherwise(weight, options, trunk):
    assert critic_start(config(**options), "runs/reward", weight, {}).trunk == trunk


def test_without_a_reward_role_the_critic_has_an_adapter_of_its_own():
    assert critic_start(config(), None, 0.0, {}) == CriticStart("policy")


def test_rows_with_the_same_ids_and_other_prompts_keep_their_own_states(sft_path, reward_path):
    roles = Roles(load_model(sft_path), lora_config(r=4), reward_path, critic_trunk="reward")
    batch = padded_batch([[5, 6], [5, 6, 7]], [[7, 8, 2], [8, 2]], 0, "cpu")
    with torch.no_grad(), roles.keeping_states():
        with roles.use("reward"):
            roles.scores(batch)
            expected = roles.states(batch)
        kept = roles.kept_states(batch)
    torch.testing.assert_close(kept, expected, atol=1e-6, rtol=0)
    # nor does a pass without gradients leave the reward model's head to learn
    assert not any(p.requires_grad for p in roles.heads["reward"].parameters())


def test_a_critic_on_the_reward_trunk_has_a_head_and_no_adapter(sft_path, reward_path):
    roles = Roles(load_model(sft_path), lora_config(r=4), reward_path, critic_trunk="reward")
    assert "value" not in roles.trunk.peft_config and not roles.critic_learns
    assert [tuple(p.shape) for p in roles.parameters_of("value")] == [(1, roles.width), (1,)]
    assert not any(p.requires_grad or p.any() for p in roles.parameters_of("value"))


def test_the_scoring_pass_gives_the_values_on_the_reward_trunk(sft_path, reward_path):
    learner = with_critic(sft_path, reward_path, "reward", old_logprobs="learner")
    learner.collect(0)  # what models allow is tried once
    counted = passes_of(learner)
    rollout = learner.collect(1)
    # generation makes the policy's passes on merged copies and one to measure; the reward's is one
    assert counted["reward"] == 1 and "value" not in counted
    with torch.no_grad(), learner.roles.use("reward"):
        expected = learner.roles.values(rollout.batch)
    torch.testing.assert_close(rollout.values, expected, atol=1e-6, rtol=0)
    counted.clear()
    experience, _ = learner.estimator.estimate(rollout)
    learner.learn(experience, 1)
    # two epochs of two updates, each one micro-batch; the critic's head makes no pass
    assert counted == {"policy": 4}


def test_without_kept_states_they_are_computed(sft_path, reward_path):
    learner = with_critic(sft_path, reward_path, "reward")
    # a scorer that does not go through the role
    learner.collector.scorer = trainer(sft_path).collector.scorer
    rollout = learner.collect(0)
    with torch.no_grad(), learner.roles.use("reward"):
        expected = learner.roles.values(rollout.batch)
    torch.testing.assert_close(rollout.values, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("trunk", ["reward", "policy"])
def test_only_the_head_of_the_critic_and_the_policy_move(sft_path, reward_path, trunk):
    learner = with_critic(sft_path, reward_path, trunk)
    before = {n: p.detach().clone() for n, p in learner.roles.named_parameters()}
    metrics, _ = learner.step(0)
    after = learner.roles.named_parameters()
    moved = {n for n, p in after if not torch.equal(p, before[n])}
    assert {"heads.value.weight", "heads.value.bias"} <= moved
    assert all(".policy." in n or n.startswith("heads.value.") for n in moved)
    assert metrics["loss/value"] > 0
    assert ("grad/norm_value" in metrics) == (trunk == "policy")


def test_the_critic_on_the_reward_trunk_is_fitted_to_each_rollout(sft_path, reward_path):
    learner = with_critic(sft_path, reward_path, "reward", num_ppo_epochs=1)
    metrics, rollout = learner.step(0)
    # a head of zeros, then the regression on the first rollout
    assert not rollout.values.any()
    head = torch.nn.Linear(learner.roles.width, 1)
    own = LeastSquaresCritic(head)
    experience, _ = Estimator(learner.config).estimate(rollout)
    own.fit(rollout.own_states, experience.returns[rollout.mask])
    assert torch.equal(head.weight, learner.roles.heads["value"].weight)
    squares = 0.5 * experience.returns[rollout.mask] ** 2
    assert metrics["loss/value"] == pytest.approx(float(squares.mean()), rel=1e-5)
    _, rollout = learner.step(1)
    assert rollout.values.any() and "value/learning_rate" not in metrics


def test_a_critic_on_the_policys_trunk_sends_its_gradient_there(sft_path, reward_path):
    moved = {}
    for weight in (0.0, 1.0):
        learner = with_critic(sft_path, reward_path, "policy", vf_coef=weight, seed=3)
        with torch.no_grad():
            learner.roles.heads["value"].weight.fill_(0.1)
        learner.step(0)
        moved[weight] = [p.detach().clone() for p in learner.roles.parameters_of("policy")]
    assert any(not torch.equal(a, b) for a, b in zip(moved[0.0], moved[1.0], strict=True))


def test_one_pass_through_the_policy_gives_what_two_give(sft_path, reward_path):
    roles = Roles(
        load_model(sft_path, "float64"), lora_config(r=4), reward_path, critic_trunk="policy"
    )
    with torch.no_grad():
        roles.heads["value"].weight.normal_()
        batch = padded_batch([[5, 6, 7], [8, 9]], [[20, 21, 22, 2], [30, 2]], 0, "cpu")
        logprobs, entropy, values = roles.logprobs_and_values(batch, 0.7)
        expected = [*roles.logprobs(batch, 0.7), roles.values(batch)]
    for found, other in zip((logprobs, entropy, values), expected, strict=True):
        torch.testing.assert_close(found, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("trunk", ["reward", "policy"])
def test_a_critic_without_adapter_is_saved_and_a_run_resumed(
    sft_path, reward_path, trunk, tmp_path
):
    learner = with_critic(sft_path, reward_path, trunk)
    learner.step(0)
    learner.save(tmp_path)
    learner.roles.save(tmp_path / "run", load_model(sft_path))
    head = load_file(tmp_path / "run" / "value" / "value_head.safetensors")
    assert torch.equal(head["weight"], learner.roles.heads["value"].weight)
    assert not (tmp_path / "run" / "value" / "adapter_config.json").exists()
    expected, _ = learner.step(1)

    again = with_critic(sft_path, reward_path, trunk)
    again.load(tmp_path)
    found, _ = again.step(1)
    same = {name for name in expected if not name.startswith(("time/", "memory/"))}
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}


def test_what_cannot_work_is_refused(sft_path):
    with pytest.raises(UserError, match="critic_trunk is reward, but none of the scorers"):
        Roles(load_model(sft_path), lora_config(), critic_trunk="reward")
    for trunk, options in (
        ("policy", {"critic_warmup_steps": 1}),
        ("reward", {"vf_coef": 0.2}),
        ("reward", {"critic_from": "policy"}),
    ):
        [name] = options
        with pytest.raises(UserError, match=f"with critic_trunk {trunk} nothing reads {name}"):
            config(critic_trunk=trunk, **options).validate()
    # at its default, and read by a head on the policy's trunk
    config(critic_trunk="reward", vf_coef=0.1).validate()
    config(critic_trunk="policy", vf_coef=0.2).validate()


# Old log-probabilities from the engine


def test_the_engines_log_probabilities_stand_in_after_a_rollout_that_measured_both(
    sft_path, tmp_path
):
    learner = trainer(sft_path)
    metrics, rollout = learner.step(0)
    assert metrics["kl/sequence"] == 0.0 and rollout.logprob_gap < 1e-5
    assert learner.collector.trusts_engine
    counted = passes_of(learner)
    rollout = learner.collect(1)
    # all of the engine: one pass over the prompts and one for each of six tokens
    assert counted["policy"] == 7 and math.isnan(rollout.logprob_gap)
    with torch.no_grad(), learner.roles.use("policy"):
        expected, _ = learner.roles.logprobs(rollout.batch)
    # the mean, as rollout/logprob_gap is: rounding moves single tokens, which ones depends on the CPU
    assert (rollout.logprobs - expected)[rollout.mask].abs().mean() < 1e-5
    learner.save(tmp_path)
    assert json.loads((tmp_path / "ppo.json").read_text())["trusts_engine"] is True
    again = trainer(sft_path)
    again.load(tmp_path)
    assert again.collector.trusts_engine


def test_an_engine_that_is_off_is_measured_beside_the_learner(sft_path):
    learner = trainer(sft_path)
    generate = learner.collector.generate

    def stale(*args):
        found = generate(*args)
        found.logprobs = [[number - 0.01 for number in row] for row in found.logprobs]
        return found

    learner.collector.generate = stale
    for step in range(2):
        metrics, _ = learner.step(step)
        assert metrics["rollout/logprob_gap"] == pytest.approx(0.01, abs=1e-5)
        assert abs(metrics["ppo/ratio_first"] - 1) < 1e-6
        assert not learner.collector.trusts_engine

    # it goes astray when it was trusted: seen in the first update, and measured from then on
    learner.collector.trusts_engine = True
    metrics, _ = learner.step(2)
    assert metrics["rollout/logprob_gap"] == pytest.approx(0.01, abs=1e-5)
    assert not learner.collector.trusts_engine


def test_a_run_may_ask_for_the_learners_own(sft_path):
    learner = trainer(sft_path, config(old_logprobs="learner"))
    learner.step(0)
    assert not learner.collector.trusts_engine
