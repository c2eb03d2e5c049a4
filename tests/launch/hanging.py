"""One of two ranks that meet, of which one then hangs: what the watch of `distributed.start` makes of it.

python tests/launch/hanging.py RANK PORT HANGING HOW
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

TIMEOUT = 6.0


def score(how: str) -> None:
    if how == "sleeps":
        time.sleep(3600)
    while how == "loops":
        time.monotonic()
    # with rank 0 the store stands still through which ranks find each other
    os.kill(os.getpid(), signal.SIGSTOP)


def main(rank: int, port: str, hanging: int, how: str) -> None:
    import torch

    from rlhf.ranks.distributed import DistributedContext, watch_ranks

    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    world = DistributedContext(rank, 2, launched=True)
    watch_ranks(world, TIMEOUT)
    world.note_step(2)
    world.barrier()
    if rank == hanging:
        score(how)
    world.sum(1.0)


if __name__ == "__main__":
    from rlhf.program import program

    program(main)(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
