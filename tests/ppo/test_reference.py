"""The trainer against tests/ppo/reference.py: losses, gradients before clipping and updated weights
of whole steps.

Float64 agrees to 1e-9, absolutely and relatively (|a - b| <= 1e-9 + 1e-9 |b|); float32 to 1e-5 in the same sense.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.startup import free_port
from tests import trial
from tests.conftest import ROOT
from tests.ppo.reference import Reference, Step

GRID = {
    "defaults": {  # seven responses: two ranks make different numbers of passes to measure them
        "model": "sft", "reward": True, "options": {"rollout_batch_size": 7, "total_episodes": 28},
    },
    "kl in the loss, k2": {
        "model": "sft",
        "options": {"kl_in": "loss", "kl_estimator": "k2", "kl_coef": 0.7, "critic_from": "policy"},
    },
    "grpo with k3": {
        "model": "sft",
        "options": {
            "advantage_estimator": "grpo", "samples_per_prompt": 3, "rollout_batch_size": 6, "total_episodes": 24,
            "kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.3, "missing_eos_score": None,
        },
    },
    "rloo": {
        "model": "base",
        "options": {
            "advantage_estimator": "rloo", "samples_per_prompt": 2, "rollout_batch_size": 8, "total_episodes": 32,
            "whiten_advantages": True, "kl_estimator": "k3", "kl_coef": 0.2, "missing_eos": "subtract",
        },
    },
    "reinforce": {
        "model": "sft",
        "steps": 2,
        "options": {"advantage_estimator": "reinforce", "kl_coef": 0.2, "lr_scheduler_type": "constant"},
    },
    "entropy, clip higher, ptx": {
        "model": "sft", "reward": True,
        "options": {
            "entropy_coef": 0.3, "clip_range": 0.05, "clip_range_high": 0.09, "ptx_coef": 0.6, "ptx_data": ["x"],
            "value_clip_range": None, "gamma": 0.9, "gae_lambda": 0.6, "whiten_advantages": False,
        },
    },
    "scores and rewards shaped": {
        "model": "base", "steps": 2,
        "options": {
            "normalize_scores": True, "score_clip": 0.8, "per_device_train_batch_size": 8,
            "whiten_rewards": True, "length_penalty": 0.07,
            "missing_eos_score": -0.4, "missing_eos": "replace", "kl_estimator": "k2", "critic_from": "fresh",
            "vf_coef": 0.8, "value_learning_rate": 0.02, "max_grad_norm": 0.05, "value_clip_range": 0.03,
        },
    },
    "a reference that moves": {
        "model": "sft", "steps": 3,
        "options": {"reference_ema": 0.6, "kl_coef": 0.4, "kl_target": 0.01, "kl_horizon": 20},
    },
    "warm-up of the critic": {
        "model": "sft", "reward": True, "steps": 3,
        "options": {
            "critic_warmup_steps": 2, "num_mini_batches": 3, "value_clip_range": 0.5,
            "kl_target": 5.0, "kl_horizon": 30,
        },
    },
    "updates taken back": {
        "model": "sft", "reward": True, "steps": 2, "skipped": [0, 7],
        "options": {"num_mini_batches": 3, "num_ppo_epochs": 2},
    },
}  # fmt: skip


def paths(case, base_path, sft_path, reward_path):
    """The case with its folders and precision filled in."""
    filled = {**case, "model": {"base": base_path, "sft": sft_path}[case["model"]]}
    return filled | {
        "reward": reward_path if case.get("reward") else None,
        "dtype": case.get("dtype", "float64"),
    }


def disagreements(
    case: dict, found: dict, tolerance: float, reference_of: type[Reference] = Reference
) -> list[str]:
    """What of a run differs from the reference by more than the tolerance."""
    config, wrong = trial.options(**case["options"]), []
    reference = reference_of(
        found["before"], config, SimpleNamespace(**found["shape"]), found["lora_scale"]
    )

    def check(what, got, expected):
        got, expected = torch.as_tensor(got).double(), torch.as_tensor(expected).double()
        apart = (got - expected).abs() - tolerance * (1 + expected.abs())
        if got.shape != expected.shape or not bool((apart <= 0).all()):
            wrong.append(
                f"{what}: {got.flatten()[:4].tolist()}, expected {expected.flatten()[:4].tolist()}"
            )

    for number, step in enumerate(found["steps"]):
        given = Step(
            step["prompts"], step["responses"], step["ended"], step["scores"], step["groups"],
            [u["rows"] for u in step["updates"]], [u["ptx"] for u in step["updates"]], frozenset(step["skipped"]),
        )  # fmt: skip
        assert any(given.ended) and not all(given.ended)
        assert (
            len({len(r) for r in given.responses}) > 1 and len({len(p) for p in given.prompts}) > 1
        )
        expected = reference.step(given)
        for name, value in expected["numbers"].items():
            check(f"step {number} {name}", step["metrics"][name], value)
        for u, (got, want) in enumerate(zip(step["updates"], expected["updates"], strict=True)):
            where, back = f"step {number} update {u}", u in given.skipped
            for name, value in want["losses"].items():
                check(f"{where} {name}", got["metrics"].get(name, 0.0), value)
            assert got["changed"] is not back
            if back:
                assert not math.isfinite(got["metrics"]["grad/norm"])
                continue
            check(f"{where} grad/norm", got["metrics"]["grad/norm"], want["norm"])
            is_critic = {name: reference.is_critics(name) for name in want["grads"]}
            for group, of_critic in (("policy", False), ("value", True)):
                squares = [
                    float((g**2).sum())
                    for n, g in want["grads"].items()
                    if is_critic[n] == of_critic
                ]
                if squares:
                    check(
                        f"{where} grad/norm_{group}",
                        got["metrics"][f"grad/norm_{group}"],
                        math.sqrt(sum(squares)),
                    )
            assert got["grads"].keys() == want["grads"].keys()
            for name, gradient in want["grads"].items():
                check(f"{where} gradient of {name}", got["grads"][name], gradient)
    for name, value in reference.w.items():
        check(f"weight {name}", found["after"][name], value)
    check("kl_coef", found["kl_coef"], reference.kl_coef)
    return wrong


@pytest.mark.parametrize("name", GRID)
def test_the_trainer_is_the_reference(name, base_path, sft_path, reward_path):
    case = paths(GRID[name], base_path, sft_path, reward_path)
    with trial.exact_llama():
        found = trial.run(case)
    wrong = disagreements(case, found, 1e-9)
    assert not wrong, "\n".join(wrong[:20])
    assert (
        max(float((found["after"][n] - found["before"][n]).abs().max()) for n in found["after"])
        > 1e-3
    )
    # both branches of the clipped losses were taken, and gradients were clipped
    seen = [u["metrics"] for step in found["steps"] for u in step["updates"]]
    assert any(0 < m["ppo/clip_fraction"] < 1 for m in seen)
    assert (
        any(0 < m.get("value/clip_fraction", 0.5) < 1 for m in seen)
        or case["options"]["value_clip_range"] is None
    )
    assert any(m["grad/norm"] > 1 for m in seen)


def stage_config(stage: str) -> dict:
    """A shipped DeepSpeed JSON; ZeRO 1 is that of ZeRO 2 with another number."""
    config = json.loads(
        (
            ROOT / "rlhf" / "configs" / "deepspeed" / f"zero{'2' if stage == '1' else stage}.json"
        ).read_text()
    )
    config["zero_optimization"]["stage"] = int(stage[0])
    if stage.startswith("3"):  # a tiny model would not be cut into parts at all
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def launched(folder: Path, cases: list[dict], stage: str | list[str], ranks: int = 2) -> list[dict]:
    """The cases through the launcher, one after the other in one launch; `stage` of all or of each."""
    stages = [stage] * len(cases) if isinstance(stage, str) else stage
    given = [case | {"deepspeed": stage_config(of)} for case, of in zip(cases, stages, strict=True)]
    (folder / "trial.json").write_text(json.dumps(given))
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators",
        str(ranks),
        "--no_local_rank",
    ]
    command += [
        "-q",
        "--master_port",
        str(free_port()),
        str(ROOT / "tests" / "trial.py"),
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd="/", env=environment, timeout=850
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "trial.pt", weights_only=False)


# the guard takes back every second update; by then all tokens of the last pass are clipped and have
# no gradient
TAKEN_BACK = {
    "model": "sft", "steps": 3, "dtype": "float32",
    "options": {
        "num_mini_batches": 1, "guards": {"target_kl": 1e-9}, "clip_range": 1e-6, "value_clip_range": 1e-6,
        "missing_eos_score": None,
    },
}  # fmt: skip


def check_taken_back(found: dict) -> None:
    updates = [(u["decision"], u["changed"]) for step in found["steps"] for u in step["updates"]]
    assert updates == [(None, True), ("end", False)] * TAKEN_BACK["steps"]


def test_what_a_guard_takes_back_is_not_made_under_any_zero_stage(
    base_path, sft_path, reward_path, tmp_path
):
    stages = ["0", "1", "2", "3", "3_offload"]
    case = paths(TAKEN_BACK, base_path, sft_path, reward_path)
    for found in launched(tmp_path, [case] * len(stages), stages, ranks=1):
        check_taken_back(found)


def test_two_ranks_under_zero_2_are_the_reference(base_path, sft_path, reward_path, tmp_path):
    """Float64 to 1e-9: minibatches of 3, 3 and 2 rows, one at a time, so that a rank has an empty
    micro-batch.
    """
    cases = [
        paths(case, base_path, sft_path, reward_path)
        for case in (GRID["updates taken back"], TAKEN_BACK)
    ]
    found, taken = launched(tmp_path, cases, "2")
    wrong = disagreements(cases[0], found, 1e-9)
    assert not wrong, "\n".join(wrong[:20])
    check_taken_back(taken)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_under_zero_2_are_the_reference_with_every_option(
    base_path, sft_path, reward_path, tmp_path
):
    cases = [paths(case, base_path, sft_path, reward_path) for case in GRID.values()]
    for name, case, found in zip(GRID, cases, launched(tmp_path, cases, "2"), strict=True):
        wrong = disagreements(case, found, 1e-9)
        assert not wrong, "\n".join([name, *wrong[:20]])


def single(case: dict) -> dict:
    """In float32, with small steps and a large epsilon: of a gradient that is rounding Adam makes a
    whole step.
    """
    return case | {
        "dtype": "float32",
        "options": {"adam_epsilon": 1e-2, "learning_rate": 1e-3} | case["options"],
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["0", "3", "3_offload"])
def test_two_ranks_are_the_reference_in_float32(base_path, sft_path, reward_path, tmp_path, stage):
    names = ["defaults", "grpo with k3", "entropy, clip higher, ptx", "a reference that moves",
             "warm-up of the critic", "updates taken back"]  # fmt: skip
    cases = [paths(single(GRID[name]), base_path, sft_path, reward_path) for name in names]
    *found, taken = launched(
        tmp_path, [*cases, paths(TAKEN_BACK, base_path, sft_path, reward_path)], stage
    )
    check_taken_back(taken)
    for name, case, one in zip(names, cases, found, strict=True):
        wrong = disagreements(case, one, 1e-5)
        assert not wrong, "\n".join([name, *wrong[:20]])
