"""Each fault of tests/faults/table.py ends with one message that has its place and its remedy, exit
code 2, and everything that was there before untouched.

    python -m benchmarks.faults.cost PAGE                the CPU seconds of each, as processes of their own
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli import main as rlhf
from tests.conftest import ROOT
from tests.faults.table import FAULTS, WHOLE, Fault, arguments, command
from tests.launch.conftest import door


@pytest.fixture(scope="module")
def folder(base_path, sft_path, reward_path, tmp_path_factory) -> Path:
    """A folder with all that is broken, and a finished run, `earlier`."""
    from tests.faults.broken import build

    folder = tmp_path_factory.mktemp("faults")
    build(folder, base_path, sft_path, reward_path)
    before = Path.cwd()
    os.chdir(folder)
    try:
        door("sft")([*shlex.split(WHOLE["sft"]), "--output_dir", "earlier"])
    finally:
        os.chdir(before)
    shutil.copy(folder / "rows.jsonl", folder / "earlier")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file in a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def whole(folder) -> dict[str, str]:
    return contents(folder)


def run(given: Fault) -> int:
    """Run a fault in this process, in the working directory; return its exit code."""
    main = rlhf if given.program == "rlhf" else door(given.program)
    with pytest.raises(SystemExit) as ended:
        main(arguments(given))
    return ended.value.code


def message_of(said: str) -> str:
    """Return the one message in what was printed."""
    messages = re.findall(r"^error(?: on rank \d+)?: .*", said, re.MULTILINE | re.DOTALL)
    assert len(messages) == 1 and "Traceback" not in said, said
    return messages[0]


@pytest.mark.parametrize("given", FAULTS, ids=lambda given: given.name)
def test_a_fault_is_one_message_with_exit_code_2_and_nothing_is_lost(
    folder, whole, monkeypatch, capsys, given
):
    monkeypatch.chdir(folder)
    for name, value in given.environment.items():
        monkeypatch.setenv(name, value)
    # between the attempts to reach a server that is not there
    monkeypatch.setattr("rlhf.http_client.FIRST_WAIT", 0.0)
    code = run(given)

    message = message_of(capsys.readouterr().err)
    assert code == 2, message
    missing = [word for word in given.words if word not in message]
    assert not missing, message
    # of a run that had begun
    shutil.rmtree(folder / "out", ignore_errors=True)
    now = contents(folder)
    changed = [name for name in whole if now.get(name) != whole[name]]
    assert not changed, f"{message}\nchanged: {changed}"
    assert now.keys() == whole.keys(), f"{message}\nwritten: {now.keys() - whole.keys()}"


def test_what_is_seen_without_torch_is_refused_before_it_is_imported(folder):
    code = """
import os, sys
from rlhf import http_client
from tests.faults import test_faults as faults

http_client.FIRST_WAIT = 0.0
for given in faults.FAULTS:
    if not given.loads:
        os.environ.update(given.environment)
        assert faults.run(given) == 2
        assert "torch" not in sys.modules, given.name
        for name in given.environment:
            del os.environ[name]
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


SAMPLE = (
    "sft --model_name_or_path ./modl",
    "reward --data garbage.db",
    "dpo --model_name_or_path a-prefix_tuning",
    "ppo --reward [{model: sft}]",
    "rlhf chat ./nope",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_processes_end_as_calls_do(folder, name):
    [given] = [given for given in FAULTS if given.name == name]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command(given), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
    assert all(word in message_of(done.stderr) for word in given.words)


def test_debug_shows_where_an_error_was_raised(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    [given] = [given for given in FAULTS if given.name == SAMPLE[0]]
    with pytest.raises(SystemExit) as ended:
        door("sft")([*arguments(given), "--debug"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "in check_model" in said and "\nerror: ./modl: no such" in said


def test_there_are_at_least_80_faults_over_all_programs():
    assert len({given.name for given in FAULTS}) == len(FAULTS) >= 80
    assert {given.program for given in FAULTS} == {*WHOLE, "rlhf"}
