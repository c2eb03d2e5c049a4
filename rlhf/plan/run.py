"""The plan of one run: its memory, its work, and whether it fits."""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf.data.sources import is_path, is_store, rows
from rlhf.model.files import adapter_base, is_adapter
from rlhf.plan.devices import Device, usable
from rlhf.plan.estimate import estimate, setup_of
from rlhf.plan.memory import Phase, state_table
from rlhf.plan.roles import Start
from rlhf.plan.shape import read_shape
from rlhf.plan.work import Work, work_of


@dataclass
class Plan:
    """What a run will take; bytes on each rank, work over all of them."""

    program: str
    model: str
    device: Device
    ranks: int
    # the ZeRO stage that is at work; None without a launcher
    stage: int | None
    numbers: dict[str, int]
    phases: list[Phase]
    stages: list[dict[str, Any]]
    usable: float
    steps: int
    # whether `work` is that of one step, because the rows of the data are not known
    is_one_step: bool
    work: list[Work]
    price: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.usable

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.work)

    @property
    def cost(self) -> float | None:
        """Return the price of all devices for the run's hours."""
        return None if self.price is None else self.price * self.ranks * self.seconds / 3600


def plan_run(program: str, options: Any, config: Any, device: Device) -> Plan:
    """Return the plan of a program with these options; `config` says on what, see `PlanConfig`."""
    start, notes = read_start(program, options, config.model)
    is_gpu = config.gpu != "cpu"
    # on one CPU the programs are started without a launcher
    launched = config.launched and (is_gpu or config.gpus > 1)
    device_type = "cuda" if is_gpu else "cpu"
    setup = setup_of(program, options, config.gpus, device_type, launched=launched)
    count = config.rows or rows_of(options.data)
    # without mean lengths, every row is taken for as long as it may be
    lengths = (
        config.prompt_tokens or options.max_prompt_length,
        config.response_tokens or options.max_response_length,
    )
    found = estimate(program, options, start, setup)
    costs, read = found.costs, found.sampled_bytes
    steps, work = work_of(program, options, costs, setup, device, lengths, count, read)
    if config.prompt_tokens is None or config.response_tokens is None:
        notes.append(
            "time is for rows of the greatest length: give --prompt_tokens, --response_tokens"
        )
    is_one_step = program != "ppo" and options.max_steps <= 0 and count is None
    if is_one_step:
        notes.append(
            "the rows of the data are not known: give --rows for the time of the whole run"
        )
    if program == "ppo" and any(map(_is_remote, options.reward)):
        notes.append("scorers behind a server are not counted")
    return Plan(
        program,
        config.model or options.model_name_or_path,
        device,
        config.gpus,
        setup.stage if launched else None,
        found.numbers,
        found.phases,
        state_table(found.weights, setup),
        usable(device, is_gpu),
        steps,
        is_one_step,
        work,
        config.price,
        notes,
    )


def _is_remote(scorer: dict[str, Any]) -> bool:
    """Return whether a scorer's work is done elsewhere."""
    return "http" in scorer or "openai" in scorer


def read_start(program: str, options: Any, model: str | None) -> tuple[Start, list[str]]:
    """Return what a run starts from, and what was assumed of it."""
    path = options.model_name_or_path
    if is_adapter(path):
        return Start(read_shape(model or adapter_base(path)), path, has_adapter=True), []
    is_there = (Path(path) / "config.json").is_file()
    if is_there or not model or program == "sft" or not getattr(options, "use_peft", True):
        return Start(read_shape(model or path)), []
    note = f"{path} is not there: taken for an adapter on {model}, with the options' lora_r"
    return Start(read_shape(model), None, has_adapter=True), [note]


def rows_of(sources: list[str]) -> int | None:
    """Return the rows of the data, or None where they are not all in files here."""
    for source in sources:
        # names on the Hub are not fetched for a plan, and a store holds votes, not rows
        if not is_path(source) or not Path(source).is_file() or is_store(source):
            return None
    return sum(1 for _ in chain.from_iterable(map(rows, sources)))
