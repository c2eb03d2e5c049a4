"""Ranks, sums, and one learner over DeepSpeed or over a single plain process. No other file knows DeepSpeed."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config import UserError, did_you_mean


@dataclass
class World:
    """This process among the others. `launched` is true under `deepspeed` or `torchrun`, false for plain python."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    launched: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor | float) -> Tensor:
        """Sum over ranks, the same on every rank."""
        tensor = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64).to(self.device)
        tensor = tensor.clone()
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all ranks, one after the other in rank order, on every rank."""
        if self.size == 1:
            return list(items)
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def share(self, count: int) -> range:
        """The contiguous part of `count` items that this rank handles; parts differ by at most one."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def start() -> World:
    """Join the other processes, or be alone. Sets the device, and threads so that ranks do not fight for cores."""
    launched = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    cuda = torch.cuda.is_available()
    if not launched:
        return World(device=torch.device("cuda", 0) if cuda else torch.device("cpu"))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_SIZE", size))
    if "OMP_NUM_THREADS" not in os.environ and not cuda:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, local_size)))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # for libraries that would choose again
    if cuda:
        torch.cuda.set_device(local)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed compiles with ninja, which stands beside python in an environment that may not be activated
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if os.access(sys.prefix, os.W_OK):  # an operator compiled for one environment is compiled anew by another
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    if size == 1:
        os.environ["MASTER_PORT"] = str(free_port())  # nobody else has to know it; the launcher's may be taken
    import deepspeed

    try:
        # before any TrainingArguments: ZeRO-3 would take the world for one rank
        deepspeed.init_distributed(verbose=False)
    except torch.distributed.DistNetworkError as error:
        raise UserError(
            f"the ranks cannot meet at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} ({error}). If "
            "another run uses that port, choose one: deepspeed --master_port 29501 ..."
        ) from None
    return World(rank, size, torch.device("cuda", local) if cuda else torch.device("cpu"), launched=True)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def peak_memory(device: torch.device) -> float:
    """The most memory used so far, GiB: the device's on a GPU, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def read_deepspeed_config(path: str | None, world: World) -> dict[str, Any] | None:
    """The DeepSpeed JSON as a dict, or None for a plain process. A name is also tried under configs/deepspeed/."""
    if not world.launched or path is None:
        return None
    root = Path(__file__).resolve().parent.parent
    candidates = [Path(path), root / path, root / "configs" / "deepspeed" / f"{Path(path).stem}.json"]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        names = sorted(p.stem for p in (root / "configs" / "deepspeed").glob("*.json"))
        raise UserError(f"deepspeed: no file '{path}'.{did_you_mean(path, names)} Shipped: {', '.join(names)}")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {error.lineno}: not valid JSON: {error.msg}") from None


class Learner:
    """A module with its optimizer, behind a DeepSpeed engine or plain.

    Losses are parts of one step's mean over all ranks: each micro-batch of each rank brings its own sum divided by
    the count of the whole step, and gradients are summed, never averaged. All `backward` calls of a step keep their
    gradients (ZeRO-1/2 would drop all but the last without the explicit boundary).
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        world: World,
        deepspeed_config: dict[str, Any] | None = None,
        max_grad_norm: float = 1.0,
        adam_eps: float = 1e-5,
        micro_batch_size: int = 1,
    ):
        self.world, self.max_grad_norm = world, max_grad_norm
        optimizer = torch.optim.AdamW(groups, eps=adam_eps, weight_decay=0.0)
        self.engine = None
        if deepspeed_config is None:
            self.module, self.optimizer = module.to(world.device), optimizer
            return
        import deepspeed

        config = fill_auto(deepspeed_config, micro_batch_size, max_grad_norm)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.module = self.engine.module
        self.stage = config.get("zero_optimization", {}).get("stage", 0)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this loss's gradients to the step; `last` on the step's last call alone, on every rank."""
        if self.engine is None:
            loss.backward()
            return
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size)  # DeepSpeed averages over ranks; our parts are to be summed

    def step(self, learning_rates: list[float]) -> float:
        """Clip the joint gradient norm, update each group at its rate, clear gradients; returns the norm before."""
        for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        if self.engine is None:
            parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return norm
        norm = None
        if self.stage == 0:  # the engine reports no norm there in fp32, and its gradients are whole by now
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
        self.engine.step()
        reported = self.engine.get_global_grad_norm()
        return float(reported) if reported is not None else float(norm if norm is not None else "nan")

    def gathered(self):
        """Whole parameters inside the context: for generation and saving under ZeRO-3, else nothing to do."""
        return gathered(self.module)

    def state_dict(self) -> dict[str, Tensor]:
        """Names to whole tensors of the trainable parameters, on every rank; call it on all ranks."""
        with self.gathered():
            return {n: p.detach().cpu().clone() for n, p in self.module.named_parameters() if p.requires_grad}


def gathered(module: nn.Module):
    """A context in which a module that ZeRO-3 has cut into parts is whole; else one that does nothing."""
    parameters = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not parameters:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def fill_auto(config: dict, micro_batch_size: int, max_grad_norm: float) -> dict[str, Any]:
    """The DeepSpeed JSON with every "auto" replaced by what the trainer knows."""
    config = json.loads(json.dumps(config))
    config.pop("train_batch_size", None)
    config.pop("optimizer", None)
    config.pop("scheduler", None)
    config["train_micro_batch_size_per_gpu"] = micro_batch_size
    config["gradient_accumulation_steps"] = 1
    config["gradient_clipping"] = max_grad_norm
    config["steps_per_print"] = 10**9
    config["bf16"] = {"enabled": False}  # the frozen base keeps its dtype; adapters and heads stay in fp32
    zero = config.setdefault("zero_optimization", {"stage": 0})
    for key in [k for k, v in zero.items() if v == "auto"]:
        zero.pop(key)
    return config
