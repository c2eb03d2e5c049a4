"""PPO on whole weights: the trainer against plain loops, and what its models start from and save."""

import json
import math
import shutil

import pytest
import torch
from torch import nn

from reward.model import load_reward
from rlhf.data.records import Samples
from rlhf.errors import UserError
from rlhf.model.files import check_model
from rlhf.model.loading import load_model
from rlhf.ppo.batches import TrainingData
from rlhf.ppo.rollout import padded_batch, role_scorer
from rlhf.ppo.trainer import PPOTrainer
from rlhf.ranks.distributed import DistributedContext
from rlhf.ranks.optimizer_engine import make_engine
from rlhf.roles.critic import CriticStart, critic_start, find_whole_start
from rlhf.roles.whole_weights import WholeRoles
from tests import trial
from tests.ppo.reference import Reference
from tests.ppo.test_reference import (
    GRID,
    TAKEN_BACK,
    check_taken_back,
    disagreements,
    launched,
    single,
)
from tests.ppo.test_reference import paths as paths_of
from tests.ppo.test_trainer import PROMPTS, by_length, config

# the first three quickly, the others on two ranks
NAMES = ["scores and rewards shaped", "entropy, clip higher, ptx", "updates taken back"]
MORE = [*NAMES, "rloo", "kl in the loss, k2", "warm-up of the critic"]


class WholeReference(Reference):
    """The loops on whole weights: a role is a model of its own, and nothing is added to its layers."""

    def hidden(self, ids, role):
        self.role = role
        return super().hidden(ids, None)

    def base(self, name):
        models = {"policy": "policy.model", "value": "critic", "reference": "trunk.model"}
        return self.w[f"{models[self.role]}.{name}.weight"]

    def role_of_reference(self):
        return "reference"

    def groups(self):
        policy = [name for name in self.w if name.startswith("policy.")]
        critic = list(filter(self.is_critics, self.w))
        return [policy, critic] if self.has_critic else [policy]

    def is_critics(self, name):
        return name.startswith(("critic.", "heads.value."))


def case_of(name, base_path):
    """Return a case of the grid on whole weights, which take smaller steps, without a reward role."""
    case = GRID[name] | {"model": "base", "reward": False}
    rates = {"learning_rate": 5e-4, "value_learning_rate": 1e-3}
    case["options"] = case["options"] | rates | {"critic_from": "policy"}
    return paths_of(case, base_path, None, None) | {"whole": True}


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_on_whole_weights_is_the_reference(name, base_path):
    case = case_of(name, base_path)
    with trial.exact_llama():
        found = trial.run(case)
    wrong = disagreements(case, found, 1e-9, WholeReference)
    assert not wrong, "\n".join(wrong[:20])
    moved = {n for n in found["after"] if not torch.equal(found["after"][n], found["before"][n])}
    assert moved == {n for n in found["after"] if not n.startswith("trunk.")}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_ranks_on_whole_weights_are_the_reference(base_path, tmp_path):
    """Float64 to 1e-9 under ZeRO-2, float32 to 1e-5 under the others."""
    exact = [case_of(name, base_path) for name in MORE]
    cases, stages = list(exact), ["2"] * len(exact)
    for stage in ("0", "3", "3_offload"):
        cases += [single(case) for case in exact[:3]]
        stages += [stage] * 3
    for case, found in zip(cases, launched(tmp_path, cases, stages), strict=True):
        tolerance = 1e-9 if case["dtype"] == "float64" else 1e-5
        wrong = disagreements(case, found, tolerance, WholeReference)
        assert not wrong, "\n".join([str(case["options"]), *wrong[:20]])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_a_guard_takes_back_of_weights_in_bfloat16_is_not_made(base_path, tmp_path):
    case = TAKEN_BACK | {"model": "base", "dtype": "bfloat16"}
    case["options"] = case["options"] | {"learning_rate": 1e-3, "critic_from": "policy"}
    case = paths_of(case, base_path, None, None) | {"whole": True}
    stages = ["1", "2", "3", "3_offload"]
    for found in launched(tmp_path, [case] * len(stages), stages, ranks=1):
        check_taken_back(found)


def roles_of(path, reward=None, dtype="float32", **settings):
    torch.manual_seed(0)
    return WholeRoles(load_model(path, dtype), None, reward, **settings)


def learner_of(path, options=None, reward=None, **settings):
    options = options or config(learning_rate=1e-3)
    roles, tokenizer = roles_of(path, reward, **settings), load_model(path).tokenizer
    data = TrainingData(PROMPTS, tokenizer, [tokenizer.eos_token_id])
    return PPOTrainer(options, roles, by_length, data, DistributedContext())


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trunk", ["own", "reward", "policy"])
def test_before_the_first_update_whole_policy_and_reference_agree(
    base_path, reward_path, dtype, trunk
):
    learner = learner_of(base_path, reward=reward_path, dtype=dtype, critic_trunk=trunk)
    before = weights_of(learner.roles)
    metrics, rollout = learner.step(0)
    assert metrics["kl/sequence"] == 0.0 and torch.equal(rollout.logprobs, rollout.ref_logprobs)
    assert abs(metrics["ppo/ratio_first"] - 1) < (1e-6 if dtype == "float32" else 2**-8)
    assert rollout.logprobs.dtype == rollout.values.dtype == torch.float32
    # more than the rounding between what samples and what measures
    assert abs(learner.step(1)[0]["kl/sequence"]) > 1e-3

    # nothing else than the policy and the critic
    after = weights_of(learner.roles)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    parts = {name.split(".")[0] for name in moved}
    assert parts == {"policy", "heads", *(["critic"] if trunk == "own" else [])}
    assert {name for name in moved if "heads" in name} == {
        "heads.value.weight",
        "heads.value.bias",
    }


def test_a_whole_critic_starts_as_the_reward_model(base_path, member_paths):
    # the second one has a norm of its own, and a trained row of the embeddings
    path = member_paths[1]
    roles = roles_of(base_path, path, reward_weight=-3.0)
    batch = padded_batch([[3, 4, 5], [6, 7]], [[8, 9], [10, 11, 12]], 0, torch.device("cpu"))
    with torch.no_grad(), roles.use("value"):
        values = roles.values(batch)
    # the score of what stands before each token
    prefixes = padded_batch([[3], [6]], [[4, 5], [7]], 0, torch.device("cpu"))
    with torch.no_grad(), roles.use("reward"):
        scores = roles.scores(prefixes)
    assert torch.allclose(values[:, 0], -3.0 * scores, atol=1e-5) and scores.abs().min() > 0.01
    assert not any("lora" in name for name, _ in roles.critic.named_parameters())


def test_a_whole_critic_starts_as_a_reward_model_of_whole_weights(base_path, whole_reward_path):
    roles = roles_of(base_path, critic_path=whole_reward_path, reward_weight=-3.0)
    batch = padded_batch([[3, 4, 5], [6, 7]], [[8, 9], [10, 11, 12]], 0, torch.device("cpu"))
    with torch.no_grad(), roles.use("value"):
        values = roles.values(batch)
    # of what stands before the first and the second token of each response
    rows = [[3, 4, 5], [6, 7], [3, 4, 5, 8], [6, 7, 10]]
    scores = load_reward(whole_reward_path, "cpu").score_ids(rows)
    assert torch.allclose(values[:, :2].T.flatten(), -3.0 * torch.tensor(scores), atol=1e-5)
    assert min(map(abs, scores)) > 0.01 and not roles.reward_roles
    # the policy is the base still
    assert torch.equal(roles.policy.model.norm.weight, roles.trunk.model.norm.weight)


def test_which_reward_model_a_whole_critic_starts_from(
    base_path, reward_path, whole_reward_path, tmp_path
):
    initial = load_model(base_path)
    deeper, reads_otherwise = tmp_path / "deeper", tmp_path / "reads"
    for folder in (deeper, reads_otherwise):
        shutil.copytree(whole_reward_path, folder)
    settings = json.loads((deeper / "config.json").read_text())
    layers = {"num_hidden_layers": settings["num_hidden_layers"] + 1, "layer_types": None}
    (deeper / "config.json").write_text(json.dumps(settings | layers))
    tokenizer = load_model(base_path).tokenizer
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(reads_otherwise)

    unlike = {str(deeper): 1.0, str(reads_otherwise): 1.0}
    assert find_whole_start(unlike, None, initial) is None
    assert find_whole_start({whole_reward_path: 0.0}, None, initial) is None
    assert find_whole_start(unlike | {whole_reward_path: 0.5}, None, initial) == whole_reward_path
    both = {whole_reward_path: 1.0, reward_path: 1.0}
    assert find_whole_start(both, reward_path, initial) == reward_path
    # a role that is only watched
    watched = both | {reward_path: 0.0}
    assert find_whole_start(watched, reward_path, initial) == whole_reward_path


def test_a_critic_reads_no_states_of_a_reward_model_that_is_no_role():
    # with a role they would be fitted to its states
    start = critic_start(config(), "runs/reward", 0.5, {"length": 2.0}, is_role=False)
    assert start == CriticStart("reward", 0.5, ("length (weight 2)",))


def test_a_critic_without_a_reward_model_to_start_from_is_refused(base_path):
    with pytest.raises(UserError, match="none of the scorers is an adapter"):
        roles_of(base_path, critic="reward")


def test_a_reward_model_scores_on_the_frozen_base_while_a_whole_policy_moves(
    base_path, reward_path
):
    learner = learner_of(base_path, reward=reward_path, critic_trunk="reward")
    score = role_scorer(learner.roles, 0)
    samples = Samples(
        prompts=[[]], responses=[""], prompt_ids=[[3, 4]], response_ids=[[5, 6]], ended=[True],
        metadata=[{}],
    )  # fmt: skip
    before = score(samples).total
    learner.step(0)
    assert learner.roles.critic is None and score(samples).total == before


def test_saved_whole_weights_are_the_policy_and_the_critic_is_no_start(base_path, tmp_path):
    learner = learner_of(base_path)
    learner.step(0)
    learner.roles.save(tmp_path, load_model(base_path))
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        saved = load_model(str(tmp_path)).model(ids).logits
        assert torch.equal(saved, learner.roles.policy(ids).logits)
    check_model(str(tmp_path))
    with pytest.raises(UserError, match=r"the critic of a PPO run, .* the policy is in"):
        check_model(str(tmp_path / "value"))
    with torch.no_grad():
        learner.roles.policy.model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="not saved"):
        learner.roles.save(tmp_path / "again", load_model(base_path))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_whole_weights_goes_on_to_the_last_bit(base_path, tmp_path, dtype):
    # steps that bfloat16 alone would round away
    options = config(learning_rate=3e-5)
    learner = learner_of(base_path, options, dtype=dtype)
    learner.step(0)
    learner.save(tmp_path)
    again = learner_of(base_path, options, dtype=dtype)
    again.load(tmp_path)
    for one in (learner, again):
        one.step(1)
    ours, theirs = weights_of(learner.roles), weights_of(again.roles)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    copies = [one.learner.masters.copies for one in (learner, again)]
    assert all(map(torch.equal, *(held.values() for held in copies)))
    assert bool(copies[0]) == (dtype == "bfloat16")


def test_weights_in_bfloat16_move_by_steps_smaller_than_their_rounding():
    # AdamW's step of a constant gradient is the rate, whatever its size; at 1 bfloat16 rounds to 2^-7
    module = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(module.weight)
    engine = make_engine(module, [{"params": [module.weight]}], DistributedContext(), adam_eps=0.0)
    for _ in range(100):
        # of two parts, of which bfloat16 would lose the second in the sum
        for part in (1.0, 2.0**-10):
            engine.backward(part * module.weight.sum(), last=part < 1)
        assert engine.masters.copies[module.weight].grad == 1 + 2.0**-10
        assert engine.step([1e-3]) == 1 + 2.0**-10
    assert module.weight.item() == torch.tensor(0.9).bfloat16().item()
    assert abs(engine.masters.of(module.weight).item() - 0.9) < 1e-5


def test_gradient_checkpointing_of_whole_weights_changes_nothing(base_path):
    found = []
    for recomputes in (False, True):
        learner = learner_of(base_path, gradient_checkpointing=recomputes)
        learner.step(0)
        found.append(weights_of(learner.roles))
        assert learner.roles.policy.is_gradient_checkpointing is recomputes
        assert learner.roles.critic.is_gradient_checkpointing is recomputes
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
