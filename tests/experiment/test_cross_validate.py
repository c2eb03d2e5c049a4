"""Folds by group, scores of what a model has not seen, and the numbers that follow from them."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest

from rlhf.data.load import load
from rlhf.data.records import Preference
from rlhf.data.split import deal_folds
from rlhf.errors import EarlyExit, UserError
from rlhf.experiment.cross_validate import (
    CrossValidateConfig,
    cross_validate,
    page_of,
    summarise,
)
from rlhf.jobs import runner

# a program in the place of launch/reward.py: its model is the share of "good" in what it was trained on
PROGRAM = """
import json, pathlib, sys, time, yaml
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
rows = [json.loads(line) for line in open(config["data"][0])]
folder = pathlib.Path(config["output_dir"])
folder.mkdir(parents=True, exist_ok=True)
if (folder.parent / f"cut-{folder.name}").exists():
    sys.exit(2)
# killed once; the second start goes on until the last fold is there
crash, last = folder.parent / f"crash-{folder.name}", folder.parent / "fold-2" / "result.json"
if crash.exists() and not crash.read_text():
    crash.write_text("once")
    sys.exit(1)
for _ in range(600 * crash.exists()):
    if last.exists():
        print("the second start goes on")
        break
    time.sleep(0.05)
trained = sorted({row["group"] for row in rows if row["split"] in ("train", "validation")})
(folder / "trained.json").write_text(json.dumps(trained))
with open(folder.parent / "started.txt", "a") as file:
    file.write(folder.name + " ")
(folder / "result.json").write_text(json.dumps({"finished": "now", "saved_step": 7}))
"""


class LongerIsBetter:
    """Scores a row of ids by its length, on a scale of 2 and from 1."""

    bias, scale = 1.0, 2.0

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def score_ids(self, rows, batch_size, progress):
        progress(len(rows))
        return [self.bias + self.scale * len(row) for row in rows]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Twelve prompts with two pairs each, and a config that reads them."""
    rows = []
    for n in range(12):
        for m in range(2):
            row = {"prompt": f"question {n}", "chosen": f"good answer {n}{m}"}
            rows.append(
                row | {"rejected": "a" if (n, m) != (0, 0) else "a long bad answer, and on"}
            )
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.yaml").write_text(
        f"model_name_or_path: base\ndata: [{tmp_path}/p.jsonl]\noutput_dir: {tmp_path}/reward\n"
        "test_fraction: 0\nvalidation_fraction: 0.2\n"
    )
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py")]
    monkeypatch.setattr(runner, "full_command", lambda _, job: [*command, *job.arguments])
    return CrossValidateConfig(reward_config=str(tmp_path / "reward.yaml"), folds=3)


@pytest.fixture(scope="module")
def load_model(base_path):
    from rlhf.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base_path)
    return lambda folder: LongerIsBetter(tokenizer)


def started(tmp_path):
    return (tmp_path / "reward-folds" / "started.txt").read_text().split()


def test_every_pair_is_scored_once_by_a_model_that_has_not_seen_its_group(
    config, load_model, tmp_path, capsys
):
    cross_validate(config, load_model)
    folder = tmp_path / "reward-folds"
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and len({row["chosen"][0]["content"] for row in rows}) == 24
    for fold in range(3):
        mine = {row["group"] for row in rows if row["fold"] == fold}
        trained = set(json.loads((folder / f"fold-{fold}" / "trained.json").read_text()))
        assert len(mine) == 4 and not mine & trained and len(mine | trained) == 12
        # what the real program reads of the file: the fold is in no split that it has
        file = str(folder / f"fold-{fold}.jsonl")
        seen = [load(file, Preference, split=split) for split in ("train", "validation")]
        assert {pair.group for part in seen for pair in part} == trained
        assert seen[1], "early stopping has pairs of its own"
    # raw scores: length, without scale and bias
    longest = max(rows, key=lambda row: row["rejected_score"])
    assert longest["rejected_score"] > longest["chosen_score"]
    result = json.loads((folder / "cross_validation.json").read_text())
    assert result["accuracy"]["mean"] == pytest.approx(23 / 24)
    assert [entry["saved_step"] for entry in result["folds"]] == [7, 7, 7]
    assert "| **all folds** | 24 | 12 | 0.958" in " ".join(capsys.readouterr().out.split("  "))


def test_it_resumes_fold_by_fold(config, load_model, tmp_path):
    folder = tmp_path / "reward-folds"
    folder.mkdir()
    (folder / "cut-fold-1").touch()
    with pytest.raises(EarlyExit, match="fold-1"):
        cross_validate(config, load_model)
    assert started(tmp_path) == ["fold-0"] and not (folder / "scores.jsonl").exists()
    (folder / "cut-fold-1").unlink()
    cross_validate(config, load_model)
    assert started(tmp_path) == ["fold-0", "fold-1", "fold-2"]
    # scores are kept too: nothing is loaded
    first = (folder / "scores.jsonl").read_bytes()
    cross_validate(config, lambda folder: pytest.fail("loaded again"))
    assert started(tmp_path) == ["fold-0", "fold-1", "fold-2"]
    assert (folder / "scores.jsonl").read_bytes() == first


def test_a_fold_that_was_started_again_is_shown_beside_the_others(
    config, load_model, tmp_path, capsys
):
    folder = tmp_path / "reward-folds"
    folder.mkdir()
    (folder / "crash-fold-0").touch()
    config.processes = 2
    cross_validate(config, load_model)
    out = capsys.readouterr().out
    assert "fold-0: ended with exit code 1" in out and "the second start goes on" in out
    assert out.count("[1/3] fold-0") == 2 and out.count("[2/3] fold-1") == 1
    assert started(tmp_path)[-1] == "fold-0"


def test_other_options_are_not_mixed_in(config, load_model, tmp_path):
    cross_validate(config, load_model)
    config.options = {"learning_rate": 1e-3}
    with pytest.raises(UserError, match="results of other options"):
        cross_validate(config, load_model)
    config.redo = True
    cross_validate(config, load_model)
    assert started(tmp_path) == [f"fold-{n}" for n in range(3)] * 2


def test_groups_are_dealt_evenly_and_alike_whatever_the_order():
    groups = [f"g{n}" for n in range(23)]
    dealt = deal_folds(groups * 3, 5)
    assert sorted(np.bincount(list(dealt.values()))) == [4, 4, 5, 5, 5]
    assert deal_folds(reversed(groups), 5) == dealt
    # by a hash, not in the order of the names
    assert [dealt[group] for group in sorted(groups)] != [n % 5 for n in range(23)]
    with pytest.raises(UserError, match="3 groups cannot make 4 folds"):
        deal_folds(["a", "b", "c", "a"], 4)


def row(fold, group, gap, **more):
    return {"fold": fold, "group": group, "chosen_score": gap, "rejected_score": 0.0, **more}


def test_the_summary_by_hand():
    rows = [
        row(0, "a", 1.0),
        row(0, "a", -1.0),
        row(0, "b", 0.0),
        row(1, "c", 2.0),
        row(1, "d", 1.0, label_prob=0.75),
        # no winner
        row(1, "d", 5.0, label_prob=0.5, tie_prob=1.0),
    ]
    found = summarise(rows, [{"saved_step": 3}, {"saved_step": 4}])
    assert (found["pairs"], found["without_winner"], found["groups"]) == (5, 1, 4)
    # right 1, wrong 0, equal 1/2; right, right
    assert found["accuracy"]["mean"] == pytest.approx(3.5 / 5)
    # log(1 + e^-1) = 0.3132617, + 1 the other way, log 2; 0.1269280, 0.75 and 0.25 of it
    losses = [0.3132617, 1.3132617, 0.6931472, 0.1269280, 0.5632617]
    assert found["log_loss"]["mean"] == pytest.approx(sum(losses) / 5, abs=1e-6)
    folds = found["folds"]
    assert [entry["accuracy"] for entry in folds] == [pytest.approx(0.5), 1.0]
    assert folds[0]["log_loss"] == pytest.approx(sum(losses[:3]) / 3, abs=1e-6)
    # standard deviation of 0.5 and 1: 0.5 / sqrt 2
    assert found["accuracy"]["spread"] == pytest.approx(0.5 / math.sqrt(2))
    # fold 0: without a 0.5, without b 0.5, so that its error is 0; fold 1: all right
    assert found["accuracy"]["expected_spread"] == pytest.approx(0.0)
    # without each group of fold 1: 0.5632617 and 0.1269280; se^2 = 1/2 * 2 * 0.2181668^2, of fold 0
    # without a 0.6931472, without b 0.8132617: 0.0600573
    errors = (0.2181668**2 + 0.0600573**2) / 2
    assert found["log_loss"]["expected_spread"] == pytest.approx(math.sqrt(errors), abs=1e-6)
    assert "fold 1" in page_of(found, "x") and "1 pairs without a winner" in page_of(found, "x")


def test_the_interval_is_over_groups():
    """Ten pairs of one group are not ten times as much evidence."""
    few = [row(0, f"g{n}", 1.0 if n % 3 else -1.0) for n in range(12)]
    many = [entry for entry in few for _ in range(10)]
    ours, theirs = summarise(few)["log_loss"], summarise(many)["log_loss"]
    assert (ours["low"], ours["high"]) == (
        pytest.approx(theirs["low"]),
        pytest.approx(theirs["high"]),
    )


@pytest.mark.slow
def test_the_real_program_on_two_folds(sft_path, tmp_path):
    rows = []
    for n in range(16):
        rows.append(
            {"prompt": f"where is parcel {n}?", "chosen": f"on its way {n}", "rejected": f"no {n}"}
        )
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.yaml").write_text(
        f"model_name_or_path: {sft_path}\ndata: [p.jsonl]\noutput_dir: out\nlearning_rate: 0.01\n"
        "num_train_epochs: 6\ntest_fraction: 0\nmax_prompt_length: 64\nmax_response_length: 64\n"
        "deepspeed: zero0\nvalidation_fraction: 0.3\neval_steps: 2\nload_best_model_at_end: true\n"
    )
    command = [sys.executable, "-m", "rlhf.cli", "reward", "cross-validate", "reward.yaml"]
    done = subprocess.run(
        [*command, "--folds", "2"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out-folds" / "cross_validation.json").read_text())
    assert result["pairs"] == 16 and result["accuracy"]["mean"] > 0.8
    shutil.rmtree(tmp_path / "out-folds" / "fold-0")
    assert "Cross-validation: out-folds" in done.stdout
