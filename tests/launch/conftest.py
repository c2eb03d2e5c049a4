"""The four programs on a tiny model, in this process: what the tests of the doors share."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ITEMS = (
    "lamp",
    "chair",
    "parcel",
    "refund",
    "order",
    "red lamp",
    "blue chair",
    "team",
    "help",
    "today",
)
COLOURS = ("red", "blue", "green", "old", "new", "big")
SHORT = [
    "--max_prompt_length",
    "64",
    "--max_response_length",
    "12",
    "--logging_steps",
    "1",
    "--eval_prompts",
    "4",
]
SMALL = ["--per_device_train_batch_size", "4", "--max_steps", "3", "--lora_r", "4"]


def door(name: str):
    """The main() of a program, loaded without changing sys.path for good."""
    spec = importlib.util.spec_from_file_location(f"door_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module.main


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def write_data(folder: Path) -> dict[str, str]:
    """Instructions and pairs, 60 rows each."""
    asked = [f"where is my {c} {i}?" for c in COLOURS for i in ITEMS]
    said = [{"role": "assistant", "content": "on its way"}]
    return {
        "instructions": write_rows(
            folder / "i.jsonl",
            [{"messages": [{"role": "user", "content": q}, *said]} for q in asked],
        ),
        "pairs": write_rows(
            folder / "p.jsonl",
            [
                {"prompt": q, "chosen": f"happy to help {n}", "rejected": f"no {n}"}
                for n, q in enumerate(asked)
            ],
        ),
    }


def flags_of(name: str, model, data: str, output) -> list[str]:
    eval_flags = SHORT[:-2] if name == "reward" else SHORT
    return [
        "--model_name_or_path",
        str(model),
        "--data",
        data,
        "--output_dir",
        str(output),
        *eval_flags,
    ]


def ppo_flags(folder: Path) -> list[str]:
    return [
        *(
            "--reward",
            f"[{{model: {folder}/reward}}]",
            "--total_episodes",
            "16",
            "--rollout_batch_size",
            "8",
        ),
        *(
            "--per_device_train_batch_size",
            "4",
            "--learning_rate",
            "1e-2",
            "--num_mini_batches",
            "2",
        ),
    ]


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def runs(base_path, files, tmp_path_factory) -> Path:
    """SFT, reward, DPO and PPO, one after the other, in this process."""
    folder = tmp_path_factory.mktemp("runs")

    def start(name, model, data, *more):
        door(name)([*flags_of(name, model, data, folder / name), *more])

    start("sft", base_path, files["instructions"], *SMALL, "--learning_rate", "1e-2")
    start("reward", folder / "sft", files["pairs"], *SMALL)
    start("dpo", folder / "sft", files["pairs"], *SMALL, "--learning_rate", "1e-2")
    start("ppo", folder / "sft", files["pairs"], *ppo_flags(folder))
    return folder


def untimed(row: dict) -> dict:
    """A line of metrics.jsonl without times and memory, which no two runs share."""
    timed = ("time", "memory", "eval/time", "budget/seconds", "budget/reference_seconds")
    return {k: v for k, v in row.items() if not k.startswith(timed)}


def differences(one: Path, other: Path) -> list[str]:
    """Where two runs are not equal to the last bit: weights, metrics, samples, headline; times and
    memory excepted.
    """
    from rlhf.runs.tracking import read_metrics

    found = []
    names = {
        p.relative_to(d)
        for d in (one, other)
        for p in (*d.glob("*.safetensors"), *d.glob("value/*.safetensors"))
    }
    for name in sorted(names):
        parts = [(d / name).read_bytes() if (d / name).is_file() else None for d in (one, other)]
        if parts[0] != parts[1]:
            found.append(f"{name} differs")
    for name in ("metrics.jsonl", "tables/samples.jsonl"):
        rows = [
            [untimed(r) for r in read_metrics(d / name)] if (d / name).is_file() else []
            for d in (one, other)
        ]
        if len(rows[0]) != len(rows[1]):
            found.append(f"{name} has {len(rows[0])} and {len(rows[1])} lines")
        for ours, theirs in zip(*rows, strict=False):
            keys = [k for k in {**ours, **theirs} if repr(ours.get(k)) != repr(theirs.get(k))]
            if keys:
                found.append(f"{name} at step {ours.get('step')}: {', '.join(keys)}")
    results = [json.loads((d / "result.json").read_text()) for d in (one, other)]
    if untimed(results[0]["headline"]) != untimed(results[1]["headline"]):
        found.append("the headline differs")
    return found
