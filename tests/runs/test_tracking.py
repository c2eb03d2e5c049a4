import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.offline.trl_names import rename_trl
from rlhf.runs.metrics import METRICS, PATTERNS, SECTIONS, check_names, is_known, metrics_page
from rlhf.runs.model_card import write_card
from rlhf.runs.tracking import Tracker, read_metrics

ROOT = Path(__file__).parents[2]


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """No W&B key anywhere, and a home without netrc."""
    for name in (
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_MODE",
        "NETRC",
        "WANDB_BASE_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_metrics_are_flushed_as_valid_json_even_where_they_are_not_finite(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.log(
        {
            "loss/total": math.nan,
            "grad/norm": math.inf,
            "reward/min": -math.inf,
            "budget/episodes": 3,
        },
        7,
    )
    text = (tmp_path / "metrics.jsonl").read_text()  # before finish: a crash must not lose it
    row = json.loads(text, parse_constant=refuse)
    assert row.pop("time") > 1.7e9
    assert row == {
        "step": 7, "loss/total": "NaN", "grad/norm": "Infinity", "reward/min": "-Infinity", "budget/episodes": 3,
    }  # fmt: skip
    (back,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (
        math.isnan(back["loss/total"])
        and back["grad/norm"] == math.inf
        and back["reward/min"] == -math.inf
    )
    tracker.finish()


def test_arrays_of_one_number_are_numbers_and_text_is_not(tmp_path):
    torch = pytest.importorskip("torch")
    with Tracker(tmp_path) as tracker:
        tracker.log({"kl/token": torch.tensor(0.25), "kl/coef": torch.tensor(4), "trl/kl": True}, 0)
        with pytest.raises(TypeError, match="metric 'epoch': expected a number, found '1'"):
            tracker.log({"epoch": "1"}, 0)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["kl/token"], row["kl/coef"], row["trl/kl"]) == (0.25, 4, 1.0)


def test_only_the_main_rank_writes_but_all_ranks_see_a_wrong_name(tmp_path):
    with Tracker(tmp_path / "run", is_main=False, report_to="wandb") as tracker:
        tracker.log({"kl/token": 1.0}, 0)
        tracker.table("samples", [{"prompt": "p"}], 0)
        tracker.result({"seed": 1})
        with pytest.raises(
            KeyError, match=r"metric 'kl/tokens' is not in the vocabulary\. Did you mean 'kl/token'"
        ):
            tracker.log({"kl/tokens": 1.0}, 0)
    assert not (tmp_path / "run").exists()


def test_a_new_run_starts_afresh_and_a_resumed_one_cuts_back(tmp_path):
    for _ in range(2):
        with Tracker(tmp_path) as tracker:
            for step in (0, 1, 2, 3):
                tracker.log({"loss/total": float(step)}, step)
                tracker.table("samples", [{"response": "NaN"}], step)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "loss/tot')  # killed while writing
    with Tracker(tmp_path, resume_step=1) as tracker:
        tracker.log({"loss/total": 20.0}, 2)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss/total"]) for row in rows] == [(0, 0.0), (1, 1.0), (2, 20.0)]
    table = [
        json.loads(line) for line in (tmp_path / "tables/samples.jsonl").read_text().splitlines()
    ]
    assert table == [{"step": 0, "response": "NaN"}, {"step": 1, "response": "NaN"}]


def test_result_is_written_whole_with_versions(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.result(
            {
                "program": "dpo",
                "seed": 3,
                "data": {"pairs": "abc"},
                "headline": {"eval/kl/sequence": math.nan},
            }
        )
    result = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert result["program"] == "dpo" and result["data"] == {"pairs": "abc"}
    assert result["headline"] == {"eval/kl/sequence": "NaN"}
    assert result["versions"]["python"].startswith("3.") and set(result["versions"]) >= {
        "torch",
        "trl",
        "deepspeed",
    }
    assert not list(tmp_path.glob("*.tmp"))


def test_console_prints_first_last_and_no_flood_between(tmp_path, capsys, monkeypatch):
    with Tracker(tmp_path, console_seconds=3600) as tracker:
        for step in range(1, 101):
            tracker.console(
                step, 100, {"score/total": step / 7, "kl/token": 0.0}, ["score/total", "absent"]
            )
    assert capsys.readouterr().out.splitlines() == [
        "step 1/100  score/total 0.1429",
        "step 100/100  score/total 14.29",
    ]
    with Tracker(tmp_path, console_seconds=0) as tracker:
        monkeypatch.setattr(time, "monotonic", lambda: 110.0)
        tracker.progress.first = (100.0, 0)  # 10 s for 20 steps: 40 s for the other 80
        tracker.console(20, 100, {}, [])
    assert capsys.readouterr().out.splitlines() == ["step 20/100, 0m40s left"]


def test_vocabulary():
    for name in (
        "kl/sequence",
        "score/gold",
        "eval/score/gold",
        "eval/kl/sequence",
        "time/sync",
        "loss/anything",
        "trl/x",
    ):
        assert is_known(name), name
    for name in (
        "kl",
        "score/",
        "eval/",
        "eval/eval/kl/token",
        "kl/sequences",
        "loss",
        "reward/anything",
    ):
        assert not is_known(name), name
    with pytest.raises(KeyError, match="Did you mean 'eval/response/length'"):
        check_names(["loss/total", "eval/response/lenght"])
    for metric in METRICS.values():
        assert metric.formula


def test_the_metrics_page_is_current_and_whole():
    page = metrics_page()
    assert (ROOT / "docs/metrics.md").read_text() == page, (
        "run: python -m rlhf.runs.metrics > docs/metrics.md"
    )
    for name in METRICS:
        assert page.count(f"| `{name}` |") == 1, (
            f"{name} stands in no section or in two: {list(SECTIONS)}"
        )
    for prefix in PATTERNS:
        assert f"`{prefix}<name>`" in page


def test_trl_names():
    reward = {
        "loss": 0.6,
        "grad_norm": 1.5,
        "learning_rate": 1e-4,
        "num_tokens": 99.0,
        "accuracy": 0.7,
        "margin": 0.4,
    }
    reward |= {"min_reward": -1.0, "mean_reward": 0.1, "max_reward": 2.0, "epoch": 0.5}
    assert rename_trl(reward, "reward") == {
        "loss/total": 0.6, "grad/norm": 1.5, "learning_rate": 1e-4, "budget/tokens_trained": 99.0,
        "reward/accuracy": 0.7, "reward/margin": 0.4, "reward/min": -1.0, "reward/mean": 0.1, "reward/max": 2.0,
        "epoch": 0.5,
    }  # fmt: skip
    dpo = {
        "rewards/margins": 0.3,
        "rewards/accuracies": 0.8,
        "logps/chosen": -40.0,
        "entropy": 1.1,
        "new_in_2": 5.0,
    }
    assert rename_trl(dpo, "dpo") == {
        "dpo/reward_margin": 0.3, "dpo/reward_accuracy": 0.8, "dpo/logprob_chosen": -40.0, "token/entropy": 1.1,
        "trl/new_in_2": 5.0,
    }  # fmt: skip
    evaluation = {
        "eval_loss": 2.0,
        "eval_mean_token_accuracy": 0.6,
        "eval_runtime": 3.0,
        "eval_num_tokens": 9.0,
    }
    evaluation |= {"eval_samples_per_second": 1.0, "eval_odd": 4.0, "epoch": 1.0}
    assert rename_trl(evaluation, "sft") == {
        "eval/loss/total": 2.0, "eval/token/accuracy": 0.6, "time/evaluate": 3.0, "eval/trl/odd": 4.0, "epoch": 1.0,
    }  # fmt: skip
    # our own count, added by another callback, wins whatever the order
    assert rename_trl({"budget/tokens_trained": 7.0, "num_tokens": 9.0}, "sft") == {
        "budget/tokens_trained": 7.0
    }


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_every_name_that_the_installed_trl_logs_is_known_here(stage):
    # The source is the only list there is: names in _metrics[mode]["..."]
    import importlib.util
    import re

    package = Path(importlib.util.find_spec("trl").origin).parent
    names = set(
        re.findall(
            r'_metrics\[mode\]\["([^"]+)"\]', (package / f"trainer/{stage}_trainer.py").read_text()
        )
    )
    assert len(names) >= 4
    for renamed in rename_trl(dict.fromkeys(names, 1.0), stage):
        assert is_known(renamed) and not renamed.startswith("trl/"), renamed


def test_the_callback_logs_through_the_tracker(tmp_path, capsys):
    from types import SimpleNamespace

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from rlhf.offline.callbacks import RunCallback
    from rlhf.ranks.distributed import DistributedContext
    from rlhf.runs.budget import Budget

    with Tracker(tmp_path, console_seconds=0) as tracker:
        run = SimpleNamespace(program="reward", tracker=tracker, world=DistributedContext())
        run.config = SimpleNamespace(guards={})
        callback = RunCallback(run, None, Budget(tokens_trained=70))
        state = TrainerState(global_step=5, max_steps=10)
        arguments = TrainingArguments(output_dir=str(tmp_path / "t"), use_cpu=True)
        capsys.readouterr()  # what other packages print when they are first imported
        callback.on_log(arguments, state, TrainerControl(), logs={"loss": 0.5, "accuracy": 0.75})
        callback.on_log(arguments, state, TrainerControl(), logs={"total_flos": 1.0})
    row, last = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["step"], row["loss/total"], row["reward/accuracy"]) == (5, 0.5, 0.75)
    assert last["budget/tokens_trained"] == 70 and "loss/total" not in last
    assert capsys.readouterr().out == "step 5/10  loss/total 0.5  reward/accuracy 0.75\n"


def test_wandb_is_offline_without_a_key_and_asks_nothing(tmp_path, no_key, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked for a login"))
    monkeypatch.setenv("WANDB_MODE", "online")  # asked for, but there is no key
    with Tracker(tmp_path, report_to="wandb", config={"kl_coef": 0.1}) as tracker:
        assert tracker.wandb.run is not None and tracker.wandb.run.settings.mode == "offline"
        assert tracker.wandb.run.config["kl_coef"] == 0.1
        first_id = tracker.wandb.run.id
        tracker.log({"kl/sequence": 1.0, "loss/total": math.nan}, 1)
        tracker.table(
            "samples",
            [{"prompt": "p", "score": {"gold": 0.5}}, {"prompt": "q", "response": "r"}],
            1,
        )
        tracker.result({"headline": {"eval/kl/sequence": 1.0}, "data": {"pairs": "abc"}})
        assert tracker.wandb.run.config["data"] == {"pairs": "abc"}
        assert tracker.wandb.run is not None  # no call failed
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/table/tables/samples*.json"))
    with Tracker(tmp_path, report_to="wandb", resume_step=1) as tracker:
        assert tracker.wandb.run.id == first_id


def records_of(folder):
    """Yield the records of an offline run: a LevelDB log of protocol buffers behind 7 bytes."""
    import struct

    from wandb.proto.wandb_internal_pb2 import Record

    [file] = (folder / "wandb").glob("offline-run-*/*.wandb")
    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        # blocks of 32 kB, whose last bytes hold no header
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        # 1: a whole record; 2, 3, 4: its first, middle and last parts
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


def test_an_offline_run_of_wandb_decoded(tmp_path, no_key, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_GROUP", "grid")
    sft, data, run = tmp_path / "runs" / "sft", tmp_path / "pairs.jsonl", tmp_path / "runs" / "ppo"
    for folder in (sft, run):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(f'{{"of": "{folder.name}"}}')
    data.write_text("{}\n")
    with Tracker(run, report_to="wandb", job_type="ppo", tags=["ppo", "gae"]) as tracker:
        tracker.log({"budget/flops": 5e9, "kl/sequence": 1.0}, 1)
        tracker.log({"eval/score/gold": 0.25}, 1)
        tracker.table("samples", [{"response": "r"}], 1)
        tracker.log({"budget/flops": 6e9}, 2)
        tracker.page("card", "<h1>Card</h1>")
        tracker.artifacts([sft, data, "org/on-a-hub", sft])
        assert tracker.wandb.run is not None  # no call failed

    import wandb

    # its process writes the end of the file when it ends
    wandb.teardown()
    records = list(records_of(run))
    [begun] = [record.run for record in records if record.HasField("run")][:1]
    assert (begun.display_name, begun.run_group, begun.job_type) == ("ppo", "grid", "ppo")
    assert list(begun.tags) == ["ppo", "gae"]

    rows = []
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            rows.append({".".join(item.nested_key): item.value_json for item in items})
    first, second = rows
    # score and FLOPs of a step stand in one row, and so can be plotted against each other
    assert float(first["budget/flops"]) == 5e9 and float(first["eval/score/gold"]) == 0.25
    assert (first["step"], second["step"]) == ("1", "2")
    assert first["tables/samples._type"] == '"table-file"'
    assert second["pages/card._type"] == '"html-file"'

    artifacts = [record.artifact for record in records if record.HasField("artifact")]
    # W&B makes one of each table by itself
    artifacts = [artifact for artifact in artifacts if artifact.type != "run_table"]
    found = [(a.name, a.type, a.use_after_commit) for a in artifacts]
    parent = tmp_path.name
    assert found == [
        ("runs-sft", "model", True),
        (f"{parent}-pairs.jsonl", "data", True),
        ("runs-ppo", "model", False),
    ]
    assert [content.path for content in artifacts[0].manifest.contents] == ["adapter_config.json"]
    # data are named with their hash, and stay where they are
    assert artifacts[1].manifest.contents[0].ref == data.as_uri()


def test_what_was_not_chosen_is_left_to_the_variables_of_wandb(tmp_path, no_key, monkeypatch):
    for name, value in {
        "PROJECT": "mine",
        "NAME": "tuesday",
        "RUN_ID": "abc",
        "DIR": str(tmp_path / "logs"),
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "logs").mkdir()
    with Tracker(tmp_path / "one", report_to="wandb") as tracker:
        run = tracker.wandb.run
        assert (run.project, run.name, run.id) == ("mine", "tuesday", "abc")
        assert list((tmp_path / "logs" / "wandb").glob("offline-run-*-abc"))
    monkeypatch.delenv("WANDB_RUN_ID")
    with Tracker(
        tmp_path / "two", report_to="wandb", project="chosen", run_name="by me"
    ) as tracker:
        assert (tracker.wandb.run.project, tracker.wandb.run.name) == ("chosen", "by me")
    for name in ("PROJECT", "NAME"):
        monkeypatch.delenv(f"WANDB_{name}")
    with Tracker(tmp_path / "three", report_to="wandb") as tracker:
        assert (tracker.wandb.run.project, tracker.wandb.run.name) == (
            "rlhf",
            "three",
        )


def test_wandb_can_be_switched_off_by_its_variable(tmp_path, no_key, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_DISABLED", "true")
    with Tracker(tmp_path, report_to="wandb") as tracker:
        assert tracker.wandb.run is None
    assert "W&B is off: WANDB_DISABLED is set" in capsys.readouterr().err


def test_wandb_that_cannot_start_or_fails_later_never_stops_a_run(
    tmp_path, no_key, monkeypatch, capsys
):
    import wandb

    modes = []
    init = wandb.init

    def online_fails(**kwargs):
        modes.append(kwargs["mode"])
        assert kwargs["settings"].init_timeout <= 30
        if kwargs["mode"] == "online":
            raise wandb.errors.CommError("no network")
        return init(**kwargs)

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "init", online_fails)
    with Tracker(tmp_path, report_to="wandb") as tracker:
        assert modes == ["online", "offline"]
        assert (
            capsys.readouterr().err.count(
                "warning: W&B online failed (CommError: no network); writing offline"
            )
            == 1
        )
        monkeypatch.setattr(tracker.wandb.run, "log", lambda *a, **k: 1 / 0)
        tracker.log({"kl/sequence": 1.0}, 1)
        tracker.log({"kl/sequence": 2.0}, 2)
        assert capsys.readouterr().err.count("W&B log failed (ZeroDivisionError") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    monkeypatch.setattr(wandb, "init", lambda **k: 1 / 0)
    with Tracker(tmp_path, report_to="wandb") as tracker:
        tracker.log({"kl/sequence": 1.0}, 1)
    assert "going on without it" in capsys.readouterr().err


def test_a_key_in_netrc_counts(no_key, tmp_path, monkeypatch):
    from rlhf.runs.wandb import has_key

    assert not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert has_key()


def test_model_card(tmp_path):
    result = {
        "seed": 3,
        "headline": {"eval/score/gold": 0.71234},
        "budget": {"budget/episodes": 512},
    }
    result |= {"data": {"prompt/train": "f00d"}, "versions": {"torch": "2.13", "trl": None}}
    provenance = {"prompts": {"source": "data/p|q.jsonl", "rows": 800}, "start": "runs/sft"}
    (tmp_path / "ppo").mkdir()
    write_card(tmp_path / "ppo", "ppo", {"model_name_or_path": "a/b"}, result, provenance)
    card = (tmp_path / "ppo/README.md").read_text()
    assert card.startswith(
        "---\nlibrary_name: transformers\nbase_model: a/b\ntags:\n- rlhf\n- ppo\n---\n"
    )
    for line in (
        "# ppo: ppo of b", "| eval/score/gold | 0.7123 |", "| budget/episodes | 512 |", "- start: runs/sft",
        "| prompts | data/p\\|q.jsonl | 800 |  |", "| prompt/train |  |  | f00d |", "torch 2.13",
    ):  # fmt: skip
        assert line in card.splitlines()
    assert str(tmp_path) not in card
    (tmp_path / "ppo/adapter_config.json").touch()
    write_card(tmp_path / "ppo", "ppo", {"model_name_or_path": str(tmp_path)}, {}, {})
    card = (tmp_path / "ppo/README.md").read_text()
    assert "library_name: peft" in card and "base_model" not in card


def test_importing_the_tracker_is_cheap():
    # A command line imports it; torch, transformers and wandb cost seconds
    heavy = ("torch", "transformers", "wandb", "numpy")
    code = f"import sys, rlhf.runs.tracking; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "[]"


def test_files_are_cut_to_where_they_were_at_the_checkpoint(tmp_path):
    """A line of the checkpoint's own step that was written after it goes too; only the length can
    tell.
    """
    with Tracker(tmp_path) as tracker:
        tracker.log({"loss/total": 1.0}, 1)
        tracker.table("samples", [{"response": "a"}], 1)
        position = tracker.position()
        before = (tmp_path / "metrics.jsonl").read_bytes()
        tracker.log({"eval/loss/total": 5.0}, 1)
        tracker.table("samples", [{"response": "b"}], 2)
        tracker.rewind(1, position)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        tracker.log({"loss/total": 2.0}, 2)
        tracker.table("later", [{"response": "c"}], 2)
    with Tracker(tmp_path, resume_step=1, position=position):
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        assert len((tmp_path / "tables/samples.jsonl").read_text().splitlines()) == 1
        assert not (tmp_path / "tables/later.jsonl").read_text()  # there was none then


def test_wandb_is_not_sent_a_step_twice(tmp_path, no_key, monkeypatch):
    import wandb

    sent = []

    class Run:
        id = "abc"

        def log(self, row):
            sent.append(row["step"])

        def define_metric(self, *args, **kwargs):
            pass

        def finish(self, **kwargs):
            pass

    monkeypatch.setattr(wandb, "init", lambda **kwargs: Run())
    with Tracker(tmp_path, report_to="wandb") as tracker:
        for step in (1, 2, 3):
            tracker.log({"loss/total": 1.0}, step)
    with Tracker(tmp_path, report_to="wandb", resume_step=1) as tracker:
        for step in (2, 3, 4):
            tracker.log({"loss/total": 1.0}, step)
            tracker.log({"eval/loss/total": 1.0}, step)
            tracker.table("samples", [{"response": "r"}], step)
    # the rows of a step are one
    assert sent == [1, 2, 3, 4]
    with Tracker(tmp_path, report_to="wandb", resume_step=4) as tracker:
        position = tracker.position()
        for step in (5, 6):
            tracker.log({"loss/total": 1.0}, step)
        tracker.rewind(4, position)  # after a rollback the steps are made again
        for step in (5, 6, 7):
            tracker.log({"loss/total": 2.0}, step)
    assert sent == [1, 2, 3, 4, 5, 6, 7]
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
        6,
        7,
    ]
    with Tracker(tmp_path, report_to="wandb") as tracker:  # a new run begins anew
        tracker.log({"loss/total": 1.0}, 1)
    assert sent[-1] == 1
