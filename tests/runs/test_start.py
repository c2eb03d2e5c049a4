"""Run folders that were written before options were renamed are still resumed."""

import json

import pytest

from rlhf.distributed import DistributedContext
from rlhf.errors import EarlyExit, UserError
from rlhf.options.offline import SFTRunConfig
from rlhf.runs import checkpoint
from rlhf.runs.start import check_finished, find_checkpoint, read_result

# on_error was called on_bad
OLD = {"data": ["d.jsonl"], "on_bad": "skip", "max_steps": 3, "seed": 0}


@pytest.fixture
def old_folder(tmp_path):
    (tmp_path / "config.yaml").write_text("data: [d.jsonl]\non_bad: skip\nmax_steps: 3\nseed: 0\n")
    (tmp_path / "result.json").write_text('{"finished": "2026-01-01", "program": "sft"}')
    folder = tmp_path / "checkpoints" / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"123")
    about = {
        "program": "sft",
        "ranks": 1,
        "launched": False,
        "options": OLD,
        "data": {},
        "state": {"last": {}},
    }
    checkpoint.seal(folder, 3, about)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]  # the first version wrote none
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def config(folder, **options):
    given = {"max_steps": 3, "on_error": "skip"} | options
    return SFTRunConfig(model_name_or_path="x", data=["d.jsonl"], output_dir=str(folder), **given)


def test_an_old_folder_is_finished_or_made_longer(old_folder):
    result = read_result(old_folder)
    with pytest.raises(EarlyExit, match="raise --max_steps"):
        check_finished(old_folder, config(old_folder), result)
    check_finished(old_folder, config(old_folder, max_steps=5), result)
    found = find_checkpoint(
        "sft", config(old_folder, max_steps=5), DistributedContext(), is_finished=True
    )
    assert found.step == 3 and found.metadata["state"] == {"last": {}}


def test_an_old_option_that_differs_is_named_as_it_is_called_today(old_folder):
    with pytest.raises(UserError, match="on_error: was 'skip', now 'stop'"):
        find_checkpoint(
            "sft", config(old_folder, on_error="stop"), DistributedContext(), is_finished=True
        )
