import copy
import math

import pytest
import torch

from rlhf.data.records import BadScore, Prompt, Scores
from rlhf.engines.hf import generate
from rlhf.engines.sampling import Sampling
from rlhf.errors import UserError
from rlhf.model.adapters import lora_config
from rlhf.model.loading import load_model
from rlhf.options.ppo import PPOConfig
from rlhf.ppo.batches import Batches, TrainingData, cycle_shuffled, permutation
from rlhf.ppo.rollout import repetition
from rlhf.ppo.trainer import PPOTrainer, make_engine
from rlhf.ranks.distributed import DistributedContext
from rlhf.roles.one_base import Roles
from rlhf.values import check_ranges


def prompt(text):
    return {
        "prompt_ids": [5 + ord(c) % 200 for c in text],
        "record": Prompt(prompt=[{"role": "user", "content": text}]),
    }


STOPS = [2, *range(3, 320, 9)]
PROMPTS = [
    prompt(t) for t in ("one", "three", "seventeen", "a", "of it", "many things", "yes", "no")
]


def config(**more):
    values = {
        "model_name_or_path": "x",
        "data": ["x"],
        "output_dir": "x",
        "reward": [{"model": "x"}],
        "rollout_batch_size": 8,
        "total_episodes": 32,
        "per_device_train_batch_size": 4,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "max_response_length": 6,
        "learning_rate": 1e-2,
        "guards": {"no_signal": "off"},  # so few and so short responses often score alike
    }
    return PPOConfig(**(values | more))


def by_length(samples):
    totals = [float(len(ids)) for ids in samples.response_ids]
    return Scores(totals, {"length": totals})


def trainer(
    path,
    options=None,
    scorer=by_length,
    prompts=PROMPTS,
    reward=None,
    dtype="float32",
    ptx=None,
    device="cpu",
):
    options = options or config()
    torch.manual_seed(options.seed)
    initial = load_model(path, dtype)
    critic = options.critic_from if options.has_critic else None
    roles = Roles(
        initial,
        lora_config(r=4),
        reward,
        critic=critic,
        critic_trunk="own" if options.critic_trunk == "auto" else options.critic_trunk,
        ema_reference=options.reference_ema is not None,
    )
    data = TrainingData(prompts, initial.tokenizer, [initial.tokenizer.eos_token_id], ptx or [])
    world = DistributedContext(device=torch.device(device))
    return PPOTrainer(options, roles, scorer, data, world)


def test_before_the_first_update_kl_is_zero_and_the_ratio_is_one(sft_path, reward_path):
    learner = trainer(sft_path, reward=reward_path)
    metrics, rollout = learner.step(0)
    assert metrics["kl/sequence"] == 0.0 and metrics["kl/k3"] == 0.0
    # passes of other rows sum in another order
    assert abs(metrics["ppo/ratio_first"] - 1) < 1e-6
    assert metrics["rollout/logprob_gap"] < 1e-5
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    later, _ = learner.step(1)
    assert later["kl/sequence"] != 0.0 and abs(later["ppo/ratio_first"] - 1) < 1e-6


def test_only_policy_and_critic_move(sft_path, reward_path):
    learner = trainer(sft_path, reward=reward_path)
    before = {n: p.detach().clone() for n, p in learner.roles.named_parameters()}
    learner.step(0)
    moved = {n for n, p in learner.roles.named_parameters() if not torch.equal(p, before[n])}
    assert any(".policy." in n for n in moved) and any(".value." in n for n in moved)
    assert "heads.value.weight" in moved and "heads.value.bias" in moved
    assert all(".policy." in n or ".value." in n or n.startswith("heads.value.") for n in moved)


def test_the_same_seed_gives_the_same_run_to_the_last_bit(sft_path, reward_path):
    runs = []
    for _ in range(2):
        learner = trainer(sft_path, reward=reward_path)
        rows = [learner.step(s) for s in range(2)]
        metrics = [{k: v for k, v in m.items() if not k.startswith("time/")} for m, _ in rows]
        runs.append(
            (metrics, [r.samples.response_ids for _, r in rows], learner.learner.state_dict())
        )
    assert runs[0][0] == runs[1][0] and runs[0][1] == runs[1][1]
    assert all(torch.equal(runs[0][2][n], runs[1][2][n]) for n in runs[0][2])


def test_another_seed_samples_otherwise(sft_path):
    _, first = trainer(sft_path).step(0)
    _, second = trainer(sft_path, config(seed=1)).step(0)
    assert sorted(first.samples.response_ids) != sorted(second.samples.response_ids)


@pytest.mark.parametrize("dtype,tolerance", [("float64", 1e-10), ("float32", 1e-4)])
def test_eight_micro_batches_of_one_equal_one_of_eight(sft_path, reward_path, dtype, tolerance):
    learned = {}
    for size in (1, 8):
        learner = trainer(
            sft_path, config(per_device_train_batch_size=size), reward=reward_path, dtype=dtype
        )
        metrics, _ = learner.step(0)
        learned[size] = (metrics["loss/policy"], metrics["loss/value"], metrics["grad/norm"])
    for one, eight in zip(learned[1], learned[8], strict=True):
        assert math.isclose(one, eight, rel_tol=tolerance, abs_tol=tolerance)


def first_token_probabilities(model):
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([PROMPTS[0]["prompt_ids"]])).logits[0, -1], -1)


def bandit(path, good, **more):
    """A learner for episodes of one token: reward 1 for `good`, 0 else."""

    def scorer(samples):
        return Scores([float(ids[0] == good) for ids in samples.response_ids])

    options = config(
        max_response_length=1, num_mini_batches=1, missing_eos_score=None, gae_lambda=1.0,
        per_device_train_batch_size=more["rollout_batch_size"], **more,
    )  # fmt: skip
    return trainer(path, options, scorer, PROMPTS[:1])


def test_a_bandit_with_a_known_optimum_is_learnt(base_path):
    """Without KL the optimum is p(good) = 1; it starts near 0.06."""
    good = int(first_token_probabilities(load_model(base_path).model).argsort(descending=True)[1])
    learner = bandit(
        base_path,
        good,
        rollout_batch_size=64,
        total_episodes=640,
        num_ppo_epochs=4,
        kl_coef=0.0,
        learning_rate=3e-3,
    )
    scores = [learner.step(step)[0]["score/total"] for step in range(10)]
    assert scores[0] < 0.2 and scores[-1] > 0.95


def test_a_kl_penalty_holds_the_bandit_at_the_tilted_optimum(base_path):
    """With KL weight b the optimum is p*(a) = p_ref(a) exp(r(a) / b) / Z (Rafailov et al. 2023, eq.
    4).
    """
    p_ref = first_token_probabilities(load_model(base_path).model)
    good = int(p_ref.argsort(descending=True)[1])
    odds = float(p_ref[good]) * math.exp(1 / 0.5)
    target = odds / (odds + 1 - float(p_ref[good]))
    learner = bandit(
        base_path, good, rollout_batch_size=256, total_episodes=256 * 50, num_ppo_epochs=2, kl_coef=0.5,
        learning_rate=3e-3,
    )  # fmt: skip
    for step in range(50):
        learner.step(step)
    with learner.roles.use("policy"):
        p = first_token_probabilities(learner.roles.trunk)
    assert 0.3 < target < 0.37 and float(p_ref[good]) < 0.07
    assert abs(float(p[good]) - target) < 0.08


def test_the_same_prompt_twice_in_a_rollout_gets_two_samples(base_path):
    _, rollout = trainer(base_path, config(rollout_batch_size=8), prompts=PROMPTS[:2]).step(0)
    assert len({tuple(ids) for ids in rollout.samples.response_ids}) > 2


def test_a_response_that_does_not_end_scores_the_eos_penalty(sft_path):
    learner = trainer(sft_path, config(missing_eos_score=-7.0, missing_eos="replace"))
    learner.collector.stop_ids = STOPS
    metrics, rollout = learner.step(0)
    shaped = learner.estimator.shape_scores(rollout)
    for score, ended, ids in zip(shaped, rollout.ended, rollout.samples.response_ids, strict=True):
        assert float(score) == (float(len(ids)) if ended else -7.0)
    assert rollout.scores.tolist() == [float(len(ids)) for ids in rollout.samples.response_ids]
    assert 0 < metrics["response/ended"] < 1
    assert math.isclose(metrics["score/total"], float(shaped.mean()), abs_tol=1e-6)
    assert math.isclose(metrics["score/raw"], float(rollout.scores.mean()), abs_tol=1e-6)


def equal_scores(samples):
    return Scores([0.5] * len(samples))


def test_a_run_whose_first_scores_are_all_the_same_stops_before_it_learns(sft_path):
    learner = trainer(sft_path, config(missing_eos_score=None, guards={}), equal_scores)
    before, seen = learner.learner.state_dict(), []
    stopped = learner.train(lambda step, metrics, rollout: seen.append(metrics))
    assert (stopped.guard, stopped.action, learner.steps_done) == ("no_signal", "stop", 1)
    assert all(torch.equal(v, before[k]) for k, v in learner.learner.state_dict().items())
    (metrics,) = seen
    assert metrics["score/std"] == 0.0 and "ppo/updates" not in metrics
    # whether responses end is luck here
    guards = {"no_signal": "warn", "truncation": "off"}
    allowed = trainer(sft_path, config(missing_eos_score=None, guards=guards), equal_scores)
    assert (
        allowed.step(0)[0]["ppo/updates"] == 4
        and allowed.guards.decisions.events[0]["guard"] == "no_signal"
    )
    assert "score/length_correlation" not in metrics


def test_what_is_compared_are_the_samples_of_a_prompt_where_the_estimator_does(sft_path):
    def by_prompt(samples):  # as Rollout has them: four samples of each prompt
        return Scores([float(len(ids)) for ids in samples.prompt_ids])

    options = {"samples_per_prompt": 4, "missing_eos_score": None, "guards": {}}
    assert trainer(sft_path, config(**options), by_prompt).step(0)[0]["ppo/updates"] == 4
    learner = trainer(sft_path, config(advantage_estimator="rloo", **options), by_prompt)
    assert "ppo/updates" not in learner.step(0)[0] and learner.pending_decision.guard == "no_signal"
    assert (
        learner.estimator.largest_difference(torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.5, 3.0]))
        == 0.5
    )


def test_the_correlation_of_score_and_length_by_hand(sft_path):
    learner = trainer(sft_path, config(missing_eos_score=None))
    learner.collector.stop_ids = STOPS
    # the score is the length
    assert math.isclose(learner.step(0)[0]["score/length_correlation"], 1.0, abs_tol=1e-9)


def nan_scorer(samples):
    return Scores([float("nan")] * len(samples))


def test_score_nan_is_stopped_with_its_prompt(sft_path):
    options = config(guards={"not_finite": "stop"})
    with pytest.raises(BadScore, match=r"nan: prompt '"):
        trainer(sft_path, options, nan_scorer).step(0)
    # finite as a Python number, infinite in float32
    with pytest.raises(BadScore, match=r"1e\+39: prompt '"):
        trainer(sft_path, options, lambda samples: Scores([1e39] * len(samples))).step(0)


def test_passes_are_bounded_where_the_engine_takes_the_head_apart(sft_path, monkeypatch):
    def partition(roles, *args):
        # as ZeRO-3 marks what is not whole
        roles.trunk.get_output_embeddings().weight.ds_id = 1
        return make_engine(roles, *args)

    assert trainer(sft_path).batches.vocabulary == 0
    monkeypatch.setattr("rlhf.ppo.trainer.make_engine", partition)
    learner = trainer(sft_path)
    assert learner.batches.vocabulary == learner.roles.trunk.config.vocab_size


def test_a_rollout_with_a_score_nan_is_passed_over_once(sft_path):
    learner = trainer(sft_path, scorer=nan_scorer)
    before = learner.learner.state_dict()
    metrics, rollout = learner.step(0)
    assert rollout is None and not any(k.startswith("score/") for k in metrics)
    assert all(torch.equal(v, before[k]) for k, v in learner.learner.state_dict().items())


def test_linear_schedule_and_own_rate_of_the_critic(sft_path):
    learner = trainer(sft_path, config(value_learning_rate=0.5))
    assert learner.learning_rates(0) == [0.01, 0.5]
    assert learner.learning_rates(3) == [0.0025, 0.125]


def test_the_schedule_reaches_the_optimizer(sft_path):
    learner = trainer(sft_path, config(value_learning_rate=0.5))
    learner.step(3)
    assert [group["lr"] for group in learner.learner.optimizer.param_groups] == [0.0025, 0.125]


def test_prompts_come_in_shuffled_passes(sft_path):
    learner = trainer(sft_path, config(rollout_batch_size=4, total_episodes=16))
    seen = [
        p["record"].prompt[0]["content"] for s in range(4) for p in learner.batches.prompts_of(s)
    ]
    every = sorted(p["record"].prompt[0]["content"] for p in PROMPTS)
    assert sorted(seen[:8]) == every and sorted(seen[8:]) == every and seen[:8] != seen[8:]


def test_samples_per_prompt_share_a_group(sft_path):
    _, rollout = trainer(sft_path, config(samples_per_prompt=4)).step(0)
    assert rollout.group_index.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len({tuple(p) for p in rollout.samples.prompt_ids}) == 2


def test_micro_batches_cover_each_row_once_and_in_step():
    def sizes(count, size):
        # rows of one length
        options, shares = config(per_device_train_batch_size=size), []
        for rank in range(2):
            world = DistributedContext(rank=rank, size=2)
            shares.append(
                Batches(options, TrainingData([], None, []), world).own_groups([3] * count)
            )
        rows = [row for share in shares for group in share for row in group]
        return [[len(group) for group in share] for share in shares], rows

    lengths, rows = sizes(7, 2)
    assert lengths == [[2, 1], [2, 2]] and sorted(rows) == list(range(7))
    # one row on two ranks: the rank without any has an empty micro-batch
    assert sizes(1, 2)[0] == [[0], [1]]
    # three on two, one at a time: both make two passes
    assert sizes(3, 1)[0] == [[1, 0], [1, 1]]


def test_an_endless_row_is_made_of_shuffled_passes():
    rows = list("abcdefgh")
    seen = cycle_shuffled(rows, range(16), 3)
    assert sorted(seen[:8]) == rows and sorted(seen[8:]) == rows and seen[:8] != seen[8:]
    # the same places are the same rows, whoever asks
    assert cycle_shuffled(rows, range(5, 11), 3) == seen[5:11]
    assert cycle_shuffled(rows, range(16), 4) != seen


def test_permutation_depends_on_its_key_alone():
    assert torch.equal(permutation(50, 1, 2), permutation(50, 1, 2))
    assert not torch.equal(permutation(50, 1, 2), permutation(50, 2, 1))


@pytest.mark.parametrize(
    "wrong,word",
    [
        ({"samples_per_prompt": 3}, "not a multiple"),
        ({"total_episodes": 4}, "less than one rollout"),
        ({"reward": []}, "'reward' is empty"),
        ({"kl_target": -1.0}, "kl_target"),
        ({"num_mini_batches": 9}, "'num_mini_batches' is 9, more than"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs"),
        ({"gamma": 1.5}, "gamma"),
        ({"clip_range": 0.0}, "clip_range"),
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"kl_coef": 0.0, "kl_target": 6.0}, "cannot start at 0"),
        ({"kl_target": 6.0, "kl_horizon": 4}, "less than one rollout"),
        ({"missing_eos": "subtract", "missing_eos_score": 2.0}, "--missing_eos_score -2.0"),
        ({"score_clip": 0.0}, "score_clip"),
        ({"reference_ema": 1.5}, "reference_ema"),
        ({"advantage_estimator": "rloo"}, "compares samples of one prompt"),
        ({"advantage_estimator": "grpo"}, "compares samples of one prompt"),
        ({"advantage_estimator": "reinforce", "critic_warmup_steps": 1}, "has no critic"),
        ({"ptx_coef": 0.5}, "belong together"),
        ({"ptx_data": ["x"]}, "belong together"),
        ({"guards": {"max_lk": 3}}, "max_kl"),
        ({"use_peft": False, "lora_r": 8}, "nothing reads 'lora_r'.* use --use_peft true"),
        ({"use_peft": False, "train_eos": "never"}, "nothing reads 'train_eos'"),
        ({"use_peft": False, "reference_ema": 0.9}, "'reference_ema' averages an adapter"),
        ({"use_peft": False, "load_in_8bit": True}, "its whole weights cannot be trained"),
        ({"use_peft": False, "vllm_url": "http://x"}, "not whole weights"),
    ],
)
def test_impossible_combinations_are_refused(wrong, word):
    with pytest.raises(UserError, match=word):
        options = config(**wrong)
        check_ranges(options)
        options.validate()


def test_an_adaptive_coefficient_moves_over_a_tenth_of_the_run():
    assert config(total_episodes=1000, rollout_batch_size=8).horizon == 100
    assert config(total_episodes=1006, rollout_batch_size=8).horizon == 100  # 125 rollouts of 8
    assert config(total_episodes=32, rollout_batch_size=8).horizon == 8  # never less than a rollout
    assert config(kl_horizon=64.0).horizon == 64


def test_the_error_of_the_kl_counts_prompts_not_samples(sft_path):
    metrics = trainer(sft_path, config(samples_per_prompt=4)).step(0)[0]
    assert metrics["kl/sequence_se"] == 0.0
    learner = trainer(sft_path, config(samples_per_prompt=4))
    learner.step(0)
    metrics, rollout = learner.step(1)
    kl = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0).sum(-1).double()
    # two prompts of four samples: |difference of their means| / 2 is the error of the mean
    means = kl.view(2, 4).mean(-1)
    assert math.isclose(
        metrics["kl/sequence_se"], float((means[0] - means[1]).abs()) / 2, rel_tol=1e-5
    )
    one_prompt = trainer(sft_path, config(samples_per_prompt=8)).step(0)[0]
    assert "kl/sequence_se" not in one_prompt


def test_rollout_is_the_same_whatever_the_micro_batch(sft_path):
    rollouts = []
    for size in (1, 8):
        options = config(per_device_train_batch_size=size)
        rollouts.append(trainer(sft_path, options, dtype="float64").step(0)[1])
    one, eight = rollouts
    assert one.samples.response_ids == eight.samples.response_ids
    torch.testing.assert_close(one.logprobs, eight.logprobs, atol=1e-12, rtol=0)


def test_an_engine_is_any_function_that_samples(sft_path):
    calls = []

    def engine(model, prompt_ids, keys, sampling, stop_ids, pad_id, batch_size):
        calls.append(copy.copy(sampling))
        return generate(model, prompt_ids, keys, sampling, stop_ids, pad_id, batch_size)

    learner = trainer(sft_path)
    learner.collector.generate = engine
    learner.step(0)
    assert calls == [Sampling(max_new_tokens=6, temperature=1.0)]


def test_one_step_by_hand_at_a_temperature(base_path):
    """Rewards, advantages, clipping and the two rates of one update, against plain loops over the
    rollout.
    """
    options = config(
        temperature=0.7, kl_coef=0.3, gamma=0.9, gae_lambda=0.8, num_ppo_epochs=1, num_mini_batches=1,
        missing_eos_score=-2.0, value_learning_rate=0.0, vf_coef=0.5, kl_target=1.0, kl_horizon=100,
    )  # fmt: skip
    learner = trainer(base_path, options, dtype="float64")
    # one token in nine, so that some responses end and some do not
    learner.collector.stop_ids = STOPS
    with torch.no_grad():
        for parameter in learner.roles.parameters_of("policy"):
            parameter.add_(0.03 * torch.randn(parameter.shape, dtype=torch.float64))
        learner.roles.heads["value"].weight.normal_(0, 0.1)
    critic = [p.detach().clone() for p in learner.roles.parameters_of("value")]
    policy = [p.detach().clone() for p in learner.roles.parameters_of("policy")]
    seen = {}
    update = learner.update

    def spy(experience, rows, rates, *place):
        seen.update(
            advantages=experience.advantages.clone(),
            returns=experience.returns.clone(),
            rates=rates,
        )
        return update(experience, rows, rates, *place)

    learner.update = spy
    metrics, rollout = learner.step(0)

    ended = [ids[-1] in STOPS for ids in rollout.samples.response_ids]
    assert any(ended) and not all(ended)
    flat, white = [], []
    for b, ids in enumerate(rollout.samples.response_ids):
        score = float(len(ids)) if ended[b] else -2.0
        assert float(rollout.scores[b]) == float(len(ids))
        rewards = [
            -0.3 * float(rollout.logprobs[b, t] - rollout.ref_logprobs[b, t])
            for t in range(len(ids))
        ]
        rewards[-1] += score
        following = running = 0.0
        for t in reversed(range(len(ids))):
            value = float(rollout.values[b, t])
            running = rewards[t] + 0.9 * following - value + 0.9 * 0.8 * running
            following = value
            assert math.isclose(float(seen["returns"][b, t]), running + value, abs_tol=1e-9)
            flat.append(running)
            white.append(float(seen["advantages"][b, t]))
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    for raw, got in zip(flat, white, strict=True):
        assert math.isclose((raw - mean) / deviation, got, abs_tol=1e-6)

    # log-probabilities are those of the distribution that was sampled from: logits / 0.7
    prompt, ids = rollout.samples.prompt_ids[0], rollout.samples.response_ids[0]
    reference = load_model(base_path, "float64").model
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.7
    expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(rollout.ref_logprobs[0, : len(ids)], expected, atol=1e-9, rtol=0)
    assert abs(metrics["ppo/ratio_first"] - 1) < 1e-12 and metrics["kl/sequence"] != 0

    assert seen["rates"] == [1e-2, 0.0]
    assert all(
        torch.equal(a, b) for a, b in zip(critic, learner.roles.parameters_of("value"), strict=True)
    )
    assert any(
        not torch.equal(a, b)
        for a, b in zip(policy, learner.roles.parameters_of("policy"), strict=True)
    )
    error = min(max(metrics["kl/sequence"] / 1.0 - 1, -0.2), 0.2)
    assert math.isclose(learner.estimator.kl.coef, 0.3 * (1 + error * 8 / 100), abs_tol=1e-12)
    assert metrics["kl/coef"] == 0.3
    assert math.isclose(
        metrics["loss/total"], metrics["loss/policy"] + 0.5 * metrics["loss/value"], abs_tol=1e-9
    )


def test_vf_coef_scales_the_critic_s_gradient_and_nothing_else(base_path):
    norms = []
    for weight in (0.0, 1.0, 2.0):
        options = config(vf_coef=weight, num_ppo_epochs=1, num_mini_batches=1, max_grad_norm=1e9)
        learner = trainer(base_path, options, dtype="float64")
        norms.append(learner.step(0)[0]["grad/norm"])
    # |g|^2 = |policy|^2 + (vf_coef |critic|)^2
    critic = norms[1] ** 2 - norms[0] ** 2
    assert critic > 1e-6 and math.isclose(norms[2] ** 2 - norms[0] ** 2, 4 * critic, rel_tol=1e-6)


def test_the_tokens_of_a_step_by_hand(sft_path, reward_path):
    learner = trainer(sft_path, reward=reward_path)
    _, rollout = learner.step(0)
    whole = int(rollout.batch["attention"].sum())
    response = int(rollout.mask.sum())
    assert (learner.budget.episodes, learner.budget.tokens_generated) == (8, response)
    assert learner.budget.tokens_trained == 4 * whole  # two epochs of policy and critic


def test_in_bfloat16_a_run_begins_at_its_reference_and_resumes_to_the_last_bit(
    sft_path, reward_path, tmp_path, device
):
    given = {"reward": reward_path, "dtype": "bfloat16", "device": device}
    learner = trainer(sft_path, **given)
    assert {p.dtype for p in learner.roles.parameters_of("policy")} == {torch.float32}
    metrics, rollout = learner.step(0)
    assert metrics["kl/sequence"] == 0.0 and torch.equal(rollout.logprobs, rollout.ref_logprobs)
    # rows of another pass sum in another order: 2^-8 is a rounding of bfloat16
    assert abs(metrics["ppo/ratio_first"] - 1) < 2**-8
    # folded weights are rounded too, so the engine's log-probabilities do not stand in
    assert 1e-4 < metrics["rollout/logprob_gap"] < 0.05 and not learner.collector.trusts_engine

    learner.save(tmp_path)
    expected = [learner.step(step)[0] for step in (1, 2)]
    again = trainer(sft_path, **given)
    again.load(tmp_path)
    found = [again.step(step)[0] for step in (1, 2)]
    for ours, theirs in zip(found, expected, strict=True):
        same = {name for name in theirs if not name.startswith(("time/", "memory/", "budget/"))}
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    state, other = learner.learner.state_dict(), again.learner.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.gpu
@pytest.mark.parametrize("trunk", ["own", "reward", "policy"])
def test_a_step_on_a_gpu_is_that_on_a_cpu(sft_path, reward_path, trunk):
    steps = []
    for device in ("cpu", "cuda"):
        learner = trainer(sft_path, config(critic_trunk=trunk), reward=reward_path, device=device)
        steps.append(learner.step(0))
    (expected, ours), (found, theirs) = steps
    assert theirs.samples.response_ids == ours.samples.response_ids
    torch.testing.assert_close(theirs.logprobs.cpu(), ours.logprobs, atol=1e-4, rtol=0)
    for name in ("loss/policy", "loss/value", "grad/norm", "score/raw", "ppo/ratio"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    assert found["kl/sequence"] == 0.0 and abs(found["ppo/ratio_first"] - 1) < 1e-5


def test_repetition_by_hand():
    # 1 2 3 4 1 2 3 4: 4-grams 1234 2341 3412 4123 1234, one of five was there before
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(0.2)
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([7] * 10) == pytest.approx(6 / 7)  # seven 4-grams, all the same
    assert repetition([7, 7, 7]) == 0.0 and repetition([]) == 0.0
    assert repetition([1, 2, 1, 2], 2) == pytest.approx(1 / 3)  # 12 21 12
