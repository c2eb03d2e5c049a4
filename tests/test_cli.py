"""The shell of `rlhf`: help, groups, version, renamed commands, words without a flag."""

import dataclasses
import pkgutil

import pytest

import rlhf
from rlhf.cli import RENAMED, main
from rlhf.commands import COMMANDS


def printed(capsys, *argv: str) -> str:
    main(list(argv))
    return capsys.readouterr().out


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(argv, capsys):
    text = printed(capsys, *argv)
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("argv", [("data",), ("data", "--help"), ("data", "-h")])
def test_a_group_lists_its_own_commands(argv, capsys):
    text = printed(capsys, *argv)
    assert "data show" in text and "data export" in text and "collect" not in text


def test_version(capsys):
    assert printed(capsys, "--version") == f"rlhf {rlhf.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_options_help_and_something_to_run(name, capsys):
    options = pkgutil.resolve_name(COMMANDS[name].options)
    words = COMMANDS[name].words
    assert words in (None, "config") or words in {
        field.name for field in dataclasses.fields(options)
    }
    with pytest.raises(SystemExit) as stopped:
        main([*name.split(), "--help"])
    assert stopped.value.code == 0 and f"usage: rlhf {name} " in capsys.readouterr().out


def test_what_is_run_lazily_is_there(monkeypatch):
    """Every target of `lazily` can be imported, and is called with the options; so can what
    it is handed."""
    targets = []

    def recorded(target):
        def run(given, *handed):
            targets.append((target, given))
            for function in handed:
                function(given)

        return run

    monkeypatch.setattr(pkgutil, "resolve_name", recorded)
    lazy = {
        name: command for name, command in COMMANDS.items() if command.run.__name__ == "<lambda>"
    }
    for name, command in lazy.items():
        command.run(name)
    monkeypatch.undo()
    assert list(dict.fromkeys(config for _, config in targets)) == list(lazy)
    assert all(callable(pkgutil.resolve_name(target)) for target, _ in targets)


def test_renamed_commands_name_the_new_one(capsys):
    for old, new in RENAMED.items():
        assert f"'rlhf {old}' is now: rlhf {new} x.yaml --redo" in refused(
            capsys, *old.split(), "x.yaml", "--redo"
        )
    assert "rlhf experiment run x.yaml" in refused(capsys, "compare", "x.yaml")


def test_a_run_may_be_called_as_an_old_command(capsys, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "'prompts' not given" in refused(capsys, "compare", "run", "other")


@pytest.mark.parametrize(
    "name,before",
    [
        ("collect serve", "STORE"),
        ("compare", "RUNS ..."),
        ("doctor", "[RUN_CONFIG]"),
        ("experiment run", "CONFIG"),
        ("sandbox build", "[--config FILE]"),
    ],
)
def test_help_shows_the_words_before_the_flags_or_the_file(name, before, capsys):
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    assert capsys.readouterr().out.startswith(f"usage: rlhf {name} {before} [--option VALUE ...]")


def test_one_word_is_wanted_where_one_is_taken(capsys):
    said = refused(capsys, "collect", "serve", "a.db", "b.db", "--port", "80")
    assert said == "error: 'rlhf collect serve' takes one 'store', found 2: a.db, b.db\n"


def test_a_programs_file_after_config_says_where_it_belongs(capsys):
    said = refused(capsys, "doctor", "--config", "configs/ppo.yaml")
    assert "unknown option 'model_name_or_path'" in said
    assert said.endswith("For a program's file: rlhf doctor FILE\n")


def test_a_command_without_what_it_works_on_says_so(capsys):
    assert "'rlhf experiment run' needs its 'config': rlhf experiment run CONFIG (" in refused(
        capsys, "experiment", "run"
    )


def test_unknown_commands_name_the_nearest(capsys):
    assert "unknown command 'bogus'. All" in refused(capsys, "bogus", "--help")
    assert "unknown command 'data shwo'. Did you mean 'data show'?" in refused(
        capsys, "data", "shwo"
    )
    assert "All commands: rlhf --help" in refused(capsys, "frobnicate", "x")


def test_words_before_the_first_flag_fill_an_option(monkeypatch):
    seen = []
    command = dataclasses.replace(COMMANDS["compare"], run=seen.append, loads_models=False)
    monkeypatch.setitem(COMMANDS, "compare", command)
    main(["compare", "a", "b", "--prompts", "p.jsonl", "--seed", "1"])
    assert (seen[0].runs, seen[0].prompts, seen[0].seed) == (["a", "b"], ["p.jsonl"], 1)
