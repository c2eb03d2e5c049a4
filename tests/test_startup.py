"""How a program starts: garbage while importing, and threads by the size of the model."""

import gc
import os
import subprocess
import sys

import pytest
import torch

from rlhf import startup
from rlhf.program import program


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    threads = torch.get_num_threads()
    # put back when the test ends
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)
    gc.unfreeze()
    startup.end()


def of_size(parameters: int) -> torch.nn.Module:
    return torch.nn.Linear(parameters, 1, bias=False, device="meta")


@pytest.mark.parametrize(
    ("parameters", "is_chosen", "expected"),
    [(500_000, False, 1), (1_999_999, False, 1), (2_000_000, False, 2), (500_000, True, 2)],
)
def test_a_small_model_takes_one_thread_unless_threads_are_chosen(
    monkeypatch, parameters, is_chosen, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(startup, "THREADS_ARE_CHOSEN", is_chosen)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    startup.model_loaded(of_size(parameters))
    assert torch.get_num_threads() == expected
    # for a library that would choose again
    assert os.environ["OMP_NUM_THREADS"] == str(expected)


def test_garbage_waits_while_importing_and_not_after_the_model_or_the_end():
    usual = gc.get_threshold()[0]
    seen = []

    @program
    def main():
        seen.append(gc.get_threshold()[0])
        startup.model_loaded(of_size(10))
        seen.extend([gc.get_threshold()[0], gc.get_freeze_count() > 0])

    main()
    assert seen == [startup.ALLOCATIONS_WHILE_IMPORTING, usual, True]

    # a function that loads a model outside a program leaves the collector alone
    gc.unfreeze()
    startup.model_loaded(of_size(10))
    assert gc.get_freeze_count() == 0

    # a program that loads none, and the next one in this process
    @program
    def other():
        pass

    other()
    assert gc.get_threshold()[0] == usual


def test_objects_are_not_looked_through_when_python_ends():
    code = """
from rlhf.program import program

class Cycle:
    def __init__(self):
        self.itself = self
    def __del__(self):
        print("collected")

@program
def main():
    Cycle()

main()
print("end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "end\n"
