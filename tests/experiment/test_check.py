"""What is found wrong before anything is started."""

import pytest

from rlhf.config import UserError
from rlhf.experiment.check import check_decisions, check_programs
from rlhf.experiment.execute import last_error
from tests.experiment.example import experiment, method


@pytest.mark.parametrize(
    "spec,message",
    [
        (method(strength={"beat": [0.1]}), r"methods: 'dpo': unknown option 'beat'. Did you mean 'beta'\?"),
        (method(options={"lerning_rate": 1, "max_steps": 40}), "methods: 'dpo': unknown option 'lerning_rate'"),
        (method(options={"loss_type": ["ipoo"], "max_steps": 40}), "methods: 'dpo': .*'ipoo' is none of TRL's"),
        (method("ppo", options={"advantage_estimator": "rlo"}), "methods: 'dpo': .*expected one of gae, rloo"),
    ],
)
def test_every_command_is_read_as_its_program_will(tmp_path, spec, message):
    check_programs(experiment(tmp_path))
    with pytest.raises(UserError, match=message):
        check_programs(experiment(tmp_path, methods={"dpo": spec}))


def test_a_part_that_is_no_method_is_named(tmp_path):
    with pytest.raises(UserError, match="seed-0/reward: unknown option 'epochs'"):
        check_programs(experiment(tmp_path, reward={"options": {"epochs": 1}}))


def test_what_a_method_learns_from_cannot_decide(tmp_path):
    check_decisions(experiment(tmp_path, launcher="python"))
    voice = {"voice": str(tmp_path / "voice.yaml")}
    learns = {"ppo": method("ppo", options={"reward": [voice]})}
    with pytest.raises(UserError, match=r"gold .*'ppo' learns from it, so it cannot decide"):
        check_decisions(experiment(tmp_path, methods=learns, launcher="python"))
    watches = {"ppo": method("ppo", options={"reward": [{"model": "{reward}"}, voice | {"weight": 0}]})}
    check_decisions(experiment(tmp_path, methods=watches, launcher="python"))


def test_a_judge_and_a_launcher_that_are_not_there_are_found_at_once(tmp_path):
    with pytest.raises(UserError, match="there is no program 'deepsped'"):
        check_decisions(experiment(tmp_path, launcher="deepsped --num_gpus 8"))
    with pytest.raises(UserError, match=r"judge: function 'prefer' should be written module:function"):
        check_decisions(experiment(tmp_path, judge={"function": "prefer"}, launcher="python"))


def test_one_number_is_no_count_of_seeds(tmp_path):
    with pytest.raises(UserError, match=r"the one seed 5: for as many seeds write \[0, 1, ..., 4\]"):
        experiment(tmp_path, seeds=[5])


def test_the_last_error_of_a_log_is_repeated(tmp_path):
    log = tmp_path / "x.log"
    assert last_error(log) == ""
    log.write_text("begins\nerror: the first\n$ again\nerror: the last\nProcess exits with 2\n")
    assert last_error(log) == ": error: the last"
