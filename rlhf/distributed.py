"""Ranks, sums, and one learner over DeepSpeed or over a single plain process. No other file knows DeepSpeed."""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config import UserError, did_you_mean, on_failure

ABANDONED_SECONDS = 60.0  # after which a compile lock that no process of this machine holds is nobody's


@dataclass
class DistributedContext:
    """This process among the others. `launched` is true under `deepspeed` or `torchrun`, false for plain python."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    launched: bool = False
    stop_watching: Callable[[], None] = lambda: None  # a rank's last word: from here on the others' end is no failure

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

    def raise_on_all_ranks(self, call: Callable[[], Any]) -> Any:
        """What `call` returns on this rank; a UserError that it raises on any rank is raised on all of them."""
        result, problem = None, None
        try:
            result = call()
        except UserError as error:
            problem = error
        problems = [p for p in self.gather([problem]) if p is not None]
        if problems:
            raise problems[0]
        return result

    def shard(self, count: int) -> range:
        """The contiguous part of `count` items that this rank handles; parts differ by at most one."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def start() -> DistributedContext:
    """Join the other processes, or be alone. Sets the device, and threads so that ranks do not fight for cores."""
    launched = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    cuda = torch.cuda.is_available()
    if not launched:
        return DistributedContext(device=torch.device("cuda", 0) if cuda else torch.device("cpu"))
    rank, size, local, local_size = ranks_of(os.environ)
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
    wait_for_compilers(local)
    if size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ["LOCAL_RANK"] = str(local)  # without it DeepSpeed asks MPI
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
    stop_watching = abort_all_ranks(rank) if size > 1 else lambda: None
    return DistributedContext(
        rank, size, torch.device("cuda", local) if cuda else torch.device("cpu"), True, stop_watching
    )


def wait_for_compilers(local_rank: int) -> None:
    """Wait while another process compiles an operator, and remove the lock of one that was killed while it did.

    Without this, torch waits for such a lock for ever and says nothing. All ranks of a machine wait here: one that
    torch lets through after a lock was removed expects the compiled file to be there.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    told = False
    while locks := [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        for lock in locks if local_rank == 0 else ():
            if is_abandoned(lock):
                print(f"{lock}: removed; the process that compiled there was killed", flush=True)
                lock.unlink(missing_ok=True)
            elif not told:
                told = True
                print(
                    f"{lock}: waiting for the process that compiles there. If it was killed, the lock is removed after "
                    f"{ABANDONED_SECONDS:.0f} seconds without a change",
                    flush=True,
                )
        time.sleep(0.5)


def is_abandoned(lock: Path) -> bool:
    """Whether nobody compiles under this lock any more: no process of this machine has it open, as the one that took
    it does until it ends, and nothing in its folder has changed for a while (it may be another machine's)."""
    import psutil

    processes = psutil.process_iter(["open_files"])
    if any(file.path == str(lock) for process in processes for file in process.info["open_files"] or ()):
        return False
    try:
        changed = max(path.stat().st_mtime for path in (lock, *lock.parent.iterdir()))
    except FileNotFoundError:  # it has ended at this moment
        return False
    return time.time() - changed > ABANDONED_SECONDS


def ranks_of(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """(rank, number of ranks, rank on this machine, ranks on this machine) as a launcher says them.

    Raises UserError where they are no numbers or do not fit together, or where ranks have no place to meet.
    """

    def number(name: str, usual: int) -> int:
        text = environment.get(name, str(usual))
        if not text.isdecimal():
            raise UserError(f"{name} is {text!r}, expected a whole number. {LAUNCHERS}")
        return int(text)

    rank, size = number("RANK", 0), number("WORLD_SIZE", 1)
    if rank >= size:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE is {size}: ranks count from 0. {LAUNCHERS}")
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK") if size > 1 and name not in environment]
    if absent:
        raise UserError(f"WORLD_SIZE is {size}, but {' and '.join(absent)} not set. {LAUNCHERS}")
    return rank, size, number("LOCAL_RANK", 0), number("LOCAL_SIZE", size)


LAUNCHERS = "These variables are the launcher's: start with `deepspeed` or `torchrun`, or unset them for one process"


def abort_all_ranks(rank: int) -> Callable[[], None]:
    """Let a rank that fails end the others within seconds, with its own error on top; returns World.leave.

    The failing rank leaves its number in the store through which the ranks have met. Another, waiting in a collective
    operation that will never end, sees it from a thread of its own and leaves; one that got an error out of it says
    whose fault it was in the place of a traceback.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    store, key, over = _get_default_store(), "rlhf/failed", threading.Event()

    def who() -> int | None:
        try:
            return int(store.get(key)) if store.check([key]) else None
        except Exception:  # the store ends with rank 0
            return 0

    def fail(code: int) -> bool:
        over.set()
        first = who()
        if first is None:
            with contextlib.suppress(Exception):
                store.set(key, str(rank))
        elif first != rank:
            print(f"rank {rank} ends, because rank {first} has failed", file=sys.stderr, flush=True)
            return True
        return False

    def watch() -> None:
        while not over.wait(0.5):
            first = who()
            if first is not None and first != rank and not over.wait(3.0):
                print(f"rank {rank} ends, because rank {first} has failed", file=sys.stderr, flush=True)
                os._exit(1)

    on_failure.append(fail)
    atexit.register(over.set)
    threading.Thread(target=watch, daemon=True).start()
    return over.set


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


def read_deepspeed_config(path: str | None, world: DistributedContext, options: Any = None) -> dict[str, Any] | None:
    """The DeepSpeed JSON as a dict, or None for a plain process. A name is also tried in rlhf/configs/deepspeed/.

    With a program's `options`, whatever they decide is "auto" in it. Raises UserError on a file that is no DeepSpeed
    JSON, or that contradicts the options.
    """
    if not world.launched or path is None:
        return None
    shipped = Path(__file__).parent / "configs" / "deepspeed"
    file = Path(path)
    if not file.is_file():
        file = shipped / f"{file.stem}.json"
    if not file.is_file():
        names = sorted(p.stem for p in shipped.glob("*.json"))
        raise UserError(f"deepspeed: no file '{path}'.{did_you_mean(path, names)} Shipped: {', '.join(names)}")
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {error.lineno}: not valid JSON: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    return check_deepspeed_config(content, str(file), world, options)


# what a DeepSpeed JSON may say beside what options decide: how memory and time are spent, and what is written down
ZERO = "zero_optimization"
KEYS = (ZERO, "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "activation_checkpointing", "aio")
KEYS += ("communication_data_type", "data_types", "prescale_gradients", "gradient_predivide_factor", "checkpoint")
KEYS += ("disable_allgather", "compile", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state")
KEYS += ("flops_profiler", "comms_logger", "tensorboard", "csv_monitor", "wandb", "log_level")
DECIDED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
SECTIONS = ("optimizer", "scheduler", "bf16", "fp16")
SCHEDULES = {"linear": "WarmupDecayLR", "cosine": "WarmupCosineLR", "constant": "WarmupLR"}
SCHEDULES["constant_with_warmup"] = "WarmupLR"


def check_deepspeed_config(config: Any, where: str, world: DistributedContext, options: Any = None) -> dict[str, Any]:
    """The DeepSpeed JSON with "auto" for all that a program's options decide, and without optimizer and scheduler:
    PyTorch's AdamW and the program's own schedule are used everywhere.

    Raises UserError on unknown keys, a missing ZeRO stage, and on values other than "auto" that are not those of the
    options.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(config).__name__}")
    known = (*KEYS, *DECIDED, *SECTIONS)
    for key in config:
        if key not in known:
            raise UserError(
                f"{where}: '{key}' is nothing that is read from a DeepSpeed JSON here.{did_you_mean(key, known)} "
                "A file of accelerate or of another program is no DeepSpeed JSON; rlhf/configs/deepspeed has some"
            )
    _check_zero(config.get(ZERO), where)
    if options is not None:
        problems = _contradictions(config, _decided(options, world))
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise UserError(f'{where} contradicts the options; write "auto" there, or change the option:\n{lines}')
    rest = {key: value for key, value in config.items() if key not in SECTIONS}
    return rest | dict.fromkeys(DECIDED, "auto") | {"bf16": {"enabled": "auto"}}


def _check_zero(zero: Any, where: str) -> None:
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        none = f'{{"{ZERO}": {{"stage": 0}}}}'
        raise UserError(f"{where}: {ZERO}.stage is {stage!r}, expected 0 to 3; without ZeRO write {none}")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
    except ValueError as error:  # pydantic's
        first = error.errors()[0]
        place = ".".join(map(str, (ZERO, *first["loc"])))
        known = DeepSpeedZeroConfig.model_fields if first["type"] == "extra_forbidden" else ()
        raise UserError(f"{where}: {place}: {first['msg']}.{did_you_mean(place.split('.')[-1], known)}") from None


def _decided(options: Any, world: DistributedContext) -> dict[str, tuple[Any, str]]:
    """What a program's options make of each value of a DeepSpeed JSON, and the name they have for it."""
    passes, size = getattr(options, "gradient_accumulation_steps", 1), options.per_device_train_batch_size
    whole = "per_device_train_batch_size x gradient_accumulation_steps x processes"
    trl, rate = getattr(options, "trl", {}), options.learning_rate
    betas = [trl.get("adam_beta1", 0.9), trl.get("adam_beta2", 0.999)]
    epsilon = getattr(options, "adam_epsilon", trl.get("adam_epsilon", 1e-8))
    bfloat16 = options.dtype == "bfloat16" or (options.dtype == "auto" and world.device.type == "cuda")
    return {
        "train_micro_batch_size_per_gpu": (size, "per_device_train_batch_size"),
        "gradient_accumulation_steps": (passes, "gradient_accumulation_steps (1 in PPO)"),
        "train_batch_size": (size * passes * world.size, whole),
        "gradient_clipping": (options.max_grad_norm, "max_grad_norm"),
        "bf16.enabled": (bfloat16, "dtype bfloat16"),
        "fp16.enabled": (False, "dtype float16"),
        "optimizer.type": ("AdamW", "the optimizer"),
        "optimizer.params.lr": (rate, "learning_rate"),
        "optimizer.params.betas": (betas, "trl: {adam_beta1, adam_beta2}"),
        "optimizer.params.eps": (epsilon, "adam_epsilon (outside PPO under trl:)"),
        "optimizer.params.weight_decay": (getattr(options, "weight_decay", 0.0), "weight_decay"),
        "scheduler.type": (SCHEDULES.get(options.lr_scheduler_type), f"lr_scheduler_type {options.lr_scheduler_type}"),
        "scheduler.params.warmup_min_lr": (0, "the first step size of lr_scheduler_type"),
        "scheduler.params.warmup_max_lr": (rate, "learning_rate"),
        "scheduler.params.warmup_num_steps": (getattr(options, "warmup_steps", 0), "warmup_steps"),
    }


def _contradictions(config: dict[str, Any], decided: dict[str, tuple[Any, str]]) -> list[str]:
    found = {key: config[key] for key in DECIDED if key in config}
    for section in SECTIONS:
        found |= _leaves(config.get(section), section)
    lines = []
    for key, value in found.items():
        if value == "auto" or (key.startswith(("bf16.", "fp16.")) and key not in decided):
            continue
        if key == "optimizer.type" and str(value).lower() in ("adam", "adamw"):
            continue  # DeepSpeed's Adam decays weights as AdamW does
        if key not in decided:
            lines.append(f"{key}: {json.dumps(value)}, which no option has")
        elif value != decided[key][0]:
            ours, name = decided[key]
            lines.append(f"{key}: {json.dumps(value)}, but {name} is {json.dumps(ours)}")
    return lines


def _leaves(value: Any, name: str) -> dict[str, Any]:
    """Nested keys as dotted names."""
    if not isinstance(value, dict):
        return {} if value is None else {name: value}
    return {key: leaf for inner, part in value.items() for key, leaf in _leaves(part, f"{name}.{inner}").items()}


class OptimizerEngine:
    """A module with its optimizer, behind a DeepSpeed engine or plain.

    Losses are parts of one step's mean over all ranks: each micro-batch of each rank brings its own sum divided by
    the count of the whole step, and gradients are summed, never averaged. All `backward` calls of a step keep their
    gradients (ZeRO-1/2 would drop all but the last without the explicit boundary).
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        world: DistributedContext,
        deepspeed_config: dict[str, Any] | None = None,
        max_grad_norm: float = 1.0,
        adam_eps: float = 1e-5,
        micro_batch_size: int = 1,
    ):
        self.world, self.max_grad_norm = world, max_grad_norm
        self.unmoved = set(range(len(groups)))  # groups that have had no gradient yet
        wide = any(p.dtype == torch.float64 for g in groups for p in g["params"])
        optimizer = torch.optim.AdamW(groups, eps=adam_eps, weight_decay=0.0)
        self.engine = None
        if deepspeed_config is None:
            self.module, self.optimizer = module.to(world.device), optimizer
            return
        import deepspeed

        config = fill_auto(deepspeed_config, micro_batch_size, max_grad_norm)
        self.stage = config["zero_optimization"].get("stage", 0)
        if wide and self.stage not in (1, 2):
            raise UserError(f"dtype float64 is kept by ZeRO 1 and 2 and by plain python, not by ZeRO {self.stage}")
        if self.stage == 3:
            gather_with_readers(module)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.module = self.engine.module
        if wide:
            keep_float64(self.optimizer, world)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this loss's gradients to the step; `last` on the step's last call alone, on every rank."""
        if self.engine is None:
            loss.backward()
            return
        # ZeRO-3 with its optimizer offloaded hands over, at the boundary, the gradients of that pass alone
        self.engine.set_gradient_accumulation_boundary(last or self.stage == 3)
        if self.stage == 3:  # it counts passes in engine.forward, which roles do not go through; at 0 it overwrites
            self.optimizer.micro_step_id = 1
        self.engine.backward(loss * self.world.size)  # DeepSpeed averages over ranks; our parts are to be summed

    def step(self, learning_rates: list[float], *, discard: bool = False) -> float:
        """Clip the joint gradient norm, update each group at its rate, clear gradients; returns the norm before.

        Where the norm is not finite nothing is updated: neither weights nor the optimizer's moments nor its count of
        steps. `discard`, the same on every rank, takes the step back in the same way, and NaN is returned.
        """
        for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        if self.engine is None:
            parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
            norm = math.nan if discard else float(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
            if math.isfinite(norm):
                self.optimizer.step()
                self._hold_back()
            self.optimizer.zero_grad(set_to_none=True)
            return norm
        norm = None
        if self.stage == 0:  # the engine reports no norm there in fp32, and its gradients are whole by now
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = math.nan if discard else float(torch.nn.utils.get_total_norm(grads))
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return norm
        with self._norm_is_nan() if discard else contextlib.nullcontext():
            self.engine.step()
        if self.stage == 3:  # always added to, so emptied here
            self.optimizer.grad_partitions_flat_buffer.zero_()
        if discard:
            return math.nan
        self._hold_back()
        reported = self.engine.get_global_grad_norm()
        return float(reported) if reported is not None else float(norm if norm is not None else "nan")

    @contextlib.contextmanager
    def _norm_is_nan(self):
        """Inside, ZeRO's optimizer measures NaN as its gradient norm.

        ZeRO has no call that drops a step, but it drops one whose norm is not finite and empties all its buffers.
        """
        measure = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        nan = torch.tensor(math.nan, device=self.world.device)
        measured = getattr(self.optimizer, measure)
        setattr(self.optimizer, measure, lambda: [nan] if self.stage == 3 else nan)
        try:
            yield
        finally:
            setattr(self.optimizer, measure, measured)

    def _hold_back(self) -> None:
        """Adam's count of steps begins with a group's first gradient (the policy's, after a warm-up of the critic).

        Bias correction (Kingma and Ba 2015, sec. 3) takes moments for those of so many gradients; had it counted steps
        without any, the first ones after them would be several times too large.
        """
        for number in sorted(self.unmoved):
            states = self._states(number)
            if float(self.world.sum(float(sum(state["exp_avg_sq"].sum() for state in states)))) > 0:
                self.unmoved.discard(number)
            else:
                for state in states:
                    state["step"].zero_()

    def _states(self, number: int) -> list[dict[str, Tensor]]:
        """Adam's state for a parameter group, this rank's part; none before the first step."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.engine is not None and self.stage == 3:  # where groups are empty between steps
            parts, group_of = self.optimizer.fp32_partitioned_groups_flat, self.optimizer.sub_group_to_group_id
            parameters = [p for i, p in enumerate(parts) if group_of[i] == number]
        else:
            parameters = inner.param_groups[number]["params"]
        return [inner.state[p] for p in parameters if inner.state.get(p)]

    def gathered(self, parameters: list[nn.Parameter] | None = None, modify: bool = False):
        """Whole parameters inside the context: for generation and saving under ZeRO-3, else nothing to do.

        With `modify`, what rank 0 makes of them is kept on all ranks.
        """
        return gathered(self.module, parameters, modify)

    def save(self, folder: Path) -> None:
        """Trained weights and optimizer state, exactly; each rank its part under ZeRO. Call it on all ranks."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.engine is not None:
            self.engine.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)
        else:
            trained = {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}
            torch.save({"module": trained, "optimizer": self.optimizer.state_dict()}, folder / "plain.pt")

    def load(self, folder: Path) -> None:
        """What `save` wrote, by as many ranks and under the same ZeRO stage."""
        self.unmoved = set(range(len(self.optimizer.param_groups)))
        if self.engine is not None:
            found, _ = self.engine.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
            if found is None:
                raise UserError(f"{folder}: DeepSpeed found no state of its engine there")
            return
        state = torch.load(folder / "plain.pt", map_location=self.world.device, weights_only=True)
        named = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, value in state["module"].items():
                named[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])

    def state_dict(self) -> dict[str, Tensor]:
        """Names to whole tensors of the trainable parameters, on every rank; call it on all ranks."""
        with self.gathered():
            return {n: p.detach().cpu().clone() for n, p in self.module.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def gathered(module: nn.Module, parameters: list[nn.Parameter] | None = None, modify: bool = False):
    """A context in which a module that ZeRO-3 has cut into parts is whole; else one that does nothing.

    Ranks may make different numbers of forward passes inside. Without a claim on them, the first pass would let the
    parameters go again, and each later one would gather them anew, which all ranks have to do together.
    """
    parameters = [p for p in (parameters or module.parameters()) if hasattr(p, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None):
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(gathered)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(gathered)


def gather_with_readers(module: nn.Module) -> None:
    """Tell ZeRO-3 which parameters PEFT reads in the forward pass of another module than their own.

    It gathers a module's parameters when that module is called: never those in a ParameterDict (LoRA on embeddings,
    trainable tokens), nor the embeddings that the rows of trainable tokens are put into.
    """
    from deepspeed.runtime.zero import register_external_parameter
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from transformers import PreTrainedModel

    causal = next(m for m in module.modules() if isinstance(m, PreTrainedModel))
    for reader in module.modules():
        read = [p for child in reader.children() if isinstance(child, nn.ParameterDict) for p in child.values()]
        if isinstance(reader, TrainableTokensLayer):
            read.append(reader.get_base_layer().weight)
            for parameter in read:  # TRL reads the head's weight in the model's own forward pass
                register_external_parameter(causal, parameter)
            reader.get_merged_weights = _whole(reader.get_merged_weights)
        for parameter in read:
            register_external_parameter(reader, parameter)


def _whole(weight_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that gives a tensor, which TRL then takes for a parameter of ZeRO-3 that is gathered already."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    def marked(*args):
        weight = weight_of(*args)
        weight.ds_status = ZeroParamStatus.AVAILABLE
        return weight

    return marked


def keep_float64(optimizer: Any, world: DistributedContext) -> None:
    """ZeRO 1 and 2 add up gradients, take their norm and update weights in float32 whatever the model is; widen it."""
    for own, parts in zip(
        optimizer.single_partition_of_fp32_groups, optimizer.parallel_partitioned_bit16_groups, strict=True
    ):
        own.data = parts[world.rank].detach().clone()
    (bucket,) = optimizer.ipg_buckets.values()  # of gradients on their way, by the type they travel in
    optimizer.ipg_buckets = {torch.float64: bucket}
    optimizer.communication_data_type = optimizer.gradient_accumulation_dtype = torch.float64
    optimizer.master_weights_and_grads_dtype = torch.float64
    optimizer.use_separate_grad_accum = optimizer.use_grad_accum_attribute = False

    def norm() -> Tensor:
        own = [g for group in optimizer.averaged_gradients.values() for g in group]
        return world.sum(sum(g.square().sum() for g in own)).sqrt()

    optimizer.scaled_global_norm = norm


def fill_auto(config: dict, micro_batch_size: int, max_grad_norm: float) -> dict[str, Any]:
    """The DeepSpeed JSON with every "auto" replaced by what the trainer knows."""
    config = json.loads(json.dumps(config))
    config.pop("train_batch_size", None)
    config["train_micro_batch_size_per_gpu"] = micro_batch_size
    config["gradient_accumulation_steps"] = 1
    config["gradient_clipping"] = max_grad_norm
    config["steps_per_print"] = 10**9
    config["bf16"] = {"enabled": False}  # the frozen base keeps its dtype; adapters and heads stay in fp32
    zero = config.setdefault("zero_optimization", {"stage": 0})
    for key in [k for k, v in zero.items() if v == "auto"]:
        zero.pop(key)
    return config
