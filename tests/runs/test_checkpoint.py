import json
import random

import numpy
import pytest
import torch

from rlhf.ranks.distributed import DistributedContext
from rlhf.runs import checkpoint
from rlhf.runs.checkpoint import CorruptCheckpoint, archive, check, newest, prune, seal, write


def make(root, step, score=None):
    def fill(folder):
        (folder / "part").mkdir()
        (folder / "part" / "a.bin").write_bytes(bytes([step] * 8))

    return write(root, step, DistributedContext(), fill, lambda: {"score": score})


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path):
    make(tmp_path, 3, 0.5)
    found = check(tmp_path / "step-000003")
    assert (found.step, found.metadata) == (3, {"score": 0.5})
    manifest = json.loads((found.folder / "manifest.json").read_text())
    # sha256 of eight bytes 0x03, by sha256sum
    assert manifest["files"]["part/a.bin"][0] == 8
    assert set(manifest["files"]) == {"part/a.bin", "random-0.pt"}


def edit(folder, **changed):
    """Rewrite entries of a manifest, as a fault would that leaves valid JSON."""
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


@pytest.mark.parametrize(
    "harm,words",
    [
        (lambda f: (f / "part/a.bin").unlink(), "part/a.bin is missing"),
        (lambda f: (f / "part/a.bin").write_bytes(b"123"), "has 3 bytes, the manifest says 8"),
        (lambda f: (f / "part/a.bin").write_bytes(b"12345678"), "its hash differs"),
        (lambda f: (f / "manifest.json").unlink(), "never finished"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "not what was written"),
        (lambda f: edit(f, about=None), "not what was written"),
        (lambda f: edit(f, about={"score": 1.0}), "not what was written"),
        (lambda f: edit(f, files={"part/a.bin": None}), "not what was written"),
        (lambda f: edit(f, sha256=None, step=7), "not what was written"),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, harm, words):
    make(tmp_path, 1)
    make(tmp_path, 2)
    harm(tmp_path / "step-000002")
    with pytest.raises(CorruptCheckpoint, match=words):
        check(tmp_path / "step-000002")
    said = []
    assert newest(tmp_path, said.append).step == 1
    assert len(said) == 1 and "step-000002" in said[0] and words in said[0]


@pytest.mark.parametrize("text", ["{", "null", '{"about": null}'])
def test_a_garbage_manifest_in_an_older_checkpoint_stops_no_later_one(tmp_path, text):
    for step in (1, 2, 3):
        make(tmp_path, step, float(step))
    (tmp_path / "step-000001" / "manifest.json").write_text(text)
    prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_a_manifest_without_its_digest_is_read(tmp_path):
    make(tmp_path, 1)
    edit(tmp_path / "step-000001", sha256=None)
    assert check(tmp_path / "step-000001").step == 1


def test_newest_of_both_names_by_number_and_before_a_step(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        seal(tmp_path / f"checkpoint-{step}", step, {})
    assert newest(tmp_path, print).step == 10
    assert newest(tmp_path, print, before=10).step == 2
    assert newest(tmp_path, print, before=2) is None
    assert newest(tmp_path / "nothing", print) is None


def test_the_newest_and_the_best_stay(tmp_path):
    for step, score in ((1, 0.1), (2, 0.9), (3, None), (4, 0.3), (5, 0.2)):
        make(tmp_path, step, score)
    (tmp_path / "writing-000006").mkdir()
    prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-000002",
        "step-000004",
        "step-000005",
    ]


def test_of_two_best_the_later_stays(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step, 0.5 if step < 3 else None)
    prune(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_another_course_sets_the_later_ones_aside(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    archive(tmp_path, 2)
    assert newest(tmp_path, print).step == 1
    make(tmp_path, 2)
    assert newest(tmp_path, print).step == 2
    prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_the_same_step_again_replaces_it_whole(tmp_path):
    make(tmp_path, 2, 0.1)
    make(tmp_path, 2, 0.2)
    assert check(tmp_path / "step-000002").metadata == {"score": 0.2}


def test_random_state_goes_on_where_it_was(tmp_path):
    def draw():
        return random.random(), float(numpy.random.random()), float(torch.rand(()))

    draw()
    checkpoint.write_random_state(tmp_path / "r.pt")
    first = draw()
    draw()
    checkpoint.read_random_state(tmp_path / "r.pt")
    assert draw() == first


def test_a_score_that_is_no_number_elects_nothing(tmp_path):
    for step, score in ((1, -0.5), (2, -0.9), (3, float("nan"))):
        make(tmp_path, step, score)
    prune(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000003"]


def test_one_that_was_sealed_and_not_renamed_is_whole(tmp_path, monkeypatch):
    """A crash between the two renames that put a new checkpoint in the place of one of the same
    step.
    """
    make(tmp_path, 2, 0.1)

    def crash(where):
        if where == "set aside":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "crash_point", crash)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 2, 0.2)
    found = newest(tmp_path, print)
    assert (found.step, found.metadata) == (2, {"score": 0.2})


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "my-favourite").mkdir()
    make(tmp_path, 1)
    prune(tmp_path, 1)
    assert (tmp_path / "my-favourite").is_dir()
