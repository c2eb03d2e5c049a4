"""A module with its optimizer, in one plain process or behind a DeepSpeed engine."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.ranks import deepspeed_backend, deepspeed_state, divided
from rlhf.ranks.distributed import DistributedContext


def make_engine(
    module: nn.Module,
    groups: list[dict[str, Any]],
    world: DistributedContext,
    deepspeed_config: dict[str, Any] | None = None,
    max_grad_norm: float = 1.0,
    adam_eps: float = 1e-5,
    micro_batch_size: int = 1,
    optim: str = "adamw",
) -> OptimizerEngine:
    """Return the engine for AdamW's parameter groups: DeepSpeed's with a DeepSpeed JSON, else the
    plain one.

    optim: "adamw", or "adamw_8bit" for moments in 8 bits by blocks of 256 (Dettmers et al. 2022,
    arXiv 2110.02861); tensors of less than 4096 numbers keep theirs in 32 bits.
    """
    if optim == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        AdamW = torch.optim.AdamW
    if deepspeed_config is None:
        module.to(world.device)
        masters = MasterWeights(groups)
        optimizer = AdamW(masters.groups, eps=adam_eps, weight_decay=0.0)
        return OptimizerEngine(module, optimizer, world, max_grad_norm, masters)
    optimizer = AdamW(groups, eps=adam_eps, weight_decay=0.0)
    config = fill_auto(deepspeed_config, micro_batch_size, max_grad_norm)
    return DeepSpeedEngine(module, optimizer, world, config)


class MasterWeights:
    """Copies in float32 of what learns in bfloat16, which the optimizer steps in its place: most steps
    are smaller than the rounding of a weight (Micikevicius et al. 2018, arXiv 1710.03740, sec. 3.1).

    Gradients are summed up in the copies. ZeRO 1 to 3 do the same by themselves.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        self.copies: dict[nn.Parameter, nn.Parameter] = {}
        # as `groups`, with the copies in the place of their weights
        self.groups = []
        for group in groups:
            stepped = [self._copy_of(parameter) for parameter in group["params"]]
            self.groups.append(group | {"params": stepped})

    def _copy_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return what the optimizer steps: a copy of a weight in bfloat16, any other itself."""
        if parameter.dtype != torch.bfloat16:
            return parameter
        self.copies[parameter] = nn.Parameter(parameter.detach().float())
        parameter.register_post_accumulate_grad_hook(self._take_gradient)
        return self.copies[parameter]

    def _take_gradient(self, parameter: nn.Parameter) -> None:
        gradient, master = parameter.grad.float(), self.copies[parameter]
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the most exact form of a weight."""
        return self.copies.get(parameter, parameter)

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the copies into their weights."""
        for parameter, master in self.copies.items():
            parameter.copy_(master)


class OptimizerEngine:
    """The engine of one plain process.

    Losses are parts of one step's mean over all ranks: each micro-batch of each rank brings its own
    sum divided by the count of the whole step, and gradients are summed, never averaged.
    """

    engine: Any = None  # DeepSpeed's, where it is used
    # gradient norm of each parameter group in the last step that was not discarded, before clipping
    group_norms: tuple[float, ...] = ()

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: DistributedContext,
        max_grad_norm: float,
        masters: MasterWeights,
    ):
        self.module = module
        self.optimizer = optimizer
        self.masters = masters
        self.world = world
        self.max_grad_norm = max_grad_norm
        self._reset_untouched_groups()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this loss's gradients to the step; `last` on the step's last call alone, on every
        rank.
        """
        loss.backward()

    def step(self, learning_rates: list[float], *, discard: bool = False) -> float:
        """Clip the joint gradient norm, update each group at its rate, clear gradients; return the
        norm before.

        Where the norm is not finite nothing is updated: neither weights nor the optimizer's moments
        nor its count of steps. `discard`, the same on every rank, takes the step back in the same
        way, and NaN is returned.
        """
        self._set_rates(learning_rates)
        norm = math.nan
        if not discard:
            parameters = [
                parameter for group in self.optimizer.param_groups for parameter in group["params"]
            ]
            self.group_norms = self._norms_of_groups()
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
            self.masters.write_back()
            self._restart_untouched_counts()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def gathered(self, parameters: list[nn.Parameter], modify: bool = False):
        """Return a context in which parameters are whole (see `deepspeed_backend.gathered`)."""
        return deepspeed_backend.gathered(parameters, modify)

    def readable(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for passes without gradients, as many as each rank likes (see
        `divided.readable`).
        """
        return divided.readable(self.module, world=self.world)

    def save(self, folder: Path) -> None:
        """Write trained weights and optimizer state exactly; call it on all ranks: under ZeRO each
        writes its part.
        """
        folder.mkdir(parents=True, exist_ok=True)
        trained = {
            name: self.masters.of(p).detach()
            for name, p in self.module.named_parameters()
            if p.requires_grad
        }
        torch.save(
            {"module": trained, "optimizer": self.optimizer.state_dict()}, folder / "plain.pt"
        )

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote under the same ZeRO stage; behind DeepSpeed, with any number of
        ranks.
        """
        self._reset_untouched_groups()
        # not on a GPU, where Adam would wait for the count of steps of each parameter
        state = torch.load(folder / "plain.pt", map_location="cpu", weights_only=True)
        parameters = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, value in state["module"].items():
                self.masters.of(parameters[name]).copy_(value)
        self.masters.write_back()
        self.optimizer.load_state_dict(state["optimizer"])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole trainable parameters by name, on every rank; call it on all ranks."""
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        with self.gathered(list(trained.values())):
            return {name: p.detach().cpu().clone() for name, p in trained.items()}

    def _norms_of_groups(self) -> tuple[float, ...]:
        """Return the gradient norm of each parameter group; gradients have to be whole on this
        rank.
        """
        norms = []
        for group in self.optimizer.param_groups:
            gradients = [
                parameter.grad for parameter in group["params"] if parameter.grad is not None
            ]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return tuple(norms)

    def _set_rates(self, learning_rates: list[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate

    def _reset_untouched_groups(self) -> None:
        # groups that have had no gradient yet
        self._untouched = set(range(len(self.optimizer.param_groups)))

    def _restart_untouched_counts(self) -> None:
        """Start Adam's count of steps at a group's first gradient (the policy's, after a warm-up of
        the critic).

        Bias correction (Kingma and Ba 2015, sec. 3) divides the moments by what so many gradients
        would have given: had steps without a gradient counted, the first ones after them would be
        several times too large.
        """
        for number in sorted(self._untouched):
            states = self._adam_states(number)
            own = sum(_second_moment(state) for state in states)
            if float(self.world.sum(float(own))) > 0:
                self._untouched.discard(number)
            else:
                for state in states:
                    # a number in bitsandbytes
                    state["step"] = state["step"] * 0

    def _adam_states(self, number: int) -> list[dict[str, Tensor]]:
        """Return Adam's state for each parameter of a group, this rank's part; none before the
        first step.
        """
        # ZeRO-1 and 2 wrap the optimizer
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return self._states_of(optimizer, optimizer.param_groups[number]["params"])

    def _states_of(self, optimizer: Any, parameters: list[Any]) -> list[dict[str, Tensor]]:
        return [
            optimizer.state[parameter] for parameter in parameters if optimizer.state.get(parameter)
        ]


def _second_moment(state: dict[str, Any]) -> Tensor:
    """Return the sum of Adam's second moments of a parameter, or one that is 0 where they are: with
    8 bits, of the blocks' scales.
    """
    names = ("exp_avg_sq", "absmax2", "state2")
    return next(state[name] for name in names if name in state).sum()


class DeepSpeedEngine(OptimizerEngine):
    """The same behind DeepSpeed. All `backward` calls of a step keep their gradients."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: DistributedContext,
        config: dict[str, Any],
    ):
        self.world = world
        zero = config["zero_optimization"]
        self.stage = zero.get("stage", 0)
        offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        # where it takes the parameters of a pass for all of them
        self.wants_all = {1: zero.get("overlap_comm"), 2: offloads}.get(self.stage)
        dtypes = {
            parameter.dtype for group in optimizer.param_groups for parameter in group["params"]
        }
        if torch.float64 in dtypes and self.stage not in (1, 2):
            raise UserError(
                f"dtype float64 is kept by ZeRO 1 and 2 and by plain python, not by ZeRO {self.stage}"
            )

        if self.stage == 3:
            deepspeed_backend.register_foreign_reads(module)
        self.engine = deepspeed_backend.initialize(module, optimizer, config)
        self.module = self.engine.module
        self.optimizer = self.engine.optimizer
        self._measured_norms: list[Tensor] = []
        if torch.bfloat16 in dtypes and self.stage in (1, 2):
            # else a norm that is not finite drops no step of weights in bfloat16
            self.optimizer.check_grad_overflow = True
        if torch.float64 in dtypes:
            deepspeed_backend.keep_float64(
                self.optimizer, world.rank, world.sum, self._measured_norms
            )
        elif self.stage > 0:
            deepspeed_backend.record_norms(self.optimizer, self._measured_norms)
        self._reset_untouched_groups()

    def backward(self, loss: Tensor, last: bool) -> None:
        # without an explicit boundary ZeRO-1 and 2 would drop all gradients but the last call's;
        # ZeRO-3 with its optimizer offloaded hands over, at the boundary, the gradients of that
        # pass alone
        self.engine.set_gradient_accumulation_boundary(last or self.stage == 3)
        if self.stage == 3:
            # it counts passes in engine.forward, which roles do not go through; at 0 it overwrites
            self.optimizer.micro_step_id = 1
        if self.wants_all:
            # ZeRO-2 offloaded: those of the first pass overwrite what the last step has left, and those
            # of the boundary alone are handed over. ZeRO-1 overlapped: the others keep this rank's sum
            trained = filter(lambda parameter: parameter.requires_grad, self.module.parameters())
            loss = loss + sum(0.0 * parameter.sum() for parameter in trained)
        # DeepSpeed averages over ranks; ours are parts to be summed
        self.engine.backward(loss * self.world.size)

    def step(self, learning_rates: list[float], *, discard: bool = False) -> float:
        self._set_rates(learning_rates)
        norm = math.nan
        if self.stage == 0:
            # the engine reports no norm there in fp32; its gradients are whole by now
            if not discard:
                gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
                norm = float(torch.nn.utils.get_total_norm(gradients))
                self.group_norms = self._norms_of_groups()
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return norm

        self._measured_norms.clear()
        with self._norm_is_nan() if discard else contextlib.nullcontext():
            self.engine.step()
        if self.stage > 0 and not discard:
            self.group_norms = self._combine_measured_norms()
        if self.stage == 3:
            # it is always added to (see `backward`), so it is emptied here
            self.optimizer.grad_partitions_flat_buffer.zero_()
        if discard:
            return math.nan
        self._restart_untouched_counts()
        reported = self.engine.get_global_grad_norm()
        return norm if reported is None else float(reported)

    def _combine_measured_norms(self) -> tuple[float, ...]:
        """Return the norm of each parameter group, NaN for one that is not finite; ZeRO-3 divides
        groups into sub-groups and measures those.
        """
        count = len(self.optimizer.param_groups)
        if not self._measured_norms:
            # ZeRO drops a step before it measures one, if it looks at the gradients themselves
            return (math.nan,) * count
        group_of = (
            self.optimizer.sub_group_to_group_id
            if self.stage == 3
            else range(len(self._measured_norms))
        )
        squares = [0.0] * count
        for index, norm in enumerate(self._measured_norms):
            # ZeRO gives -1 for one that is not finite
            squares[group_of[index]] += float(norm) ** 2 if norm >= 0 else math.nan
        return tuple(map(math.sqrt, squares))

    @contextlib.contextmanager
    def _norm_is_nan(self) -> Iterator[None]:
        """Let ZeRO's optimizer measure NaN as its gradient norm.

        ZeRO has no call that drops a step, but it drops one whose norm is not finite and empties
        all its buffers.
        """
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        nan = torch.tensor(math.nan, device=self.world.device)
        original = getattr(self.optimizer, name)
        setattr(self.optimizer, name, lambda: [nan] if self.stage == 3 else nan)
        try:
            yield
        finally:
            setattr(self.optimizer, name, original)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.engine.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        self._reset_untouched_groups()
        deepspeed_state.load(self.engine, folder, "engine")

    def _adam_states(self, number: int) -> list[dict[str, Tensor]]:
        if self.stage != 3:
            return super()._adam_states(number)
        # groups are empty between steps there
        group_of = self.optimizer.sub_group_to_group_id
        parts = enumerate(self.optimizer.fp32_partitioned_groups_flat)
        parameters = [part for index, part in parts if group_of[index] == number]
        return self._states_of(self.optimizer.optimizer, parameters)


def fill_auto(
    config: dict[str, Any], micro_batch_size: int, max_grad_norm: float
) -> dict[str, Any]:
    """Return the DeepSpeed JSON with every "auto" replaced by what the trainer knows."""
    config = copy.deepcopy(config)
    config.pop("train_batch_size", None)
    zero = config.get("zero_optimization", {"stage": 0})
    return config | {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 10**9,
        # what is frozen or trained whole keeps its dtype; adapters and heads on them stay in fp32
        "bf16": {"enabled": False},
        "zero_optimization": {key: value for key, value in zero.items() if value != "auto"},
    }
