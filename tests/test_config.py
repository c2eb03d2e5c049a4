import dataclasses
import errno
import importlib
import os
import pkgutil
import re
import typing
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml

import rlhf
from rlhf.config import SEED, option, parse, save_options
from rlhf.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, EarlyExit, UserError
from rlhf.options.offline import SFTRunConfig
from rlhf.options.ppo import PPOConfig
from rlhf.program import program


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
    file.write_text(
        "output_dir: x\nkl_coef: 3e-6\nsteps: 4\ndata: [a, b]\nreward:\n  - {model: r}\n"
    )
    config = parse(Config, ["--steps", "7", "--config", str(file), "--whiten", "--target=1"])
    assert (config.output_dir, config.kl_coef, config.steps, config.whiten) == ("x", 3e-6, 7, True)
    assert config.data == ["a", "b"] and config.target == 1.0 and config.reward == [{"model": "r"}]


def test_flags_of_every_type():
    flags = [
        "--output_dir=x",
        "--whiten",
        "false",
        "--data",
        "a,b",
        "--target",
        "none",
        "--stage",
        "zero0",
    ]
    config = parse(Config, [*flags, "--reward", "[{voice: v.yaml, weight: 0.5}]", "--local_rank=0"])
    assert (
        config.whiten is False
        and config.data == ["a", "b"]
        and config.target is None
        and config.stage == "zero0"
    )
    assert config.reward == [{"voice": "v.yaml", "weight": 0.5}]


def test_what_is_saved_is_a_config(tmp_path):
    first = parse(Config, ["--output_dir", "x", "--kl_coef", "1e-5", "--data", "a"])
    save_options(first, tmp_path / "config.yaml")
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
        (["word"], "found 'word' where an option was expected"),
        (["--reward", "[3]"], "item 1: expected a mapping"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(flags, text):
    with pytest.raises(UserError) as error:
        parse(Config, ["--output_dir", "x", *flags], "deepspeed launch/ppo.py")
    assert text in str(error.value)


@pytest.mark.parametrize(
    "content,text",
    [
        (
            "kl_beta: 1\n",
            "a.yaml: unknown option 'kl_beta'. Did you mean 'kl_coef'? All options: prog --help",
        ),
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


def help_of(cls, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(cls, ["--help"], "prog")
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_says_type_default_and_what_a_resumed_run_may_change(capsys):
    text = " ".join(help_of(Config, capsys).split())
    assert "--kl_coef <a number> weight of the KL (default: 0.05)." in text
    assert "--output_dir <text> where (required)." in text
    assert text.count("how many (default: 10). A resumed run may change it.") == 1
    assert text.count("A resumed run may change it.") == 1


@dataclass(kw_only=True)
class Common:
    """What all share.

    More about it.
    """

    rate: float = option(0.5, "50 % of it")
    seed: int = option(0, "the seed")


@dataclass(kw_only=True)
class Special(Common):
    """One program."""

    size: int = option(1, "how much")
    rate: float = option(0.1, "less of it")


def test_help_groups_options_by_the_class_that_declares_them(capsys):
    own, common = help_of(Special, capsys).split("What all share:")
    assert "--size" in own and "--rate" not in own
    assert "--seed" in common and "less of it (default: 0.1)" in common
    assert "50 % of it (default: 0.5)" in help_of(Common, capsys)


def test_a_user_error_becomes_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        program(lambda: parse(Config, ["--stepz", "3"], "prog"))()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: the command line: unknown option 'stepz'. Did you mean 'steps'?"
    )


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
        raise EarlyExit("saved", EXIT_INTERRUPTED)

    for rank, said in (("0", "saved\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == EXIT_INTERRUPTED and capsys.readouterr().out == said


def option_classes() -> list[type]:
    """Every dataclass with options."""
    modules = [
        importlib.import_module(m.name) for m in pkgutil.walk_packages(rlhf.__path__, "rlhf.")
    ]
    found = {
        c
        for m in modules
        for c in vars(m).values()
        if isinstance(c, type) and dataclasses.is_dataclass(c)
    }
    return [c for c in found if any("resume" in f.metadata for f in dataclasses.fields(c))]


SIGNED = {"length_penalty", "missing_eos_score"}  # scores, of which any finite one makes sense


def test_every_option_that_is_a_number_has_a_range():
    classes = option_classes()
    assert {"PPOConfig", "SFTRunConfig", "RewardRunConfig", "DPORunConfig"} <= {
        c.__name__ for c in classes
    }
    open_ended = set()
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            numeric = any(
                kind in (int, float)
                for kind in (hints[field.name], *typing.get_args(hints[field.name]))
            )
            bounds = field.metadata["bounds"]
            if numeric and bounds["low"] is None and bounds["above"] is None:
                open_ended.add(field.name)
    assert open_ended == SIGNED


@dataclass
class Bounded:
    output_dir: str = option("out", "where")
    data: list[str] = option(["a"], "files")
    rate: float = option(0.5, "a step size", above=0, high=1)
    dropout: float = option(0.0, "a share", low=0, below=1)
    seed: int = option(0, "of all", **SEED)
    score: float | None = option(None, "any")
    temperature: list[float] = option([1.0], "some", above=0)
    reward: list[dict] = option([], "scorers")
    trl: dict = option({}, "more")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--rate=-1", "'rate' is -1.0, expected more than 0 and at most 1"),
        ("--rate=nan", "'rate' is nan, expected more than 0 and at most 1"),
        ("--rate=1e30", r"'rate' is 1e\+30, expected more than 0 and at most 1"),
        ("--dropout=1", "'dropout' is 1.0, expected at least 0 and less than 1"),
        ("--seed=-1", "'seed' is -1, expected at least 0 and at most 4294967295"),
        (f"--seed={2**70}", f"'seed' is {2**70}, expected at least 0"),
        ("--score=inf", "'score' is inf, expected finite numbers"),
        ("--score=nan", "'score' is nan, expected finite numbers"),
        ("--temperature=1,0", "'temperature' is 0.0, expected more than 0"),
        ("--temperature=1,inf", r"'temperature' is \[1.0, inf\], expected finite numbers"),
        (
            "--reward=[{rule: length, low: .nan}]",
            "'reward' is .*'low': nan.*, expected finite numbers",
        ),
        ("--trl={adam: [0.9, .inf]}", r"'trl' is {'adam': \[0.9, inf\]}, expected finite numbers"),
        ("--output_dir=", "'output_dir' is '', expected text that is not empty"),
        ("--data=a,", r"'data' is \['a', ''\], expected text that is not empty"),
    ],
)
def test_a_value_that_no_option_allows_is_refused_by_name(flag, said):
    with pytest.raises(UserError, match=said):
        parse(Bounded, [flag])


def test_items_of_a_list_on_the_command_line_are_stripped():
    assert parse(Bounded, ["--data", "q_proj, v_proj ,o_proj"]).data == [
        "q_proj",
        "v_proj",
        "o_proj",
    ]
    assert parse(Bounded, ["--temperature", "0.5, 1"]).temperature == [0.5, 1.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rate: 0.1\nrate: 0.2\n", "a.yaml line 2: not valid YAML: 'rate' is given twice"),
        ("trl: {a: 1, a: 2}\n", "a.yaml line 1: not valid YAML: 'a' is given twice"),
        ("trl: " + "[" * 20_000 + "]" * 20_000, "a.yaml: not usable YAML: nested too deeply"),
    ],
)
def test_yaml_that_says_two_things_or_is_bottomless_is_refused(tmp_path, text, said):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        parse(Bounded, ["--config", str(tmp_path / "a.yaml")])


def test_yaml_on_the_command_line_is_refused_with_its_option():
    with pytest.raises(UserError, match=r"option '--trl' line 1: not valid YAML"):
        parse(Bounded, ["--trl={a: ["])


def raised(number: int, name: str | None = None) -> OSError:
    return (
        OSError(number, os.strerror(number), name) if name else OSError(number, os.strerror(number))
    )


def test_a_library_that_an_extra_installs_is_named_with_the_extra(capsys):
    @program
    def main():
        raise ModuleNotFoundError("No module named 'starlette'", name="starlette")

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == EXIT_USER_ERROR
    assert (
        "'starlette' is not installed. Install it with: pip install 'rlhf[collect]'"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (raised(errno.ENOSPC), "out: No space left on device. Free some space"),
        (
            raised(errno.EROFS, "/mnt/x"),
            "/mnt/x: Read-only file system. Choose a place that can be written",
        ),
        (raised(errno.EACCES, "/srv/x"), "/srv/x: Permission denied. Choose a place"),
        (
            raised(errno.EEXIST, "afile"),
            "afile: File exists. A file stands where a folder has to be",
        ),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0"),
            "out: could not be written completely",
        ),
        (RuntimeError("basic_ios::clear: iostream error"), "out: could not be written completely"),
        (
            Exception("I/O error: No space left on device (os error 28)"),
            "out: No space left on device",
        ),
    ],
)
def test_a_disk_that_is_full_or_closed_is_one_message_with_the_place(error, said, capsys):
    @program
    def main():
        parse(Bounded, [])
        raise error

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == EXIT_USER_ERROR and f"error: {said}" in capsys.readouterr().err


def test_an_error_of_the_program_itself_keeps_its_traceback():
    @program
    def main():
        raise RuntimeError("a bug") from OSError(errno.ENOENT, "no such file")

    with pytest.raises(RuntimeError, match="a bug"):
        main()


def test_a_bug_met_while_a_disk_error_is_handled_keeps_its_traceback():
    @program
    def main():
        try:
            raise raised(errno.EACCES, "/srv/x")
        except OSError:
            {}["a bug"]

    with pytest.raises(KeyError, match="a bug"):
        main()


def sft(**more) -> list[str]:
    values = {"model_name_or_path": "base", "data": "d.jsonl", "output_dir": "out"} | more
    return [f"--{name}={value}" for name, value in values.items()]


def test_an_output_dir_holds_nothing_that_the_run_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ppo = PPOConfig
    for file in (
        "runs/sft/checkpoints/checkpoint-3/x",
        "runs/rm/x",
        "runs/data/votes.db",
        "elsewhere.jsonl",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    reads = {
        "output_dir": "runs/sft",
        "reward": "[{model: runs/rm}]",
        "overwrite_output_dir": "true",
    }
    start = "runs/sft/checkpoints/checkpoint-3"
    for more, said in (
        (
            {"model_name_or_path": "runs/sft"},
            "'model_name_or_path' reads runs/sft, which is inside output_dir runs/sft",
        ),
        ({"model_name_or_path": str(tmp_path / "runs/../runs/sft")}, "'model_name_or_path' reads"),
        ({"model_name_or_path": start}, "'model_name_or_path' reads"),
        ({"output_dir": "runs/rm"}, "'reward' reads runs/rm"),
        (
            {"reward": "[{ensemble: [runs/a, runs/rm]}]", "output_dir": "runs/rm"},
            "'reward' reads runs/rm",
        ),
        (
            {"data": "elsewhere.jsonl,runs/data/votes.db@118", "output_dir": "runs/data"},
            "'data' reads runs/data/votes.db@",
        ),
    ):
        with pytest.raises(UserError, match=said):
            parse(ppo, sft(**(reads | more)))
    apart = reads | {
        "model_name_or_path": "runs/sft",
        "output_dir": "runs/sft/ppo",
        "data": "elsewhere.jsonl",
    }
    assert parse(ppo, sft(**apart)).output_dir == "runs/sft/ppo"
    resumed = reads | {"resume": start, "model_name_or_path": "base"}
    assert parse(ppo, sft(**resumed)).resume == start  # that of its own


def test_an_output_dir_that_cannot_be_a_folder_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    config = SFTRunConfig
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match=f"{place}': .*file is not a folder"):
            parse(config, sft(output_dir=tmp_path / place))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match=r"cannot be written\. Choose another --output_dir"):
        parse(config, sft(output_dir=tmp_path / "new"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="'max_steps' is 0"):
        parse(config, sft(output_dir=tmp_path / "new", max_steps=0))


def test_a_value_out_of_range_is_named_with_the_place_that_gave_it(tmp_path):
    from rlhf.options.shared import RunConfig

    (tmp_path / "x.yaml").write_text(
        "model_name_or_path: m\ndata: [d]\noutput_dir: o\nlearning_rate: -2\n"
    )
    with pytest.raises(UserError, match=rf"^{tmp_path}/x.yaml: 'learning_rate' is -2"):
        parse(RunConfig, ["--config", str(tmp_path / "x.yaml")])
    with pytest.raises(UserError, match=r"^--learning_rate: 'learning_rate' is -1"):
        parse(RunConfig, ["--config", str(tmp_path / "x.yaml"), "--learning_rate", "-1"])


def test_an_option_is_still_read_under_its_old_name(tmp_path):
    from rlhf.options.shared import RunConfig

    (tmp_path / "x.yaml").write_text(
        "model_name_or_path: m\ndata: [d]\noutput_dir: o\non_bad: skip\n"
    )
    assert parse(RunConfig, ["--config", str(tmp_path / "x.yaml")]).on_error == "skip"
    assert (
        parse(RunConfig, ["--config", str(tmp_path / "x.yaml"), "--on_bad", "stop"]).on_error
        == "stop"
    )


def test_an_option_under_both_its_names_is_refused(tmp_path):
    from rlhf.options.shared import RunConfig

    path = tmp_path / "x.yaml"
    path.write_text("on_bad: skip\non_error: stop\n")
    with pytest.raises(
        UserError, match=r"x\.yaml: 'on_bad' is the old name of 'on_error': give one of them"
    ):
        parse(RunConfig, ["--config", str(path)])


def test_a_run_that_was_made_under_an_old_name_is_compared_under_the_new_one(tmp_path):
    from rlhf.options.shared import RunConfig
    from rlhf.runs.start import check_fixed

    config = parse(RunConfig, sft(output_dir=tmp_path / "out"))
    check_fixed(config, {"on_bad": "stop"}, "x")
    with pytest.raises(UserError, match="on_error: was 'skip', now 'stop'"):
        check_fixed(config, {"on_bad": "skip"}, "x")
