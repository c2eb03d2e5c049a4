"""Estimates of whole programs: against counts worked by hand, and against real tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf.errors import UserError
from rlhf.options.offline import DPORunConfig, RewardRunConfig, SFTRunConfig
from rlhf.options.ppo import PPOConfig
from rlhf.plan.estimate import add_whole_gradients, estimate, setup_of
from rlhf.plan.ledger import Ledger, Reduction, size_of
from rlhf.plan.memory import Phase, Setup, Weights, step_phase
from rlhf.plan.passes import (
    Rows,
    as_if_on,
    forward,
    learn,
    learning_peak,
    measuring_peak,
    sampling_peak,
)
from rlhf.plan.roles import Start
from rlhf.plan.shape import empty_model, scale_bytes, to_fake

SHAPE = LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
# q and o 16 x 16, k and v 16 x 8, three of 16 x 24 and two norms a layer; embeddings, head, norm
LAYER = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16
NUMBERS = 2 * LAYER + 2 * 50 * 16 + 16
# rank 4: r (in + out) of each linear layer
ADAPTER = 2 * 4 * (2 * 32 + 2 * 24 + 3 * 40)
COMMON = {
    "model_name_or_path": "x", "data": ["x.jsonl"], "output_dir": "plan-out", "lora_r": 4,
    "max_prompt_length": 8, "max_response_length": 4, "per_device_train_batch_size": 3,
}  # fmt: skip


def planned(program, cls, ranks=1, launched=False, start=None, device="cpu", **options):
    config = cls(**COMMON | options)
    setup = setup_of(program, config, ranks, device, launched=launched)
    return estimate(program, config, start or Start(SHAPE), setup)


def test_parameters_are_those_of_the_model():
    assert sum(p.numel() for p in AutoModelForCausalLM.from_config(SHAPE).parameters()) == NUMBERS
    sft = planned("sft", SFTRunConfig)
    assert sft.numbers == {"trainable": ADAPTER, "frozen": NUMBERS}
    assert sft.phases[0].parts["base"] == pytest.approx(4 * NUMBERS, abs=200)
    whole = planned("sft", SFTRunConfig, use_peft=False)
    assert whole.numbers == {"trainable": NUMBERS, "frozen": 0}
    # two moments in float32
    assert whole.peak.parts["optimizer"] == 8 * NUMBERS


def test_ppo_on_whole_weights_holds_the_base_and_what_learns():
    reward = [{"model": "runs/reward"}]
    given = {
        "use_peft": False,
        "lora_r": 16,
        "reward": reward,
        "total_episodes": 64,
        "device": "cpu",
    }
    fitted = planned("ppo", PPOConfig, **given)
    # the critic is fitted to the reward model's states, whose adapter has the default rank of 16
    assert fitted.numbers == {"trainable": NUMBERS, "frozen": NUMBERS + 4 * ADAPTER}
    own = planned("ppo", PPOConfig, **given, critic_trunk="own")
    critic = NUMBERS - 50 * 16 + 16 + 1
    assert own.numbers["trainable"] == NUMBERS + critic
    parts = {phase.name: phase.parts for phase in own.phases}
    assert parts["learn"]["base"] == pytest.approx(4 * NUMBERS, abs=200)
    assert parts["learn"]["learning weights"] == 4 * (NUMBERS + critic)
    assert parts["learn"]["optimizer"] == 8 * (NUMBERS + critic)
    # the critic's head is not among the model's numbers
    assert parts["learn"]["gradients"] >= 4 * (NUMBERS + critic - 17)
    assert parts["sample"]["merged copy"] == 0

    # bfloat16 learns through copies in float32, in a plain process and under ZeRO
    mixed = planned("ppo", PPOConfig, **given, dtype="bfloat16")
    parts = {phase.name: phase.parts for phase in mixed.phases}
    assert parts["step"]["optimizer"] == 12 * NUMBERS and parts["step"]["gradients"] == 4 * NUMBERS
    divided = {"dtype": "bfloat16", "ranks": 2, "launched": True, "deepspeed": "zero3"}
    parts = planned("ppo", PPOConfig, **given, **divided).phases[0].parts
    assert parts["optimizer"] == 12 * NUMBERS / 2 and parts["learning weights"] == NUMBERS
    with pytest.raises(UserError, match="which ZeRO 0 does not keep"):
        planned("ppo", PPOConfig, **given, **divided | {"deepspeed": "zero0"})


@pytest.mark.parametrize(
    ("setup", "before", "learning", "step"),
    [
        # 100 numbers in bfloat16 on 4 ranks: sums of all in float32, and in the step a flat copy of a quarter
        (Setup(4, "cpu", launched=False), 200, 400, 400),
        (Setup(4, "cpu", stage=1), 200, 400, 400 + 100),
        # a quarter of the sums, of which ZeRO 2 needs no copy
        (Setup(4, "cpu", stage=2), 50, 100, 100),
        (Setup(4, "cpu", stage=3), 50, 100, 100 + 100),
        (Setup(4, "cpu", stage=2, offload_optimizer=True), 0, 0, 0),
    ],
)
def test_gradients_of_whole_weights_in_bfloat16_are_summed_in_float32(
    setup, before, learning, step
):
    weights = Weights(0, 0, 0, trained=100, trained_size=2, masters=True)
    phases = [Phase("learn", {"gradients": before}), step_phase(weights, setup)]
    add_whole_gradients(phases, weights, setup, torch.nn.Linear(10, 10, bias=False))
    assert [phase.parts["gradients"] for phase in phases] == [learning, step]


def test_a_setup_is_read_and_refused_as_the_program_does(tmp_path):
    launched = {"ranks": 2, "launched": True}

    def bucket(deepspeed):
        found = planned("sft", SFTRunConfig, deepspeed=deepspeed, **launched)
        return {phase.name: phase.parts for phase in found.phases}["learn"]["buckets"]

    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}')
    # allocated whole, in float32
    assert bucket(str(own)) == 4 * 1000
    assert bucket("zero2") == bucket("zero3") == 4 * 50_000_000
    for packed in ({"load_in_4bit": True}, {"optim": "adamw_8bit"}):
        with pytest.raises(UserError, match="does not go with ZeRO-3"):
            planned("sft", SFTRunConfig, deepspeed="zero3", **packed, **launched)
    own.write_text('{"zero_optimization": {"stage": 7}}')
    with pytest.raises(UserError, match=r"own\.json: zero_optimization.stage is 7"):
        planned("sft", SFTRunConfig, deepspeed=str(own), **launched)


def test_roles_are_adapters_on_one_base(tmp_path):
    dpo = planned("dpo", DPORunConfig)
    assert dpo.peak.parts["roles"] == 4 * ADAPTER
    # policy and critic learn, reference and reward model do not; a head of 17 numbers
    ppo = planned(
        "ppo", PPOConfig, start=Start(SHAPE, None, has_adapter=True),
        reward=[{"model": "runs/reward"}], critic_trunk="own",
    )  # fmt: skip
    assert ppo.numbers["trainable"] == 2 * ADAPTER + 17
    assert ppo.peak.parts["roles"] == 2 * 4 * ADAPTER
    # a critic on the reward model's states learns nothing by gradients
    fitted = planned("ppo", PPOConfig, reward=[{"model": "runs/reward"}])
    assert fitted.numbers["trainable"] == ADAPTER
    # a reward model of whole weights is no role, and has no states that a critic could read
    (tmp_path / "config.json").write_text("{}")
    beside = planned("ppo", PPOConfig, reward=[{"model": str(tmp_path)}])
    assert beside.numbers["trainable"] == 2 * ADAPTER + 17


def test_keys_and_values_are_two_for_each_layer_head_and_token():
    with FakeTensorMode():
        model = to_fake(empty_model(SHAPE, "float32", None))
        cache, peak = sampling_peak(model, slots=5, prompt=8, response=4, device="cpu")
    # 2 (k, v) x 2 layers x 2 heads of width 4 x 5 slots x 12 tokens, float32
    assert cache == 2 * 2 * 2 * 4 * 5 * 12 * 4
    assert peak.total > cache


def test_a_cpu_draws_from_a_few_blocks_of_the_vocabulary():
    # 16 rows of 4,096 logits, 128 blocks of 32: the fullest moment has the logits over the
    # temperature and their logarithms of probabilities in float32, and of each block the least
    # noise and its place in 64 bits
    shape = LlamaConfig(**SHAPE.to_dict() | {"vocab_size": 4096})
    with FakeTensorMode(), as_if_on("cpu"):
        model = to_fake(empty_model(shape, "float32", None))
        _, peak = sampling_peak(model, slots=16, prompt=8, response=4, device="cpu")
    assert peak.logits == pytest.approx(2 * 4 * 16 * 4096 + 2 * 8 * 16 * 128, rel=0.01)


# kernels take some kilobytes of their own, which are little beside tensors of this size
LARGER = SHAPE.to_dict() | {
    "hidden_size": 128, "intermediate_size": 512, "vocab_size": 2000, "head_dim": 32
}  # fmt: skip


def allocated(step) -> int:
    """The most bytes that torch's allocator has given out during a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    alive = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def test_passes_on_fake_tensors_take_what_torch_allocates_for_real_ones():
    shape, rows = LlamaConfig(**LARGER), Rows(8, 48, 16)

    def learning(model):
        model.requires_grad_(True)
        model.get_output_embeddings().requires_grad_(False)
        return model

    with FakeTensorMode(), as_if_on("cpu"):
        measuring = measuring_peak(to_fake(empty_model(shape, "float32", None)), rows, "policy")
        fake = learning(to_fake(empty_model(shape, "float32", None)))
        both = learning_peak(fake, rows, ["policy"], Reduction(), repeated=False)

    real = AutoModelForCausalLM.from_config(shape).eval().requires_grad_(False)
    ledger = Ledger()
    with torch.no_grad():
        found = allocated(lambda: forward(real, rows, "policy", ledger))
    assert found == pytest.approx(measuring.total, rel=0.01)
    found = allocated(lambda: learn(learning(real), rows, "policy", ledger))
    assert found == pytest.approx(both.total, rel=0.01)


def test_checkpointing_smaller_batches_and_accumulation_change_what_they_should():
    plain = planned("sft", SFTRunConfig, per_device_train_batch_size=8, eval_prompts=0)
    less = planned("sft", SFTRunConfig, per_device_train_batch_size=4, eval_prompts=0)
    again = planned(
        "sft", SFTRunConfig, per_device_train_batch_size=8, gradient_checkpointing=True,
        eval_prompts=0,
    )  # fmt: skip
    activations = [e.phases[0].parts["activations"] for e in (plain, less, again)]
    assert activations[1] == pytest.approx(activations[0] / 2, rel=0.05)
    assert activations[2] < 0.8 * activations[0]
    # the second pass of a step finds the gradients of the first
    twice = planned(
        "sft", SFTRunConfig, use_peft=False, gradient_accumulation_steps=2, eval_prompts=0
    )
    assert twice.phases[0].parts["gradients"] == 4 * NUMBERS


def test_rows_share_prompts_two_and_two():
    rows = Rows(6, prompt=8, response=4, paired=True)
    # three prompts of 8, six responses of 4
    assert rows.tokens == 3 * 8 + 6 * 4
    assert rows.labels == 24
    assert Rows(6, 8, 4).tokens == 72


def test_packed_weights_take_half_a_byte_and_their_scales():
    layer = torch.nn.Linear(128, 256, bias=False, device="meta")
    numbers = 128 * 256
    # 512 blocks of 64, one byte each, and 4 bytes for each 256 of them; or a row's 4 bytes
    assert scale_bytes(numbers, layer, "nf4") == 512 + 8
    assert scale_bytes(numbers, layer, "int8") == 4 * 256
    whole = planned("reward", RewardRunConfig)
    packed = planned("reward", RewardRunConfig, load_in_8bit=True)
    linear = 2 * (LAYER - 2 * 16)
    saved = whole.peak.parts["base"] - packed.peak.parts["base"]
    rows = 2 * (2 * 16 + 2 * 8 + 2 * 24 + 16)
    assert saved == 3 * linear - 4 * rows


def test_flops_are_those_that_runs_count():
    found = planned("sft", SFTRunConfig, use_peft=False)
    rows = Rows(3, 8, 4)
    # a forward pass: two FLOPs a weight and token, and attention of 12 x 12 pairs a row and layer
    forward = 2 * (2 * (LAYER - 2 * 16) * 36 + 2 * 2 * 16 * 3 * 144)
    assert found.costs.forward(rows, 0) == forward
    # with the head of 50 x 16 where a response token follows
    assert found.costs.forward(rows, 12) == forward + 2 * 50 * 16 * 12


def test_tied_embeddings_on_fake_tensors_stay_tied():
    shape = LlamaConfig(**SHAPE.to_dict() | {"tie_word_embeddings": True})
    with FakeTensorMode():
        model = to_fake(empty_model(shape, "float32", None))
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert size_of(model.parameters()) == 4 * (NUMBERS - 50 * 16)
