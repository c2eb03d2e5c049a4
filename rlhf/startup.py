"""How a program starts, without torch: ranks, imports without collecting garbage, libraries that keep
quiet, threads that fit its model, and a port.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.errors import UserError

if TYPE_CHECKING:
    from torch import nn

# Importing torch, transformers and peft makes over a million objects that live until the end. To
# look through them for garbage again and again takes a sixth of the time of importing them.
ALLOCATIONS_WHILE_IMPORTING = 200_000
USUAL_ALLOCATIONS = gc.get_threshold()[0]

# A model with fewer parameters computes with one thread: a second one waits more than it computes
# (docs/LOG.md, "Threads that spin").
SMALL_MODEL_PARAMETERS = 2_000_000
LAUNCHERS = "These variables are the launcher's: start with `deepspeed` or `torchrun`, or unset them for one process"
# by the user or by whoever started this program
THREADS_ARE_CHOSEN = "OMP_NUM_THREADS" in os.environ


def begin() -> None:
    """Collect less garbage while a program imports its libraries, and none when Python ends; keep
    bitsandbytes from speaking of kernels that are not used here.
    """
    # peft imports it where it is installed, long before `silence_libraries` in some programs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # one call however many programs run in this process; the last look at all objects takes 1.5 s
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    # of a program that ran in this process before
    gc.unfreeze()
    gc.set_threshold(ALLOCATIONS_WHILE_IMPORTING)


def end() -> None:
    """Collect garbage as usual from here on."""
    gc.set_threshold(USUAL_ALLOCATIONS)


def model_loaded(model: nn.Module) -> None:
    """Take one thread for a small model on a CPU, unless OMP_NUM_THREADS says how many, and end the
    phase of imports.
    """
    import torch

    # of what ZeRO-3 has divided nothing is here
    sizes = [getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters()]
    is_small = sum(sizes) < SMALL_MODEL_PARAMETERS
    if is_small and not THREADS_ARE_CHOSEN and not torch.cuda.is_available():
        torch.set_num_threads(1)
        # for libraries that would choose again
        os.environ["OMP_NUM_THREADS"] = "1"
    if gc.get_threshold()[0] == ALLOCATIONS_WHILE_IMPORTING:
        # what the imports have made is never looked through again
        gc.freeze()
        end()


def silence_libraries() -> None:
    """Keep library chatter, telemetry and tokenizer warnings out of a program's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # the libraries give these to one another; nobody who runs a program can act on them
    warnings.filterwarnings("ignore", category=FutureWarning)


@dataclass(frozen=True)
class Ranks:
    """This process's number among all ranks and among those of this machine; `launched` is false for
    plain python.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    launched: bool = True


def read_ranks(environment: Mapping[str, str]) -> Ranks:
    """Return the ranks as a launcher has set them, or those of one process without a launcher.

    Raises UserError where they are not numbers, contradict each other, or lack a place for the
    ranks to meet.
    """

    if "WORLD_SIZE" not in environment or "RANK" not in environment:
        return Ranks(0, 1, 0, 1, launched=False)

    def number(name: str, default: int) -> int:
        text = environment.get(name, str(default))
        if not text.isdecimal():
            raise UserError(f"{name} is {text!r}, expected a whole number. {LAUNCHERS}")
        return int(text)

    size = number("WORLD_SIZE", 1)
    # torchrun's name, and deepspeed's
    local_size = number("LOCAL_WORLD_SIZE", number("LOCAL_SIZE", size))
    ranks = Ranks(number("RANK", 0), size, number("LOCAL_RANK", 0), local_size)
    if ranks.rank >= size:
        raise UserError(
            f"RANK is {ranks.rank}, but WORLD_SIZE is {size}: ranks count from 0. {LAUNCHERS}"
        )
    absent = [
        name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK") if name not in environment
    ]
    if size > 1 and absent:
        raise UserError(f"WORLD_SIZE is {size}, but {' and '.join(absent)} not set. {LAUNCHERS}")
    return ranks


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
