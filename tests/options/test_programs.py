"""Whose options a file holds."""

import re

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
