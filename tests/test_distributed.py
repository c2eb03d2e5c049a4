import os
import time

from rlhf import distributed
from rlhf.distributed import is_abandoned, wait_for_compilers


def aged(path, seconds):
    """A file that was last changed so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_a_compile_lock_is_abandoned_when_nobody_holds_it_and_nothing_changes(tmp_path):
    lock = aged(tmp_path / "operator" / "lock", 3600)
    assert is_abandoned(lock)
    with open(lock):  # the process that compiles keeps it open
        assert not is_abandoned(lock)
    built = aged(tmp_path / "operator" / "part.o", 5)  # another machine compiles
    assert not is_abandoned(lock)
    aged(built, 3600)
    assert is_abandoned(lock)
    assert not is_abandoned(aged(lock, 5))


def test_the_lock_of_a_killed_compilation_is_removed_with_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    old = aged(tmp_path / "operator" / "lock", 3600)
    wait_for_compilers(local_rank=0)
    assert not old.exists()
    assert f"{old}: removed; the process that compiled there was killed" in capsys.readouterr().out


def test_a_lock_in_use_is_waited_for_with_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = aged(tmp_path / "operator" / "lock", 0)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            lock.unlink()  # it has ended

    monkeypatch.setattr(distributed.time, "sleep", sleep)
    wait_for_compilers(local_rank=0)
    assert len(waits) == 3
    assert capsys.readouterr().out.count("waiting for the process that compiles there") == 1
