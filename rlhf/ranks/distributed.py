"""The processes of a run: how they start, what they exchange, and how one that fails ends the
others.
"""

import atexit
import contextlib
import itertools
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.program import on_failure
from rlhf.ranks.hang import HangWatch
from rlhf.startup import free_port, read_ranks
from rlhf.text import say_once

# after which a compile lock that no process of this machine holds is taken for abandoned
ABANDONED_SECONDS = 60.0
POLL_SECONDS = 0.5
GRACE_SECONDS = 3.0  # for a rank to fail with an error of its own once another has failed


class FailureWatch:
    """Ends all ranks within seconds when one of them fails, with the error of the first on top.

    The failing rank writes its number to the store through which the ranks found each other. The
    others, which wait in a collective operation that will never complete, read it from a thread and
    exit; one that fails because of it names that rank instead of printing a traceback.
    """

    KEY = "rlhf/failed"

    def __init__(self, rank: int):
        from torch.distributed.distributed_c10d import _get_default_store

        self.rank = rank
        self.store = _get_default_store()
        self.stopped = threading.Event()
        on_failure.append(self.report)
        atexit.register(self.stop)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Ignore the failures of other ranks from here on: this rank is done."""
        self.stopped.set()
        # a thread that reads the store while the interpreter shuts down would abort the process
        self.thread.join(timeout=1.0)

    def report(self, exit_code: int) -> bool:
        """Tell the other ranks that this one fails; return whether another failed first, and is the
        cause.
        """
        self.stop()
        first = self._first_failed()
        if first is None:
            with contextlib.suppress(Exception):
                self.store.set(self.KEY, str(self.rank))
            return False
        if first == self.rank:
            return False
        self._print_cause(first)
        return True

    def _watch(self) -> None:
        while not self.stopped.wait(POLL_SECONDS):
            first = self._first_failed()
            if first is not None and first != self.rank and not self.stopped.wait(GRACE_SECONDS):
                self._print_cause(first)
                os._exit(1)

    def _first_failed(self) -> int | None:
        try:
            return int(self.store.get(self.KEY)) if self.store.check([self.KEY]) else None
        except Exception:
            # the store ends with rank 0
            return 0

    def _print_cause(self, first: int) -> None:
        print(
            f"rank {self.rank} ends, because rank {first} has failed", file=sys.stderr, flush=True
        )


@dataclass
class DistributedContext:
    """This process among the others. `launched` is true under `deepspeed` or `torchrun`, false for
    plain python.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    launched: bool = False
    failure_watch: FailureWatch | None = None
    hang_watch: HangWatch | None = None
    # what this rank does for those that are not yet at an exchange (`divided.LayerStream`)
    before_waiting: Callable[[], None] | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor | float) -> Tensor:
        """Return the sum over ranks, the same on every rank."""
        dtype = None if isinstance(value, Tensor) else torch.float64
        tensor = torch.as_tensor(value, dtype=dtype).to(self.device).clone()
        if self.size > 1:
            self._serve_others()
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, items: list[Any]) -> list[Any]:
        """Return the lists of all ranks, one after the other in rank order, on every rank."""
        if self.size == 1:
            return list(items)
        self._serve_others()
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, items)
        return list(itertools.chain.from_iterable(parts))

    def raise_on_all_ranks(self, call: Callable[[], Any]) -> Any:
        """Return what `call` returns on this rank; raise on all ranks a UserError that it raises on
        any of them.
        """
        result = problem = None
        try:
            result = call()
        except UserError as error:
            problem = error
        problems = [found for found in self.gather([problem]) if found is not None]
        if problems:
            raise problems[0]
        return result

    def shard(self, count: int) -> range:
        """Return the contiguous part of `count` items that this rank handles; parts differ by at
        most one item.
        """
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def share_of(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return the items that this rank handles (`shard`)."""
        part = self.shard(len(items))
        return items[part.start : part.stop]

    def barrier(self) -> None:
        if self.size > 1:
            self._serve_others()
            torch.distributed.barrier()

    def _serve_others(self) -> None:
        if self.before_waiting is not None:
            self.before_waiting()

    def note_step(self, step: int) -> None:
        """Remember the step that this rank is in, counted from 1, for what is said if it hangs."""
        if self.hang_watch is not None:
            self.hang_watch.step = step

    def stop_watching(self) -> None:
        """Ignore the failures of other ranks from here on; every rank calls it when it is done."""
        for watch in (self.failure_watch, self.hang_watch):
            if watch is not None:
                watch.stop()


def start(hang_timeout: float = 0.0) -> DistributedContext:
    """Join the other ranks, or start alone without a launcher; set the device and the number of
    threads.

    hang_timeout: seconds at one place after which a rank among several counts as hanging; 0: never.
    """
    uses_gpu = torch.cuda.is_available()
    ranks = read_ranks(os.environ)
    if not uses_gpu:
        # otherwise DeepSpeed says that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not ranks.launched:
        return DistributedContext(
            device=torch.device("cuda", 0) if uses_gpu else torch.device("cpu")
        )

    if uses_gpu:
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        _divide_cores(ranks.local_size)
    _prepare_compiling()
    wait_for_compilers(ranks.local_rank)
    if ranks.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        # without it DeepSpeed asks MPI
        os.environ["LOCAL_RANK"] = str(ranks.local_rank)
        # no other rank has to know the port, and the launcher's may be taken
        os.environ["MASTER_PORT"] = str(free_port())

    from rlhf.ranks.deepspeed_backend import init_process_group

    try:
        # before any TrainingArguments: ZeRO-3 would take the world for one rank
        init_process_group(hang_timeout)
    except torch.distributed.DistNetworkError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"rendezvous failed at {place} ({error}). If another run uses that port, choose one: "
            "deepspeed --master_port 29501 ..."
        ) from None
    if ranks.size > 1 and not uses_gpu:
        # all ranks have opened each other's by now
        torch.distributed.barrier()
        shared_buffer(ranks.rank).unlink(missing_ok=True)
    world = DistributedContext(ranks.rank, ranks.size, device, launched=True)
    if ranks.size > 1:
        watch_ranks(world, hang_timeout)
    return world


def watch_ranks(world: DistributedContext, hang_timeout: float) -> None:
    """Let a rank that fails, or stays `hang_timeout` seconds at one place (0: for ever), end all."""
    world.failure_watch = watch = FailureWatch(world.rank)
    if hang_timeout:
        world.hang_watch = HangWatch(
            world.rank, world.size, watch.store, hang_timeout, before_end=watch.stopped.set
        )


def shared_buffer(rank: int) -> Path:
    """Return the file of the memory (67 MB) through which DeepSpeed adds up tensors of CPU ranks.

    DeepSpeed removes it when a rank ends well; without its name it goes with the last process that
    has it open, however that ends.
    """
    place = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    return Path("/dev/shm") / f"deepspeed_allreduce_buffer_{os.getuid()}_{place}_{rank}"


def _divide_cores(local_size: int) -> None:
    """Give each rank of this machine its share of the cores, unless OMP_NUM_THREADS says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, local_size)))
        # for libraries that would choose again
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def _prepare_compiling() -> None:
    """Let DeepSpeed find ninja, and keep the operators it compiles with the environment that they
    fit.
    """
    # ninja is beside python, in an environment that may not be activated
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # an operator compiled for one environment is compiled again by another
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def wait_for_compilers(local_rank: int) -> None:
    """Wait while another process compiles an operator, and remove the lock of one that was killed
    while it did.

    Without this, torch waits for such a lock forever and silently. All ranks of a machine wait
    here: one that torch lets through after a lock was removed expects the compiled file to be
    there.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    has_told = local_rank != 0
    while True:
        locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
        if not locks:
            return
        for lock in locks:
            if local_rank == 0 and is_abandoned(lock):
                print(f"{lock}: removed; the process that compiled there was killed", flush=True)
                lock.unlink(missing_ok=True)
            elif not has_told:
                has_told = True
                print(
                    f"{lock}: waiting for the process that compiles there. If it was killed, the lock is removed after "
                    f"{ABANDONED_SECONDS:.0f} seconds without a change",
                    flush=True,
                )
        time.sleep(POLL_SECONDS)


def is_abandoned(lock: Path) -> bool:
    """Return whether nobody compiles under this lock any more.

    That is so when no process of this machine has it open, as the one that took it does until it
    ends, and nothing in its folder has changed for a while: it may be another machine's.
    """
    import psutil

    for process in psutil.process_iter(["open_files"]):
        if any(file.path == str(lock) for file in process.info["open_files"] or ()):
            return False
    try:
        last_change = max(path.stat().st_mtime for path in (lock, *lock.parent.iterdir()))
    except FileNotFoundError:
        # the compilation has ended at this moment
        return False
    return time.time() - last_change > ABANDONED_SECONDS


def own_device() -> torch.device:
    """Return the device of a program that runs in one process: the GPU, or the CPU without one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def base_dtype(dtype: str, device: torch.device, *, trains_whole: bool = False) -> str:
    """Return the dtype to load a base in. "auto" is bfloat16 on a GPU, else float32.

    A model that is trained whole is loaded in float32; the trainer computes in bfloat16 on a GPU.
    """
    if dtype == "auto":
        return "bfloat16" if device.type == "cuda" and not trains_whole else "float32"
    if dtype == "bfloat16" and not multiplies_bfloat16(device):
        say_once(
            "this CPU has no instructions for bfloat16, which takes it tens of times as long as float32: "
            "--dtype float32"
        )
    return dtype


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies matrices of bfloat16 about as fast as those of float32 or
    faster.

    A CPU does so with AVX512 or newer instructions, as oneDNN tells. GPUs do, and so do CPUs of which
    torch has no oneDNN to ask, for all that is known.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return True
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def peak_memory(device: torch.device) -> float:
    """Return the most memory used so far, GiB: the device's on a GPU, the process's resident set
    elsewhere.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
