"""How a program starts: imports without collecting garbage, and threads that fit its model."""

from __future__ import annotations

import atexit
import gc
import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# Importing torch, transformers and peft makes over a million objects that live until the end. To
# look through them for garbage again and again takes a sixth of the time of importing them.
ALLOCATIONS_WHILE_IMPORTING = 200_000
USUAL_ALLOCATIONS = gc.get_threshold()[0]

# A model with fewer parameters computes with one thread: a second one waits more than it computes
# (docs/LOG.md, "Threads that spin").
SMALL_MODEL_PARAMETERS = 2_000_000
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
