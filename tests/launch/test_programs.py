"""The four programs from end to end on a tiny model, and the same through the DeepSpeed launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import EXIT_USER_ERROR
from rlhf.runs.tracking import read_metrics
from rlhf.startup import free_port
from tests.conftest import ROOT
from tests.launch.conftest import door, flags_of, untimed


def test_every_run_leaves_what_the_design_says(runs):
    for name in ("sft", "reward", "dpo", "ppo"):
        for file in (
            "config.yaml",
            "metrics.jsonl",
            "result.json",
            "README.md",
            "rlhf.json",
            "tokenizer.json",
        ):
            assert (runs / name / file).is_file(), f"{name}/{file}"
        result = json.loads((runs / name / "result.json").read_text())
        assert (
            result["finished"]
            and result["program"] == name
            and result["headline"]
            and result["data"]
        )
        assert (
            result["budget"]["budget/tokens_trained"] > 0 and result["budget"]["budget/flops"] > 0
        )
        assert (runs / name / "adapter_model.safetensors").is_file()
    assert (runs / "ppo" / "value" / "value_head.safetensors").is_file()
    assert (runs / "reward" / "card.json").is_file() and (runs / "reward" / "reward.json").is_file()


def test_sft_says_how_probable_its_eos_token_is_before_and_after(runs):
    rows = [
        r
        for r in read_metrics(runs / "sft" / "metrics.jsonl")
        if "eval/response/eos_probability" in r
    ]
    headline = json.loads((runs / "sft" / "result.json").read_text())["headline"]
    assert [r["step"] for r in rows] == [0, 3]
    assert headline["eval/response/eos_probability"] == rows[1]["eval/response/eos_probability"]


def test_dpo_and_ppo_measure_kl_to_the_same_policy_in_the_same_words(runs):
    for name in ("dpo", "ppo"):
        rows = [r for r in read_metrics(runs / name / "metrics.jsonl") if "eval/kl/sequence" in r]
        assert rows[0]["step"] == 0 and rows[0]["eval/kl/sequence"] == 0.0
        assert rows[-1]["step"] > 0 and rows[-1]["eval/kl/sequence"] != 0.0
    first = [
        next(r for r in read_metrics(runs / name / "metrics.jsonl") if r["step"] == 0)[
            "eval/response/length"
        ]
        for name in ("dpo", "ppo")
    ]
    assert first[0] == first[1]  # the same policy, prompts and noise
    tables = [
        (runs / name / "tables" / "samples.jsonl").read_text().splitlines()[0]
        for name in ("dpo", "ppo")
    ]
    assert json.loads(tables[0])["response"] == json.loads(tables[1])["response"]


def test_the_runs_hold_out_the_same_prompts(runs):
    data = [
        json.loads((runs / name / "result.json").read_text())["data"] for name in ("dpo", "ppo")
    ]
    assert data[0]["prompt/validation"] == data[1]["prompt/validation"]


def test_a_saved_adapter_holds_sft_and_what_came_after(runs, base_path):
    from safetensors.torch import load_file

    sft, dpo, ppo = (
        load_file(runs / n / "adapter_model.safetensors") for n in ("sft", "dpo", "ppo")
    )
    assert sft.keys() == dpo.keys() == ppo.keys()
    assert any((sft[k] != dpo[k]).any() for k in sft) and any((sft[k] != ppo[k]).any() for k in sft)
    config = json.loads((runs / "ppo" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base_path


def test_a_finished_run_is_not_overwritten(runs, files, capsys):
    before = (runs / "sft" / "adapter_model.safetensors").read_bytes()
    flags = [
        "--model_name_or_path",
        "x",
        "--data",
        files["pairs"],
        "--output_dir",
        str(runs / "sft"),
    ]
    with pytest.raises(SystemExit) as stop:
        door("sft")(flags)
    assert stop.value.code == EXIT_USER_ERROR
    assert "holds a finished run" in capsys.readouterr().err
    assert (runs / "sft" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("name", "data"), [("sft", "instructions"), ("dpo", "pairs")])
def test_scorers_are_checked_before_anything_is_loaded(runs, files, tmp_path, name, data, capsys):
    voice, out = tmp_path / "voice.yaml", tmp_path / "run"
    arguments = [*flags_of(name, runs / "sft", files[data], out), "--eval_scorers"]
    with pytest.raises(SystemExit) as end:
        door(name)([*arguments, f"[{{voice: {voice}}}]"])
    assert end.value.code == EXIT_USER_ERROR and not out.exists()
    assert f"{voice}: no such file" in capsys.readouterr().err


def test_the_resolved_options_repeat_the_run(runs, tmp_path):
    door("ppo")(["--config", str(runs / "ppo" / "config.yaml"), "--output_dir", str(tmp_path)])
    assert [untimed(r) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        untimed(r) for r in read_metrics(runs / "ppo" / "metrics.jsonl")
    ]


def prefer_longer(prompts, first, second):
    return [
        0.5 + 0.5 * (len(a) > len(b)) - 0.5 * (len(a) < len(b))
        for a, b in zip(first, second, strict=True)
    ]


def test_compare_reports_on_test_prompts(runs, files, tmp_path):
    from reward.compose import build_scorer
    from rlhf.compare.measure import CompareConfig, compare

    config = CompareConfig(
        runs=[str(runs / n) for n in ("sft", "dpo", "ppo")],
        prompts=[files["pairs"]],
        output_dir=str(tmp_path),
        gold=[{"rule": "length", "low": 2, "high": 9}],
        judge={"function": "tests.launch.test_programs:prefer_longer"},
        test_fraction=0.3,
    )
    report = compare(config, build_scorer)
    judged = report["judge_of_pairs"]
    pairs = [(row["a"], row["b"]) for row in judged["rows"]]
    assert pairs == [("dpo", "ppo"), ("dpo", "sft"), ("ppo", "sft")]
    assert judged["judge"]["consistency"] == 1.0 and judged["judge"]["agreement"] is None
    assert "what the judge of pairs follows" in (tmp_path / "report.md").read_text()
    assert report["meta"]["sampling"] == {"temperature": 1.0, "max_new_tokens": 12}  # as the runs
    assert report["meta"]["rows"]["dpo"]["preference/train"]["used"] > 0  # as in its result.json
    assert report["meta"]["rows"]["prompts"]["dropped"] == {}
    assert (report["kind"], report["judge"], report["score_kinds"]["proxy"]) == (
        "runs",
        "gold",
        "proxy",
    )
    assert [policy["label"] for policy in report["wins"]["policies"]] == ["sft", "dpo", "ppo"]
    assert all(
        0 <= report["wins"]["raw"][a][b]["estimate"] <= 1 for a, b in ((1, 0), (2, 0), (2, 1))
    )
    dpo, ppo = report["points"]
    assert (dpo["method"], ppo["method"]) == ("dpo", "ppo") and ppo["kl"]["estimate"] != 0.0
    assert report["initial_policy"]["kl"]["estimate"] == 0.0
    pairs = [
        (verdict["a"], verdict["b"]) for verdict in report["verdicts"] if verdict["kind"] == "tuned"
    ]
    assert pairs == [("dpo", "ppo"), ("dpo", "sft"), ("ppo", "sft")]
    for file in ("report.md", "report.json", "frontier.png", "samples.jsonl", "judged.jsonl"):
        assert (tmp_path / file).stat().st_size > 0


def test_a_run_cannot_be_judged_by_what_it_learnt_from(runs, files, tmp_path):
    from reward.compose import build_scorer
    from rlhf.compare.measure import CompareConfig, compare
    from rlhf.errors import UserError

    config = CompareConfig(
        runs=[str(runs / n) for n in ("sft", "ppo")],
        prompts=[files["pairs"]],
        output_dir=str(tmp_path),
        referee=[{"model": str(runs / "reward")}],
        test_fraction=0.3,
    )
    with pytest.raises(UserError, match="trained on it"):
        compare(config, build_scorer)


def launch(ranks: int, name: str, flags: list[str]) -> subprocess.CompletedProcess:
    """`deepspeed` with its own port, from another directory, so that launch/ cannot shadow a
    package.
    """
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
    ]
    command += [str(ROOT / "launch" / f"{name}.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd="/", env=environment, timeout=900
    )


def ppo_again(runs, files, output, ranks, stage):
    flags = [
        "--config",
        str(runs / "ppo" / "config.yaml"),
        "--output_dir",
        str(output),
        "--deepspeed",
        stage,
    ]
    done = launch(ranks, "ppo", flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(output / "metrics.jsonl")


def check_equal(runs, rows):
    """Metrics equal those of the plain process up to rounding."""
    plain = read_metrics(runs / "ppo" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [r["step"] for r in plain]
    for ours, theirs in zip(rows, plain, strict=True):
        for name, value in untimed(theirs).items():
            # attention is padded to the longest row of a pass, and each rank has passes of its own:
            # 1.1 % fewer products on these two ranks
            rel = 2e-2 if name == "budget/flops" else 2e-3
            assert ours[name] == pytest.approx(value, rel=rel, abs=2e-4), (ours["step"], name)


def test_deepspeed_on_one_rank_equals_the_plain_process(runs, files, tmp_path):
    check_equal(runs, ppo_again(runs, files, tmp_path / "ppo", 1, "zero0"))


def test_deepspeed_on_two_ranks_equals_the_plain_process(runs, files, tmp_path):
    check_equal(runs, ppo_again(runs, files, tmp_path / "ppo", 2, "zero2"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks,stage", [(1, "zero2"), (1, "zero3"), (2, "zero0"), (2, "zero3")])
def test_other_stages_equal_the_plain_process(runs, files, tmp_path, ranks, stage):
    if stage == "zero3":  # a tiny model would not be cut into parts at all
        config = json.loads((ROOT / "rlhf" / "configs" / "deepspeed" / "zero3.json").read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        stage = str(tmp_path / "zero3.json")
        Path(stage).write_text(json.dumps(config))
    check_equal(runs, ppo_again(runs, files, tmp_path / "ppo", ranks, stage))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo"])
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_trl_stages_run_on_two_ranks(runs, tmp_path, name, stage):
    flags = [
        "--config",
        str(runs / name / "config.yaml"),
        "--output_dir",
        str(tmp_path),
        "--deepspeed",
        stage,
    ]
    done = launch(2, name, [*flags, "--per_device_train_batch_size", "2"])
    assert done.returncode == 0, done.stderr[-3000:]
    from safetensors.torch import load_file

    ours, plain = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, runs / name))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in plain.items()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_ranks_share_the_reference_pass(runs, tmp_path, stage):
    whole = ["--max_steps", "-1", "--num_train_epochs", "1"]
    said, paid = [], []
    for ranks, beta in ((2, "0.1"), (2, "0.3"), (1, "0.3")):
        flags = ["--config", str(runs / "dpo" / "config.yaml"), "--deepspeed", stage, *whole]
        flags += ["--output_dir", str(tmp_path / f"{ranks}-{beta}"), "--beta", beta]
        done = launch(ranks, "dpo", flags)
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = (text for text in done.stdout.splitlines() if "from the cache" in text)
        said.append(line.partition("dpo: ")[2].partition(" reference log-prob")[0])
        result = json.loads((tmp_path / f"{ranks}-{beta}" / "result.json").read_text())
        paid.append(result["budget"]["budget/reference_flops"])
    # each pays for the whole pass once, the ranks together
    assert paid == pytest.approx([paid[0]] * 3, rel=1e-9)
    rows = said[1].split(" of ")[1]
    assert int(rows) > 0 and said == [f"0 of {rows}", f"{rows} of {rows}", f"{rows} of {rows}"]


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
def test_each_door_opens_from_another_directory(name):
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py")]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and "--learning_rate" in done.stdout, done.stderr
    wrong = subprocess.run(
        [*command, "--learnign_rate", "1"], capture_output=True, text=True, cwd="/"
    )
    assert wrong.returncode == EXIT_USER_ERROR
    assert "unknown option 'learnign_rate'. Did you mean 'learning_rate'?" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_one_rank_starts_where_the_port_of_the_launcher_is_taken(runs, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "1"]
        command += ["--master_port", str(taken.getsockname()[1]), str(ROOT / "launch" / "ppo.py")]
        # begins, joins the other ranks (there are none), and stops at the first thing that is
        # missing
        flags = [
            "--config",
            str(runs / "ppo" / "config.yaml"),
            "--output_dir",
            str(tmp_path),
            "--data",
            "none.jsonl",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            [*command, *flags],
            capture_output=True,
            text=True,
            cwd="/",
            env=environment,
            timeout=120,
        )
    assert "none.jsonl: no such file" in done.stderr and "EADDRINUSE" not in done.stderr, (
        done.stderr[-2000:]
    )
