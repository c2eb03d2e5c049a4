"""What a run has cost: by hand on a small decoder, and against the products that torch makes."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.speed import flops
from rlhf.model.adapters import lora_config
from rlhf.model.loading import load_model
from rlhf.model.packing import decoder_and_head
from rlhf.runs import budget as counted
from rlhf.runs.budget import Budget, decoder_shape, pass_size
from tests.kinds import build

SMALL = flops.Shape(320, 32, 2, 8, 12, rows=4, rank=4)
RAGGED = flops.Shape(320, 32, 2, 8, 12, ragged=True, rows=4, rank=4, attention="eager")


def close(counted: Budget, measured: float, tolerance: float = 0.01) -> bool:
    return measured > 0 and abs(measured / counted.flops - 1) < tolerance


def test_a_decoder_by_hand(base_path):
    # width 32: q 32x32, k and v 32x16, o 32x32, gate, up and down 32x64 = 9216 a layer; the
    # embeddings are looked up rank 4: 4 (64 + 48 + 48 + 64 + 3 x 96) = 2048 a layer; 2 layers, 4
    # heads of 8 for keys and 8 for values q, k and v of the first layer: 2048; down, a layer's
    # last: 2048, and frozen under an adapter
    model = load_model(base_path).model
    whole = decoder_shape(decoder_and_head(model)[0])
    assert (whole.linear, whole.trained, whole.first, whole.last, whole.pair) == (
        18432,
        18432,
        2048,
        4096,
        128,
    )
    decoder = decoder_and_head(get_peft_model(model, lora_config(r=4)))[0]
    shape = decoder_shape(decoder, ("default",))
    assert (shape.linear, shape.trained, shape.first, shape.last, shape.pair) == (
        22528,
        4096,
        2048,
        0,
        128,
    )
    assert decoder_shape(decoder).linear == 18432  # the reference: adapters off

    # 3 rows of 5: 15 positions, 75 pairs. forward 2 (22528 x 15 + 128 x 75)
    assert shape.forward(15, 75) == 695_040
    given = {"to_embeddings": False, "fused": False, "recomputed": False}
    assert shape.backward(15, 75, **given) == 2 * ((22528 + 4096 - 2048) * 15 + 2 * 128 * 75)
    assert shape.backward(15, 75, **given | {"to_embeddings": True}) == 2 * (
        (22528 + 4096) * 15 + 2 * 128 * 75
    )
    assert shape.backward(15, 75, **given | {"fused": True}) == 2 * (
        (22528 + 4096 - 2048) * 15 + 2.5 * 128 * 75
    )
    repeated = whole.backward(15, 75, **given | {"recomputed": True}) - whole.backward(
        15, 75, **given
    )
    assert repeated == 2 * ((18432 - 4096) * 15 + 128 * 75)


def test_of_saved_modules_the_active_copy_is_counted(base_path):
    model = get_peft_model(
        load_model(base_path).model,
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"]),
    )
    model.add_adapter("other", model.peft_config["default"])
    decoder = decoder_and_head(model)[0]
    shape = decoder_shape(decoder, ("default",))
    # q: rank 4 (32 + 32) a layer; up is trained whole, 32 x 64 a layer, and read once
    assert (shape.linear, shape.trained) == (18432 + 2 * 256, 2 * 256 + 2 * 2048)
    assert decoder_shape(decoder).linear == 18432


def test_of_experts_those_that_a_token_meets_are_counted():
    from transformers import Qwen3MoeConfig, Qwen3MoeModel

    config = Qwen3MoeConfig(
        vocab_size=320, hidden_size=32, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    # attention 3072; the router 32 x 8; 2 of 8 experts, each 3 x 32 x 16
    assert decoder_shape(Qwen3MoeModel(config)).linear == 3072 + 256 + 2 * 1536


def test_nothing_is_counted_outside(base_path):
    model, budget = load_model(base_path).model, Budget()
    budget.watch(model)
    ids = torch.arange(3, 13).reshape(2, 5)
    model(ids)
    assert budget.flops == 0
    with budget.counting(), torch.no_grad():
        model(ids, logits_to_keep=1)
    vocabulary = model.config.vocab_size
    # the head at 2 positions
    assert budget.flops == 2 * (18432 * 10 + 128 * 50) + 2 * 32 * vocabulary * 2


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (SMALL, {"reference_ema": 0.9, "gradient_checkpointing": True}),
        (RAGGED, {"use_peft": False}),
        (SMALL, {"use_peft": False, "gradient_checkpointing": True}),
        (
            RAGGED,
            {
                "advantage_estimator": "rloo",
                "samples_per_prompt": 2,
                "ptx_coef": 0.1,
                "ptx_data": ["x"],
            },
        ),
    ],
)
def test_a_step_of_ppo(shape, options):
    counted, measured = flops.ppo_step(shape, **options)
    assert close(counted, measured) and counted.tokens_trained


@pytest.mark.parametrize(
    ("program", "use_peft", "options"),
    [
        ("dpo", True, {}),
        ("dpo", False, {"precompute_ref_log_probs": True}),
        ("reward", True, {"gradient_checkpointing": True}),
        ("sft", False, {"gradient_checkpointing": True}),
    ],
)
def test_a_step_of_trl(program, use_peft, options):
    counted, measured = flops.trl_step(RAGGED, program, use_peft, **options)
    assert close(counted, measured)


def test_packed_rows_are_counted():
    counted, measured = flops.trl_step(SMALL, "sft", packing=True, max_length=40)
    assert close(counted, measured)
    assert counted.tokens_trained == 4 * 20  # four rows of 8 + 12, two in a pack


def test_scorers_with_weights_of_their_own_are_counted(reward_path, sft_path, tmp_path):
    from reward.compose import build_model
    from reward.loaded import RewardModels
    from reward.specs import ModelSpec
    from rlhf.data.records import Samples

    budget = Budget()
    models = RewardModels(on_base=budget.watch)
    tokenizer = load_model(sft_path).tokenizer
    # two on one base: each makes a pass, and each pass counts once
    copied = shutil.copytree(reward_path, tmp_path / "copied")
    specs = [ModelSpec(model=reward_path), ModelSpec(model=str(copied))]
    scorers = [build_model(spec, tokenizer, models=models) for spec in specs]
    samples = Samples(
        [[{"role": "user", "content": "x"}]], ["y"], [[5, 6, 7]], [[8, 2]], [True], [{}]
    )

    def score():
        with budget.counting():
            for scorer in scorers:
                scorer(samples)

    measured = flops.measured(score)
    assert close(budget, measured)


@pytest.mark.slow
@pytest.mark.parametrize("name", flops.SHAPES)
def test_all_shapes(name):
    shape = flops.SHAPES[name]
    assert close(*flops.ppo_step(shape), 0.05)
    for program in ("dpo", "reward", "sft"):
        assert close(*flops.trl_step(shape, program), 0.05), program


def test_heads_may_be_of_another_size_in_each_layer():
    # 4 heads: 8 + 8 of query-key and value in the layer with a window, 16 + 16 in the other: 64 +
    # 128
    model, _ = build(
        "gemma4_text", layer_types=["sliding_attention", "full_attention"], global_head_dim=16
    )
    assert decoder_shape(model.base_model).pair == 192


def test_rows_that_trl_has_packed_attend_apart_in_flash_attention_alone():
    # rows of 3, 1 and 2 tokens: 9 + 1 + 4 pairs; a masked kernel makes all 36
    given = {"input_ids": torch.ones(1, 6), "cu_seq_lens_q": torch.tensor([0, 3, 4, 6]).int()}
    assert pass_size((), given, "flash_attention_2") == (6, 14)
    assert pass_size((), given, "sdpa") == (6, 36)


def test_what_is_computed_apart_is_measured_and_not_counted(monkeypatch):
    clock = iter((0.0, 10.0, 15.0, 17.0, 17.0, 20.0, 20.0))
    monkeypatch.setattr(counted, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    budget = Budget(flops=3.0)
    budget.began = counted.time.monotonic()
    with budget.apart() as cost:
        # from 10 to 15
        assert budget.is_counting
        budget.flops += 4.0
    assert (cost.flops, cost.seconds, budget.is_counting) == (4.0, 5.0, False)
    # of 17 seconds 5 are left out
    assert budget.metrics() == {
        "budget/episodes": 0,
        "budget/tokens_generated": 0,
        "budget/tokens_trained": 0,
        "budget/flops": 3.0,
        "budget/seconds": 12.0,
    }
    # another run had the same at a cost of 2 FLOPs and 1 second
    budget.charge_reference(2.0, 1.0)
    state = budget.state_dict()
    assert (state["flops"], state["reference_flops"]) == (5.0, 2.0)
    assert (state["seconds"], state["reference_seconds"]) == (13.0, 1.0)

    # a checkpoint of an earlier version has no parts
    older = {name: value for name, value in state.items() if "reference" not in name}
    budget.load_state_dict(older)
    assert budget.state_dict() == state | {"reference_flops": 0, "reference_seconds": 0}
