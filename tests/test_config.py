import re
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml

from rlhf.config import EXIT_INTERRUPTED, Halt, UserError, help_text, option, parse, program, save


@dataclass
class Config:
    """A few options."""

    output_dir: str = option(help="where")
    kl_coef: float = option(0.05, "weight of the KL")
    steps: int = option(10, "how many", resume="free")
    whiten: bool = option(True, "or not")
    stage: Literal["zero0", "zero2"] = option("zero2", "which")
    data: list[str] = option([], "files")
    target: float | None = option(None, "or none")
    reward: list[dict] = option([], "scorers")

    def validate(self):
        if self.steps < 1:
            raise UserError("'steps' must be at least 1")


def test_yaml_is_flags_written_down_and_flags_win(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("output_dir: x\nkl_coef: 3e-6\nsteps: 4\ndata: [a, b]\nreward:\n  - {model: r}\n")
    config = parse(Config, ["--steps", "7", "--config", str(file), "--whiten", "--target=1"])
    assert (config.output_dir, config.kl_coef, config.steps, config.whiten) == ("x", 3e-6, 7, True)
    assert config.data == ["a", "b"] and config.target == 1.0 and config.reward == [{"model": "r"}]


def test_flags_of_every_type():
    flags = ["--output_dir=x", "--whiten", "false", "--data", "a,b", "--target", "none", "--stage", "zero0"]
    config = parse(Config, [*flags, "--reward", "[{voice: v.yaml, weight: 0.5}]", "--local_rank=0"])
    assert config.whiten is False and config.data == ["a", "b"] and config.target is None and config.stage == "zero0"
    assert config.reward == [{"voice": "v.yaml", "weight": 0.5}]


def test_what_is_saved_is_a_config(tmp_path):
    first = parse(Config, ["--output_dir", "x", "--kl_coef", "1e-5", "--data", "a"])
    save(first, tmp_path / "config.yaml")
    assert parse(Config, ["--config", str(tmp_path / "config.yaml")]) == first
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["kl_coef"] == 1e-5


@pytest.mark.parametrize(
    "flags,text",
    [
        (["--kl_beta", "1"], "unknown option 'kl_beta'. Did you mean 'kl_coef'?"),
        (["--steps", "ten"], "option '--steps': expected a whole number, found 'ten'"),
        (["--steps", "1.5"], "expected a whole number, found '1.5'"),
        (["--kl_coef", "high"], "option '--kl_coef': expected a number, found 'high'"),
        (["--whiten", "maybe"], "expected true or false, found 'maybe'"),
        (["--stage", "zero1"], "expected one of zero0, zero2. Did you mean"),
        (["--steps", "0"], "'steps' must be at least 1"),
        (["--steps"], "option '--steps' needs a value"),
        (["word"], "'word' stands where an option was expected"),
        (["--reward", "[3]"], "item 0: expected a mapping"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(flags, text):
    with pytest.raises(UserError) as error:
        parse(Config, ["--output_dir", "x", *flags], "deepspeed launch/ppo.py")
    assert text in str(error.value)


@pytest.mark.parametrize(
    "content,text",
    [
        ("kl_beta: 1\n", "a.yaml: unknown option 'kl_beta'. Did you mean 'kl_coef'? All options: prog --help"),
        ("steps: true\n", "a.yaml: option 'steps': expected a whole number, found True"),
        ("kl_coef: [1]\n", "a.yaml: option 'kl_coef': expected a number, found [1]"),
        ("- 1\n", "a.yaml: expected 'option: value' lines, found list"),
        ("a: b: c\n", "a.yaml line 1: not valid YAML"),
        ("steps: 0\noutput_dir: x\n", "a.yaml: 'steps' must be at least 1"),
        ("steps: 1\n", "a.yaml: 'output_dir' not given"),
    ],
)
def test_what_is_wrong_in_a_file_names_the_file(tmp_path, content, text):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        parse(Config, ["--config", str(tmp_path / "a.yaml")], "prog")
    assert text in str(error.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "ppo.yaml").write_text("")
    with pytest.raises(UserError, match=r"pop.yaml: no such file. Did you mean .*ppo.yaml\?"):
        parse(Config, ["--config", str(tmp_path / "pop.yaml")], "prog")


def test_help_says_type_default_and_what_a_resumed_run_may_change():
    text = help_text(Config, "prog")
    assert "--kl_coef  a number = 0.05" in text and "--output_dir  text = required" in text
    assert text.count("A resumed run may change it.") == 1


def test_a_user_error_becomes_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        program(lambda: parse(Config, ["--stepz", "3"], "prog"))()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: the command line: unknown option 'stepz'. Did you mean 'steps'?")


@dataclass
class Ranged:
    share: float = option(0.5, "a share", low=0, high=1)
    rate: float | None = option(None, "a rate", above=0)
    count: int = option(1, "a count", low=1)


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--share", "1.5"], "'share' is 1.5, expected at least 0 and at most 1"),
        (["--share", "nan"], "'share' is nan"),
        (["--rate", "0"], "'rate' is 0.0, expected more than 0"),
        (["--count", "0"], "'count' is 0, expected at least 1"),
    ],
)
def test_a_number_out_of_its_range_is_refused(flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse(Ranged, flags, "x")
    assert parse(Ranged, ["--share", "1", "--rate", "none"], "x").share == 1.0


def test_a_halt_ends_with_its_code_and_speaks_once(monkeypatch, capsys):
    @program
    def main():
        raise Halt("saved", EXIT_INTERRUPTED)

    for rank, said in (("0", "saved\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == EXIT_INTERRUPTED and capsys.readouterr().out == said
