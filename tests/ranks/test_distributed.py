import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.errors import UserError
from rlhf.ranks import deepspeed_backend, distributed
from rlhf.ranks.deepspeed_config import DECIDED, check_deepspeed_config, read_deepspeed_config
from rlhf.ranks.distributed import DistributedContext, is_abandoned, wait_for_compilers
from rlhf.stages import check_zero
from rlhf.startup import Ranks, read_ranks


def aged(path, seconds):
    """A file that was last changed so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_a_compile_lock_is_abandoned_when_nobody_holds_it_and_nothing_changes(tmp_path):
    lock = aged(tmp_path / "operator" / "lock", 3600)
    assert is_abandoned(lock)
    with open(lock):  # the process that compiles keeps it open
        assert not is_abandoned(lock)
    built = aged(tmp_path / "operator" / "part.o", 5)  # another machine compiles
    assert not is_abandoned(lock)
    aged(built, 3600)
    assert is_abandoned(lock)
    assert not is_abandoned(aged(lock, 5))


def test_the_lock_of_a_killed_compilation_is_removed_with_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    old = aged(tmp_path / "operator" / "lock", 3600)
    wait_for_compilers(local_rank=0)
    assert not old.exists()
    assert f"{old}: removed; the process that compiled there was killed" in capsys.readouterr().out


def test_a_lock_in_use_is_waited_for_with_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = aged(tmp_path / "operator" / "lock", 0)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            lock.unlink()  # it has ended

    monkeypatch.setattr(distributed.time, "sleep", sleep)
    wait_for_compilers(local_rank=0)
    assert len(waits) == 3
    assert capsys.readouterr().out.count("waiting for the process that compiles there") == 1


SHARED = {
    "per_device_train_batch_size": 4,
    "max_grad_norm": 1.0,
    "dtype": "auto",
    "learning_rate": 1e-4,
}
OFFLINE = {
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.1,
    "warmup_steps": 5.0,
    "trl": {"adam_beta2": 0.95},
}
OPTIONS = {  # on two ranks, on a CPU
    "dpo": SimpleNamespace(**SHARED, **OFFLINE, lr_scheduler_type="linear"),
    "ppo": SimpleNamespace(**SHARED, adam_epsilon=1e-5, lr_scheduler_type="constant"),
}
ZERO2 = {"zero_optimization": {"stage": 2}}
AUTO = dict.fromkeys(DECIDED, "auto") | {"bf16": {"enabled": "auto"}}


def checked(more: dict, program: str = "dpo") -> dict:
    return check_deepspeed_config(
        ZERO2 | more, "x.json", DistributedContext(size=2), OPTIONS[program]
    )


@pytest.mark.parametrize(
    ("program", "more"),
    [
        ("dpo", {}),
        ("dpo", AUTO | {"fp16": {"enabled": "auto", "loss_scale": 0}}),
        # 4 rows x 2 passes x 2 ranks
        (
            "dpo",
            {
                "train_batch_size": 16,
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 2,
            },
        ),
        ("ppo", {"train_batch_size": 8, "gradient_accumulation_steps": 1, "gradient_clipping": 1}),
        (
            "dpo",
            {
                "optimizer": {
                    "type": "AdamW",
                    "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": "auto"},
                }
            },
        ),
        (
            "ppo",
            {
                "optimizer": {
                    "type": "Adam",
                    "params": {"lr": "auto", "eps": 1e-5, "weight_decay": 0},
                }
            },
        ),
        (
            "dpo",
            {
                "scheduler": {
                    "type": "WarmupDecayLR",
                    "params": {"warmup_num_steps": 5, "total_num_steps": "auto"},
                }
            },
        ),
        (
            "ppo",
            {
                "scheduler": {
                    "type": "WarmupLR",
                    "params": {"warmup_num_steps": 0, "warmup_max_lr": 1e-4},
                }
            },
        ),
        ("ppo", {"bf16": {"enabled": False}, "fp16": {"enabled": False}}),
    ],
)
def test_a_deepspeed_json_that_agrees_is_taken_and_our_options_fill_it(program, more):
    assert checked(more, program) == ZERO2 | AUTO


@pytest.mark.parametrize("program", ["dpo", "ppo"])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping: 0.5, but max_grad_norm is 1.0"),
        (
            {"train_batch_size": 32},
            "train_batch_size: 32, but per_device_train_batch_size x gradient_acc",
        ),
        ({"train_micro_batch_size_per_gpu": 1}, "but per_device_train_batch_size is 4"),
        (
            {"gradient_accumulation_steps": 4},
            "steps: 4, but gradient_accumulation_steps .* is [12]",
        ),
        ({"bf16": {"enabled": True}}, "bf16.enabled: true, but dtype bfloat16 is false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: true, but dtype float16 is false"),
        ({"optimizer": {"type": "Lion"}}, 'optimizer.type: "Lion", but the optimizer is "AdamW"'),
        (
            {"optimizer": {"params": {"lr": 3e-5}}},
            "optimizer.params.lr: 3e-05, but learning_rate is 0.0001",
        ),
        ({"optimizer": {"params": {"weight_decay": 0.3}}}, "but weight_decay is 0"),
        (
            {"optimizer": {"params": {"amsgrad": True}}},
            "optimizer.params.amsgrad: true, which no option has",
        ),
        ({"scheduler": {"type": "OneCycle"}}, 'scheduler.type: "OneCycle", but lr_scheduler_type'),
        (
            {"scheduler": {"params": {"warmup_num_steps": 500}}},
            "warmup_num_steps: 500, but warmup_steps is",
        ),
        (
            {"scheduler": {"params": {"total_num_steps": 9}}},
            "total_num_steps: 9, which no option has",
        ),
        (
            {"zero_optimisation": {"stage": 3}},
            "'zero_optimisation' is not read .* Did you mean 'zero_optimization'",
        ),
        (
            {"compute_environment": "LOCAL_MACHINE"},
            "'compute_environment' is not read .* A file of accelerate",
        ),
        ({"zero_optimization": None}, "zero_optimization.stage is None, expected 0 to 3"),
        (
            {"zero_optimization": {"stage": "auto"}},
            "zero_optimization.stage is 'auto', expected 0 to 3",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_buckt_size": 9}},
            "Did you mean 'reduce_bucket_size'",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer has no effect in stage 0, .* Take stage 1 to 3",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param has no effect in stage 2, .* Take stage 3, or",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}},
            "reduce_bucket_size: .* valid integer",
        ),
    ],
)
def test_a_deepspeed_json_that_contradicts_or_is_none_is_refused_alike_in_all_programs(
    program, more, said
):
    with pytest.raises(UserError, match=said):
        checked(more, program)


def test_the_shipped_deepspeed_jsons_are_taken_and_a_file_that_is_none_is_refused(tmp_path):
    launched = DistributedContext(launched=True)
    for name, stage in (("zero0", 0), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)):
        assert (
            read_deepspeed_config(name, launched, OPTIONS["ppo"])["zero_optimization"]["stage"]
            == stage
        )
    (tmp_path / "list.json").write_text("[" * 2)
    with pytest.raises(UserError, match=r"list\.json line 1: not valid JSON"):
        read_deepspeed_config(str(tmp_path / "list.json"), launched)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match=r"list\.json: expected a JSON object, found list"):
        read_deepspeed_config(str(tmp_path / "list.json"), launched)


def test_an_offloaded_optimizer_is_pytorchs_too():
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert checked({"zero_optimization": zero})["zero_force_ds_cpu_optimizer"] is False
    zero["offload_optimizer"]["device"] = "none"
    assert "zero_force_ds_cpu_optimizer" not in checked({"zero_optimization": zero})


def test_deepspeeds_insides_are_as_expected_or_refused_by_name(monkeypatch):
    deepspeed_backend.check_version()
    pinned = Path("requirements.txt").read_text()
    assert f"deepspeed=={deepspeed_backend.MADE_FOR}\n" in pinned
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    monkeypatch.delattr(DeepSpeedZeroOptimizer_Stage3, "_get_norm_groups")
    with pytest.raises(
        UserError, match=r"has no deepspeed.*Stage3\._get_norm_groups.* pip install deepspeed=="
    ):
        deepspeed_backend.check_version()


@pytest.mark.parametrize(
    ("stage", "lacking"), [(2, "ipg_buckets"), (3, "micro_step_id"), (3, "ds_numel")]
)
def test_an_engine_of_another_form_is_refused_by_name(stage, lacking):
    names = deepspeed_backend.OF_ZERO_3 if stage == 3 else deepspeed_backend.OF_ZERO_2
    names = dict.fromkeys(set(names) - {lacking})
    marks = dict.fromkeys(set(deepspeed_backend.OF_PARAMETERS[stage]) - {lacking})
    weight = SimpleNamespace(requires_grad=True, **marks)
    engine = SimpleNamespace(
        zero_optimization_stage=lambda: stage,
        optimizer=SimpleNamespace(**names),
        module=SimpleNamespace(parameters=lambda: iter([weight])),
    )
    with pytest.raises(UserError, match=f"has no .*{lacking}.* ZeRO {stage}, which is used"):
        deepspeed_backend.check_engine(engine)
    setattr(weight, lacking, None)
    setattr(engine.optimizer, lacking, None)
    deepspeed_backend.check_engine(engine)


def test_float64_under_a_launcher_is_for_ppo_alone():
    options = SimpleNamespace(
        dtype="float64",
        use_peft=True,
        load_in_4bit=False,
        load_in_8bit=False,
        optim="adamw",
        deepspeed="zero2",
    )
    check_zero("ppo", options, DistributedContext(launched=True))
    check_zero("dpo", options, DistributedContext())
    with pytest.raises(UserError, match="DeepSpeed would keep gradients and weights in float32"):
        check_zero("dpo", options, DistributedContext(launched=True))


def test_a_whole_reward_model_in_bfloat16_is_not_for_zero_on_a_cpu():
    given = {"dtype": "bfloat16", "use_peft": False, "optim": "adamw"}
    options = SimpleNamespace(**given, load_in_4bit=False, load_in_8bit=False, deepspeed="zero0")
    check_zero("reward", options, DistributedContext(launched=True))
    options.deepspeed = "zero2"
    with pytest.raises(UserError, match=r"score head in float32 on a CPU\. Take --deepspeed zero0"):
        check_zero("reward", options, DistributedContext(launched=True))


def test_whole_weights_learn_in_bfloat16_where_float32_copies_are_kept():
    given = {"dtype": "bfloat16", "use_peft": False, "optim": "adamw"}
    options = SimpleNamespace(**given, load_in_4bit=False, load_in_8bit=False, deepspeed="zero0")
    check_zero("ppo", options, DistributedContext())
    with pytest.raises(UserError, match=r"which ZeRO 0 does not keep: .* Take --deepspeed zero2"):
        check_zero("ppo", options, DistributedContext(launched=True))
    for changed in ({"deepspeed": "zero2"}, {"dtype": "float32"}, {"use_peft": True}):
        check_zero(
            "ppo", SimpleNamespace(**vars(options) | changed), DistributedContext(launched=True)
        )


# deepspeed's name, and torchrun's
@pytest.mark.parametrize("local_size", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_ranks_are_read_from_the_launchers_variables(local_size):
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    given = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", local_size: "2"} | meeting
    assert read_ranks(given) == Ranks(rank=1, size=4, local_rank=1, local_size=2)
    assert read_ranks({"RANK": "0", "WORLD_SIZE": "1"}) == Ranks(
        rank=0, size=1, local_rank=0, local_size=1
    )


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc', expected a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1', expected a whole number"),
        ({"RANK": "5", "WORLD_SIZE": "1"}, "RANK is 5, but WORLD_SIZE is 1"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "is 2, but MASTER_ADDR and MASTER_PORT not set",
        ),
    ],
)
def test_a_launchers_variables_that_do_not_fit_are_refused_by_name(environment, said):
    with pytest.raises(UserError, match=said):
        read_ranks(environment)
