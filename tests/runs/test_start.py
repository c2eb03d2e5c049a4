"""Run folders that were written before options were renamed are still resumed."""

import json

import pytest

from rlhf.errors import EarlyExit, UserError
from rlhf.options.offline import RewardRunConfig, SFTRunConfig
from rlhf.options.shared import NOISE_VERSION
from rlhf.ranks.distributed import DistributedContext
from rlhf.runs import checkpoint
from rlhf.runs.start import check_finished, check_resumable, find_checkpoint, read_result

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


def record(folder, **about):
    """Write a checkpoint's record anew, as the first version did, without a hash of its own."""
    file = folder / "checkpoints" / "checkpoint-3" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["about"] |= about
    file.write_text(json.dumps(manifest))


def config(folder, **options):
    given = {"max_steps": 3, "on_error": "skip"} | options
    return SFTRunConfig(model_name_or_path="x", data=["d.jsonl"], output_dir=str(folder), **given)


def test_an_old_folder_is_finished_or_made_longer(old_folder):
    result = read_result(old_folder)
    with pytest.raises(EarlyExit, match="raise --max_steps"):
        check_finished("sft", config(old_folder), result)
    check_finished("sft", config(old_folder, max_steps=5), result)
    record(old_folder, noise=NOISE_VERSION)
    found = find_checkpoint(
        "sft", config(old_folder, max_steps=5), DistributedContext(), is_finished=True
    )
    assert found.step == 3 and found.metadata["state"] == {"last": {}}


def test_a_run_of_another_sampling_noise_is_not_resumed(old_folder):
    longer = config(old_folder, max_steps=5)
    told = f"noise 1, and this version samples with {NOISE_VERSION}.*version that began it, or .*overwrite"
    with pytest.raises(UserError, match=told):
        find_checkpoint("sft", longer, DistributedContext(), is_finished=True)
    record(old_folder, noise=NOISE_VERSION + 1)
    with pytest.raises(UserError, match=f"with sampling noise {NOISE_VERSION + 1}, and"):
        find_checkpoint("sft", longer, DistributedContext(), is_finished=True)


def test_a_reward_model_which_samples_nothing_is_resumed_whatever_the_noise(old_folder):
    record(old_folder, program="reward")
    longer = RewardRunConfig(
        model_name_or_path="x",
        data=["d.jsonl"],
        output_dir=str(old_folder),
        max_steps=5,
        on_error="skip",
    )
    found = find_checkpoint("reward", longer, DistributedContext(), is_finished=True)
    assert found.step == 3


def test_an_old_option_that_differs_is_named_as_it_is_called_today(old_folder):
    record(old_folder, noise=NOISE_VERSION)
    with pytest.raises(UserError, match="on_error: was 'skip', now 'stop'"):
        find_checkpoint(
            "sft", config(old_folder, on_error="stop"), DistributedContext(), is_finished=True
        )


def of_ranks(folder, ranks, **options):
    """A checkpoint of SFT that so many ranks have written, 4 rows each."""
    about = {
        "program": "sft",
        "ranks": ranks,
        "launched": True,
        "noise": NOISE_VERSION,
        "options": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1} | options,
    }
    return checkpoint.Checkpoint(folder, 3, about)


def resumable(folder, ranks_then, ranks_now, *, launched=True, **options):
    world = DistributedContext(size=ranks_now, launched=launched)
    given = {"per_device_train_batch_size": 4} | options
    check_resumable(of_ranks(folder, ranks_then), "sft", config(folder, **given), world)


def test_another_number_of_ranks_goes_on_with_the_same_rows_of_a_step(tmp_path):
    # 2 ranks x 4 rows: 8 a step
    resumable(tmp_path, 2, 1, gradient_accumulation_steps=2)
    resumable(tmp_path, 2, 4, per_device_train_batch_size=2)
    resumable(tmp_path, 2, 2)
    with pytest.raises(
        UserError, match="learnt from 8 rows, and one of 1 would learn from 4"
    ) as told:
        resumable(tmp_path, 2, 1)
    advice = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    assert str(told.value).endswith(advice)
    with pytest.raises(UserError, match="8 rows cannot be divided among 3"):
        resumable(tmp_path, 2, 3)
    # only where the number of ranks is another one
    with pytest.raises(UserError, match="Fixed options that differ"):
        resumable(tmp_path, 2, 2, per_device_train_batch_size=2, gradient_accumulation_steps=2)


def test_what_other_ranks_cannot_go_on_with_is_refused(tmp_path):
    with pytest.raises(UserError, match="a single process is enough: deepspeed --num_gpus 1"):
        resumable(tmp_path, 2, 1, launched=False, gradient_accumulation_steps=2)
    with pytest.raises(UserError, match=r"optim adamw_8bit.* cannot be divided otherwise: start 2"):
        resumable(tmp_path, 2, 1, gradient_accumulation_steps=2, optim="adamw_8bit")
