"""Whose options a file holds."""

import re

import pytest

from rlhf.errors import UserError
from rlhf.options.programs import programs_of
from tests.conftest import ROOT


def test_a_file_is_for_the_program_that_knows_its_options_or_that_it_is_named_after(tmp_path):
    configs = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/8b/*.yaml")]
    assert len(configs) > 4
    for path in configs:
        assert programs_of(str(path)) == [re.match("sft|reward|dpo|ppo", path.name)[0]]
    file = tmp_path / "mine.yaml"
    # PPO alone knows kl_coef, and a slip of the pen is no other program's option
    file.write_text("data: x\nkl_coef: 0.1\nlora_rr: 4\noutput_dir: y\n")
    assert programs_of(str(file)) == ["ppo"]
    file.write_text("data: x\noutput_dir: y\n")
    assert programs_of(str(file)) == ["sft", "reward", "dpo", "ppo"]


def test_a_file_of_another_kind_is_refused_with_what_it_holds(tmp_path):
    file = tmp_path / "other.yaml"
    for text, found in (
        ("methods: {}\nseeds: [0]\nguide: x", "the file of an experiment (rlhf experiment run)"),
        ("voice: a.yaml\nstore: b.db\nseed: 1", "voice, store, seed"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=f"sft, reward, dpo, ppo\\), found {re.escape(found)}$"):
            programs_of(str(file))
    # no more unknown names than known ones
    file.write_text("voice: a.yaml\nseed: 1")
    assert len(programs_of(str(file))) == 4
