import fcntl
import json
import os
import subprocess
import sys

import pytest

from rlhf.errors import UserError
from rlhf.files import files_fingerprint, lock_folder, model_files, scorer_files, unlock_folder

HOLDER = """
import sys, time
from rlhf.files import lock_folder
lock_folder(sys.argv[1])
print("locked", flush=True)
time.sleep(600)
"""


def test_a_folder_has_one_process_at_a_time_and_a_kill_frees_it(tmp_path):
    folder = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(
        UserError, match=rf"{folder}: process {other.pid} on .* is at work in this folder"
    ):
        lock_folder(folder)
    other.kill()
    other.wait()
    lock_folder(folder)
    lock_folder(folder)  # the same process: nothing happens
    assert f"process {os.getpid()} on" in (folder / ".lock").read_text()
    unlock_folder(folder)
    assert list(folder.iterdir()) == []


def test_a_lock_file_that_was_removed_while_it_was_opened_is_not_taken_for_the_lock(
    tmp_path, monkeypatch
):
    real, removed = fcntl.flock, []

    def flock(file, how):
        real(file, how)
        if how & fcntl.LOCK_EX and not removed:  # whoever held it removes it at this moment
            removed.append((tmp_path / ".lock").unlink())

    monkeypatch.setattr(fcntl, "flock", flock)
    lock_folder(tmp_path)
    assert (tmp_path / ".lock").is_file()
    unlock_folder(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"{wrong}: nothing can be written there"):
            lock_folder(wrong)


def fingerprint(spec):
    return files_fingerprint(scorer_files(spec))


def test_whatever_a_score_depends_on_changes_its_fingerprint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward = tmp_path / "reward"
    reward.mkdir()
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "reward.json",
        "tokenizer.json",
        "config.json",
    ):
        (reward / name).write_text("{}")
    (reward / "chat_template.jinja").write_text("")
    (tmp_path / "shop.yaml").write_text("name: shop")
    (tmp_path / "own_scores.py").write_text("def polite(samples): return [1.0] * len(samples)")
    specs = [
        {"model": "reward"},
        {"ensemble": ["reward"]},
        {"voice": "shop.yaml"},
        {"function": "own_scores:polite"},
    ]
    before = [fingerprint(spec) for spec in specs]
    # what a run says about itself
    for name in ("result.json", "card.json", "metrics.jsonl", "README.md"):
        (reward / name).write_text("{}")
    assert [fingerprint(spec) for spec in specs] == before
    for file in [*model_files(reward), tmp_path / "shop.yaml", tmp_path / "own_scores.py"]:
        kept, changed = file.read_text(), '{"scale": 2.0}'
        file.write_text(changed)
        moved = [spec for spec, old in zip(specs, before, strict=True) if fingerprint(spec) != old]
        assert (
            moved
            == [spec for spec in specs if file in [path.resolve() for path in scorer_files(spec)]]
            != []
        )
        file.write_text(kept)
    assert [fingerprint(spec) for spec in specs] == before
    assert (
        scorer_files({"http": "http://localhost:1/score"}) == scorer_files({"rule": "length"}) == []
    )


def test_an_adapter_whose_base_has_moved_is_the_same(tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"r": 4, "base_model_name_or_path": "here/base"}))
    before = files_fingerprint([config])
    config.write_text(json.dumps({"r": 4, "base_model_name_or_path": "there/base"}))
    assert files_fingerprint([config]) == before
    config.write_text(json.dumps({"r": 8, "base_model_name_or_path": "there/base"}))
    assert files_fingerprint([config]) != before
