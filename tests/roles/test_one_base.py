import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from reward.model import load_reward, trainable_reward
from rlhf.compare.runs import load_policies
from rlhf.data.records import Samples
from rlhf.errors import UserError
from rlhf.model.adapters import lora_config
from rlhf.model.loading import load_model, trainable_policy
from rlhf.model.logprobs import completion_batch
from rlhf.model.packing import decoder_and_head
from rlhf.options.ppo import PPOConfig
from rlhf.ppo.rollout import role_scorer
from rlhf.roles.critic import CriticStart, critic_start, find_reward_roles
from rlhf.roles.one_base import Roles
from tests.conftest import random_adapter

PROMPTS, RESPONSES = [[5, 6, 7], [8, 9, 10, 11, 12]], [[20, 21, 22, 2], [30, 31]]


def batch_of(roles=None, prompts=PROMPTS, responses=RESPONSES):
    columns = completion_batch(prompts, responses, 0)
    return dict(zip(("ids", "attention", "positions", "responses", "mask"), columns, strict=True))


def hidden(roles, ids):
    return decoder_and_head(roles.trunk)[0](input_ids=ids, use_cache=False).last_hidden_state


@pytest.fixture()
def roles(sft_path, reward_path):
    return Roles(load_model(sft_path), lora_config(), reward_path)


def test_policy_and_reference_are_equal_to_the_last_bit_at_the_start(roles):
    batch = batch_of()
    with torch.no_grad():
        with roles.use("policy"):
            policy, _ = roles.logprobs(batch)
        with roles.use("reference"):
            reference, _ = roles.logprobs(batch)
    assert torch.equal(policy, reference)


def test_the_reference_is_the_sft_policy_not_the_bare_base(roles, sft_path, base_path):
    batch = batch_of()
    from peft import PeftModel

    sft = PeftModel.from_pretrained(load_model(base_path).model, sft_path).eval()
    with torch.no_grad(), roles.use("reference"):
        got, _ = roles.logprobs(batch)
        logits = sft(batch["ids"], attention_mask=batch["attention"]).logits
        expected = torch.log_softmax(logits, -1)[0, 2:6].gather(
            -1, torch.tensor(RESPONSES[0])[:, None]
        )[:, 0]
        bare = torch.log_softmax(load_model(base_path).model(batch["ids"]).logits, -1)
        bare = bare[0, 2:6].gather(-1, torch.tensor(RESPONSES[0])[:, None])[:, 0]
    torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=0)
    assert (got[0] - bare).abs().max() > 0.01


def test_on_an_initial_model_without_adapter_the_reference_is_the_base(base_path):
    roles = Roles(load_model(base_path), lora_config(r=4))
    batch = batch_of()
    with torch.no_grad():
        for parameter in roles.parameters_of("policy"):
            parameter.add_(0.1)
        with roles.use("policy"):
            policy, _ = roles.logprobs(batch)
        with roles.use("reference"):
            reference, _ = roles.logprobs(batch)
        logits = load_model(base_path).model(batch["ids"], attention_mask=batch["attention"]).logits
    expected = torch.log_softmax(logits, -1)[0, 2:6].gather(
        -1, torch.tensor(RESPONSES[0])[:, None]
    )[:, 0]
    torch.testing.assert_close(reference[0], expected, atol=1e-5, rtol=0)
    assert (policy - reference).abs().max() > 0.01


def test_gradients_reach_the_role_that_learns_and_nothing_else(roles):
    batch = batch_of()
    with roles.use("policy"):
        roles.logprobs(batch)[0].sum().backward()
    touched = {
        n for n, p in roles.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert touched and all(".policy." in n for n in touched)
    roles.zero_grad(set_to_none=True)
    with torch.no_grad():
        roles.heads["value"].weight.add_(0.1)
    with roles.use("value"):
        roles.values(batch).sum().backward()
    touched = {
        n for n, p in roles.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert {"heads.value.weight", "heads.value.bias"} < touched
    assert all(".value." in n or n.startswith("heads.value.") for n in touched)
    learnable = {n for n, p in roles.named_parameters() if p.requires_grad}
    assert all(".policy." in n or ".value." in n or n.startswith("heads.value.") for n in learnable)


def test_gradient_checkpointing_changes_no_gradient(sft_path, reward_path):
    grads = []
    for checkpointing in (False, True):
        roles = Roles(load_model(sft_path), lora_config(), reward_path, checkpointing).train()
        for role in ("policy", "value"):
            with roles.use(role):
                output = (
                    roles.logprobs(batch_of())[0] if role == "policy" else roles.values(batch_of())
                )
                output.square().sum().backward()
        assert roles.trunk.get_base_model().is_gradient_checkpointing is checkpointing
        grads.append({n: p.grad for n, p in roles.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-5, rtol=1e-5)


def test_only_a_head_that_is_frozen_and_plain_makes_its_logits_in_portions(roles, monkeypatch):
    vocabulary = roles.trunk.config.vocab_size
    assert roles.kept_vocabulary(entropy_learns=False) == 0
    assert roles.kept_vocabulary(entropy_learns=True) == vocabulary
    monkeypatch.setattr(roles, "plain_head", False)
    assert roles.kept_vocabulary(entropy_learns=False) == vocabulary


def test_the_reward_role_scores_by_adapter_head_scale_and_bias(roles, base_path, reward_path):
    from peft import PeftModel

    batch = batch_of()
    with torch.no_grad(), roles.use("reward"):
        got = roles.scores(batch)
    plain = load_model(base_path).model
    head = load_file(f"{reward_path}/adapter_model.safetensors")["base_model.model.score.weight"]
    model = PeftModel.from_pretrained(plain, reward_path).eval()
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        expected = float(head[0] @ hidden) * 0.5 - 0.25
        assert abs(got[row].item() - expected) < 1e-5


def test_the_critic_starts_as_the_reward_model(roles):
    # the value before token t reads the state at the token before it; at the last column that state
    # is one short of the reward's, so compare on a batch whose response is cut by one
    batch = batch_of()
    shorter = batch_of(responses=[r[:-1] for r in RESPONSES])
    with torch.no_grad():
        with roles.use("value"):
            values = roles.values(batch)
        with roles.use("reward"):
            scores = roles.scores(shorter)
    assert abs(values[0, 3] - scores[0]) < 1e-5 and abs(values[1, 1] - scores[1]) < 1e-5


def test_further_reward_models_score_as_each_does_alone(sft_path, member_paths):
    roles = Roles(
        load_model(sft_path), lora_config(), member_paths[0], more_rewards=member_paths[1:]
    )
    assert list(roles.reward_roles.values()) == ["reward", "reward2", "reward3"]
    samples = Samples([[]] * 2, [""] * 2, PROMPTS, RESPONSES, [True] * 2, [{}] * 2)
    found = []
    for path, role in roles.reward_roles.items():
        [*scores] = role_scorer(roles, 0, name="x", role=role)(samples).total
        rows = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        assert scores == pytest.approx(load_reward(path, "cpu").score_ids(rows), abs=1e-5)
        found.append(scores)
    # they are three models
    assert min(abs(a - b) for a, b in itertools.pairwise(column[0] for column in found)) > 0.1
    # none of them learns, and the policy is what it would be without them but for rounding: what
    # the second holds beside LoRA wraps modules of the base
    learnable = {n for n, p in roles.named_parameters() if p.requires_grad}
    assert not any("reward" in name for name in learnable)
    alone = Roles(load_model(sft_path), lora_config(), member_paths[0])
    with torch.no_grad():
        for role in ("policy", "reference"):
            with roles.use(role), alone.use(role):
                pair = [each.logprobs(batch_of())[0] for each in (roles, alone)]
            torch.testing.assert_close(*pair, atol=1e-5, rtol=0)


def test_the_critic_is_that_of_the_first_reward_model(sft_path, member_paths):
    settings = {"lora": lora_config(), "reward_path": member_paths[0]}
    own = Roles(load_model(sft_path), **settings, more_rewards=member_paths[1:])
    alone = Roles(load_model(sft_path), **settings)
    pairs = zip(own.parameters_of("value"), alone.parameters_of("value"), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)

    fixed = {**settings, "critic_trunk": "reward", "more_rewards": member_paths[1:]}
    roles, batch = Roles(load_model(sft_path), **fixed), batch_of()
    with torch.no_grad(), roles.keeping_states():
        for role in roles.reward_roles.values():
            with roles.use(role):
                roles.scores(batch, role)
        kept = roles.kept_states(batch)
        with roles.use("reward"):
            expected = roles.states(batch)
        with roles.use("reward3"):
            other = roles.states(batch)
    torch.testing.assert_close(kept, expected, atol=1e-6, rtol=0)
    assert (kept - other).abs().max() > 0.01


def adapter(roles, name):
    return {
        n.replace(f".{name}.", "."): p
        for n, p in roles.trunk.named_parameters()
        if f".{name}." in n
    }


def test_a_critic_from_the_reward_model_is_its_adapter_and_its_scores(roles):
    value, reward = adapter(roles, "value"), adapter(roles, "reward")
    assert value.keys() == reward.keys() and all(torch.equal(value[n], reward[n]) for n in value)
    # reward.json says scale 0.5, bias -0.25
    assert torch.equal(roles.heads["value"].weight, 0.5 * roles.heads["reward"].weight)
    assert roles.heads["value"].bias.item() == -0.25


def test_the_critic_starts_from_what_the_reward_model_adds_to_the_total(sft_path, reward_path):
    roles = Roles(load_model(sft_path), lora_config(), reward_path, reward_weight=-3.0)
    # scale 0.5 and bias -0.25, times the weight of its score
    assert torch.equal(roles.heads["value"].weight, -1.5 * roles.heads["reward"].weight)
    assert roles.heads["value"].bias.item() == 0.75


def test_the_critic_starts_by_the_weights_of_the_scorers():
    def start(weight, others=None, **more):
        options = PPOConfig(
            model_name_or_path="x",
            data=["x"],
            output_dir="x",
            reward=[{"model": "rm"}],
            critic_trunk="own",
            **more,
        )
        return critic_start(options, "rm", weight, others or {})

    assert start(1.0) == CriticStart("reward", 1.0, ())
    others = {"length": 2.0, "seen": 0.0}
    assert start(0.5, others) == CriticStart("reward", 0.5, ("length (weight 2)",))
    assert start(0.5, others, normalize_scores=True).left_out == (
        "length (weight 2)",
        "the normalisation of scores",
    )
    assert start(0.5, others, critic_from="policy") == CriticStart("policy")
    assert start(0.0, {"length": 1.0}) == CriticStart("policy")
    with pytest.raises(UserError, match="only watched"):
        start(0.0, {"length": 1.0}, critic_from="reward")
    assert start(1.0, advantage_estimator="rloo", samples_per_prompt=2) == CriticStart(None)


def test_a_reward_model_that_is_learnt_from_becomes_the_role(sft_path, reward_path, tmp_path):
    initial, other = load_model(sft_path), str(tmp_path / "other")
    shutil.copytree(reward_path, other)
    assert find_reward_roles({other: 0.0, reward_path: 1.0}, initial) == [reward_path, other]
    assert find_reward_roles({other: 0.0}, initial) == [other]
    assert find_reward_roles({sft_path + "/nowhere": 1.0}, initial) == []


def test_a_reward_model_that_reads_other_ids_or_is_no_lora_becomes_no_role(
    sft_path, reward_path, tmp_path
):
    initial, other = load_model(sft_path), tmp_path / "other"
    for file, key in (("rlhf.json", "tokenizer_fingerprint"), ("adapter_config.json", "peft_type")):
        shutil.copytree(reward_path, other)
        content = json.loads((other / file).read_text())
        (other / file).write_text(json.dumps({**content, key: "IA3"}))
        assert find_reward_roles({str(other): 1.0, reward_path: 1.0}, initial) == [reward_path]
        shutil.rmtree(other)


def test_a_critic_from_the_policy_is_its_adapter_and_knows_nothing(sft_path, reward_path):
    roles = Roles(load_model(sft_path), lora_config(r=2), reward_path, critic="policy")
    value, policy = adapter(roles, "value"), adapter(roles, "policy")
    assert value.keys() == policy.keys() and all(torch.equal(value[n], policy[n]) for n in value)
    assert not roles.heads["value"].weight.any() and not roles.heads["value"].bias.any()
    with torch.no_grad(), roles.use("value"):
        assert not roles.values(batch_of()).any()


def test_a_fresh_critic_is_the_base(sft_path, reward_path):
    roles = Roles(load_model(sft_path), lora_config(r=2), reward_path, critic="fresh")
    value = adapter(roles, "value")
    # its own rank; the policy's is 4
    assert all(p.shape[0] == 2 for n, p in value.items() if "lora_A" in n)
    assert all(not p.any() for n, p in value.items() if "lora_B" in n)
    assert not roles.heads["value"].weight.any() and not roles.heads["value"].bias.any()


def test_a_critic_starts_from_the_reward_model_where_there_is_one(sft_path, base_path, reward_path):
    with_reward = Roles(load_model(sft_path), lora_config(), reward_path, critic="auto")
    assert torch.equal(with_reward.heads["value"].weight, 0.5 * with_reward.heads["reward"].weight)
    without = Roles(load_model(sft_path), lora_config(), critic="auto")
    value, policy = adapter(without, "value"), adapter(without, "policy")
    assert all(torch.equal(value[n], policy[n]) for n in policy)
    with pytest.raises(UserError, match="cannot start from the reward model"):
        Roles(load_model(sft_path), lora_config(), critic="reward")


def test_without_a_critic_there_is_no_value_role(sft_path, reward_path, tmp_path):
    initial = load_model(sft_path)
    roles = Roles(initial, lora_config(), reward_path, critic=None)
    assert not roles.has_critic and roles.parameters_of("value") == []
    assert not any(
        ".value." in n or n.startswith("heads.value") for n, _ in roles.named_parameters()
    )
    roles.save(tmp_path, initial)
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "value").exists()


@pytest.mark.parametrize("start", ["sft", "base"])
def test_a_moving_reference_begins_as_the_policy_and_follows_it(sft_path, base_path, start):
    path = sft_path if start == "sft" else base_path
    roles = Roles(load_model(path), lora_config(r=4), critic=None, ema_reference=True)
    assert not any(p.requires_grad for p in roles.ema_parameters())
    batch = batch_of()
    with torch.no_grad():
        read = {}
        for role in ("policy", "ema_reference", "reference"):
            with roles.use(role):
                read[role] = roles.logprobs(batch)[0]
        assert torch.equal(read["policy"], read["ema_reference"])
        before = {n: p.clone() for n, p in adapter(roles, "ema_reference").items()}
        for parameter in roles.parameters_of("policy"):
            parameter.add_(0.1)
        roles.update_ema(0.75)
        for name, policy in adapter(roles, "policy").items():
            torch.testing.assert_close(
                adapter(roles, "ema_reference")[name],
                0.75 * before[name] + 0.25 * policy,
                atol=1e-7,
                rtol=0,
            )
        with roles.use("reference"):
            assert torch.equal(roles.logprobs(batch)[0], read["reference"])
        with roles.use("ema_reference"):
            assert (roles.logprobs(batch)[0] - read["ema_reference"]).abs().max() > 1e-4


def test_dropout_is_off_wherever_a_model_keeps_it(sft_path):
    initial = load_model(sft_path)
    initial.model.config.attention_dropout = 0.5
    for layer in initial.model.model.layers:
        # read in the forward pass as a number, not as an nn.Dropout
        layer.self_attn.attention_dropout = 0.5
    roles = Roles(initial, lora_config()).train()
    with torch.no_grad(), roles.use("policy"):
        assert torch.equal(roles.logprobs(batch_of())[0], roles.logprobs(batch_of())[0])


def test_a_row_does_not_change_with_batch_or_padding(roles):
    batch = batch_of()
    alone = batch_of(prompts=PROMPTS[:1], responses=RESPONSES[:1])
    alone = {name: torch.nn.functional.pad(column, (0, 11)) for name, column in alone.items()}
    with torch.no_grad(), roles.use("policy"):
        together, one = roles.logprobs(batch)[0][0, :4], roles.logprobs(alone)[0][0, :4]
    torch.testing.assert_close(together, one, atol=1e-6, rtol=0)


def test_saved_roles_come_back(roles, sft_path, tmp_path):
    with torch.no_grad():
        for parameter in roles.parameters_of("policy") + roles.parameters_of("value"):
            parameter.add_(0.05 * torch.randn_like(parameter))
    initial = load_model(sft_path)
    roles.save(tmp_path, initial)
    batch = batch_of()
    again = Roles(load_model(str(tmp_path)), lora_config())
    with torch.no_grad():
        with roles.use("policy"):
            expected, _ = roles.logprobs(batch)
        with again.use("policy"):
            got, _ = again.logprobs(batch)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    head = load_file(tmp_path / "value" / "value_head.safetensors")
    assert torch.equal(head["weight"], roles.heads["value"].weight)
    assert json.loads((tmp_path / "rlhf.json").read_text())["program"] == "ppo"


def test_a_reward_adapter_without_its_head_is_refused(sft_path):
    with pytest.raises(UserError, match="score head"):
        Roles(load_model(sft_path), lora_config(), sft_path)


def test_an_adapter_of_another_base_is_refused(sft_path, reward_path, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(reward_path, other)
    identity = json.loads((other / "rlhf.json").read_text())
    (other / "rlhf.json").write_text(json.dumps({**identity, "base_fingerprint": "0" * 16}))
    with pytest.raises(UserError, match="trained on base 0000"):
        Roles(load_model(sft_path), lora_config(), str(other))


def test_weights_that_do_not_fit_are_refused(base_path, tmp_path):
    path = random_adapter(base_path, tmp_path / "a", seed=5)
    weights = load_file(f"{path}/adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, f"{path}/adapter_model.safetensors")
    with pytest.raises(UserError, match="do not fit"):
        Roles(load_model(path), lora_config())


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "modules_to_save head": {"modules_to_save": ["lm_head"]},
    "modules_to_save norms": {"modules_to_save": ["norm"]},
    "modules_to_save both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "bias of a base without": {"bias": "all"},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "tokens": {"trainable_token_indices": [2, 7]},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [2]}},
}


def by_peft(base_path, path, ids):
    """Logits and last hidden states of the adapter as PEFT alone loads it."""
    from peft import PeftModel

    base = load_model(base_path, "float64").model
    model = PeftModel.from_pretrained(base, path).double().eval()
    with torch.no_grad():
        return model(ids).logits, model.get_base_model().base_model(ids).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
def test_every_role_is_the_adapter_as_peft_loads_it_and_is_saved_as_it_was_trained(
    base_path, tmp_path, kind
):
    ids = torch.arange(3, 25)[None]
    path = random_adapter(base_path, tmp_path / "sft", seed=5, **KINDS[kind])
    expected, states = by_peft(base_path, path, ids)
    roles = Roles(load_model(path, "float64"), lora_config(), ema_reference=True)

    def logits(role):
        with torch.no_grad(), roles.use(role):
            return roles.trunk(ids).logits

    for role in ("policy", "reference", "ema_reference"):
        torch.testing.assert_close(logits(role), expected, atol=1e-9, rtol=0)
    with torch.no_grad(), roles.use("value"):
        torch.testing.assert_close(hidden(roles, ids), states, atol=1e-9, rtol=0)

    optimizer = torch.optim.SGD(
        [{"params": roles.parameters_of(role)} for role in ("policy", "value")], lr=0.1
    )
    before = {name: parameter.detach().clone() for name, parameter in roles.named_parameters()}
    with torch.no_grad():
        roles.heads["value"].weight.fill_(0.1)
    for _ in range(2):
        with roles.use("policy"):
            roles.trunk(ids).logits.square().mean().backward()
        with roles.use("value"):
            roles.heads["value"](hidden(roles, ids)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {
        name
        for name, parameter in roles.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    learnt = {id(p) for role in ("policy", "value") for p in roles.parameters_of(role)}
    assert moved == {
        name for name, parameter in roles.named_parameters() if id(parameter) in learnt
    }
    assert (logits("policy") - expected).abs().max() > 0.01
    torch.testing.assert_close(logits("reference"), expected, atol=1e-9, rtol=0)
    roles.update_ema(0.0)
    torch.testing.assert_close(logits("ema_reference"), logits("policy"), atol=1e-9, rtol=0)

    roles.save(tmp_path / "ppo", load_model(path))
    torch.testing.assert_close(
        by_peft(base_path, tmp_path / "ppo", ids)[0], logits("policy"), atol=1e-9, rtol=0
    )
    with torch.no_grad(), roles.use("value"):
        states = hidden(roles, ids)
    torch.testing.assert_close(
        by_peft(base_path, tmp_path / "ppo" / "value", ids)[1], states, atol=1e-9, rtol=0
    )


def test_beside_lora_too_an_adapter_learns_in_float32_on_a_base_in_bfloat16(base_path, tmp_path):
    settings = {"modules_to_save": ["norm"], "trainable_token_indices": [2]}
    path = random_adapter(base_path, tmp_path, seed=5, **settings)
    roles = Roles(load_model(path, "bfloat16"), lora_config())
    with roles.use("policy"):
        logits = roles.trunk(torch.arange(3, 25)[None]).logits
        logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    assert all(
        p.dtype == torch.float32 and p.grad is not None for p in roles.parameters_of("policy")
    )


PROGRAMS = {
    "sft and dpo": lambda path: trainable_policy(load_model(path), None),
    "reward": lambda path: trainable_reward(load_model(path), None),
    "ppo": lambda path: Roles(load_model(path), lora_config()),
    "compare": lambda path: load_policies([path], torch.device("cpu"), 8, 8),
}


def assert_refused(path, *words, programs=tuple(PROGRAMS)):
    for program in programs:
        with pytest.raises(UserError) as error:
            PROGRAMS[program](str(path))
        assert all(word in str(error.value) for word in words), (program, str(error.value))


def renamed(path, change):
    file = f"{path}/adapter_model.safetensors"
    save_file({change(name): weight for name, weight in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("_orig_mod.", "saved through a wrapper"),
        ("base_model.model.", "do not fit this base: no place for base_model.model.base_model."),
    ],
)
def test_an_adapter_under_other_names_is_refused_by_every_program(
    base_path, tmp_path, prefix, said
):
    path = random_adapter(base_path, tmp_path, seed=5)
    renamed(path, lambda name: prefix + name)
    assert_refused(path, said)


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [2], "modules_to_save": ["lm_head"]},
    ],
)
def test_settings_that_adapters_cannot_share_a_base_with_are_refused_by_every_program(
    base_path, tmp_path, settings
):
    path = random_adapter(base_path, tmp_path, seed=5, **settings)
    of_the_head = "modules_to_save" in settings
    programs = [p for p in PROGRAMS if not (of_the_head and p == "reward")]  # which has none
    assert_refused(path, list(settings)[-1], "merged model", programs=programs)


def test_trained_biases_are_refused_by_every_program(tokenizer, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    path = random_adapter(
        str(tmp_path / "b"), tmp_path / "a", seed=5, target_modules=["c_attn"], bias="lora_only"
    )
    assert_refused(path, "'bias: lora_only'", "merged model")


def test_base_weights_beside_an_adapter_are_taken_if_they_are_the_bases(base_path, tmp_path):
    path = random_adapter(base_path, tmp_path, seed=5, target_modules=["q_proj", "embed_tokens"])
    file, name = (
        f"{path}/adapter_model.safetensors",
        "base_model.model.model.embed_tokens.base_layer.weight",
    )
    weights = load_file(file)
    assert name in weights  # PEFT saves them with LoRA on embeddings
    trainable_policy(load_model(path), None)
    weights[name][5] += 1.0
    save_file(weights, file)
    assert_refused(path, name, "differs from the base's")


def test_reward_models_and_critics_are_no_policies(roles, sft_path, reward_path, tmp_path):
    assert_refused(reward_path, "a reward model", programs=("sft and dpo", "ppo", "compare"))
    roles.save(tmp_path, load_model(sft_path))
    assert_refused(tmp_path / "value", "the critic of a PPO run", f"the policy is in {tmp_path}")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("adapter_config.json", "{", "cannot be read as JSON"),
        ("adapter_model.safetensors", "xx", "the weights cannot be read"),
        ("adapter_model.safetensors", None, "adapter_model.safetensors is not"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused_by_every_program(
    base_path, tmp_path, file, content, words
):
    path = random_adapter(base_path, tmp_path, seed=5)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    assert_refused(path, str(tmp_path), words)


def test_a_run_loads_from_whatever_directory(base_path, tmp_path, monkeypatch):
    import shutil

    from rlhf.model.files import adapter_base

    shutil.copytree(base_path, tmp_path / "runs" / "world" / "base")
    path = random_adapter(base_path, tmp_path / "runs" / "sft", seed=5)
    config = json.loads((tmp_path / "runs" / "sft" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "runs/world/base"  # as a run started in tmp_path writes it
    (tmp_path / "runs" / "sft" / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.chdir("/")
    assert adapter_base(path) == str(tmp_path / "runs" / "world" / "base")
    assert load_model(path).base_path == str(tmp_path / "runs" / "world" / "base")
