"""The plan as tables in a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf.plan.devices import CPU_SHARE, LEARNING_SHARE, SAMPLING_SHARE
from rlhf.plan.run import Plan

GB = 1e9
WIDTH = 120


def show(plan: Plan, remedy: str) -> None:
    """Print a plan, and what makes it fit where it does not."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    numbers = ", ".join(f"{value:,} {name}" for name, value in plan.numbers.items())
    where = "plain python" if plan.stage is None else f"ZeRO {plan.stage}"
    say(f"{plan.program} of {plan.model} on {plan.ranks} x {plan.device.name}, {where}")
    say(f"parameters: {numbers}")
    console.print(memory_table(plan))
    fits = "fits" if plan.fits else "DOES NOT FIT"
    say(
        f"{fits}: {plan.peak.total / GB:.1f} GB in '{plan.peak.name}', of {plan.usable / GB:.1f} GB that tensors can "
        f"take of {plan.device.memory / GB:.0f}. {remedy}"
    )
    if plan.stage is not None:
        console.print(stage_table(plan))
    console.print(work_table(plan))
    for note in [*plan.notes, assumed(plan)]:
        say(f"- {note}")


def memory_table(plan: Plan) -> Table:
    """Return bytes by what they are for, a column for each phase."""
    table = Table(title="GB on each rank at the peak of each phase")
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right")
    # every part of any phase, in the order of the first one that has it
    names: dict[str, None] = {}
    for phase in plan.phases:
        names |= dict.fromkeys(phase.parts)
    for name in names:
        sizes = [phase.parts.get(name, 0) for phase in plan.phases]
        if any(sizes):
            table.add_row(name, *map(_cell, sizes))
    totals = [phase.total for phase in plan.phases]
    table.add_row("all", *map(_cell, totals), style="bold")
    return table


def stage_table(plan: Plan) -> Table:
    """Return what a rank holds between passes under each ZeRO stage."""
    table = Table(title="GB on each rank between passes, by ZeRO stage")
    table.add_column("stage")
    names = []
    for name in plan.stages[0]:
        sizes = [row[name] for row in plan.stages]
        # a part that no stage holds has no column
        if name not in ("stage", "total") and any(sizes):
            names.append(name)
    for name in [*names, "all"]:
        table.add_column(name, justify="right")
    for row in plan.stages:
        style = "bold" if row["stage"] == plan.stage else None
        sizes = [row[name] for name in [*names, "total"]]
        table.add_row(str(row["stage"]), *map(_cell, sizes), style=style)
    return table


def work_table(plan: Plan) -> Table:
    """Return tokens, FLOPs, hours and cost of each kind of work."""
    what = "one step" if plan.is_one_step else f"{plan.steps:,} steps"
    table = Table(title=f"work of {what}, over all ranks")
    names = ["", "tokens", "PFLOP", "hours"]
    if plan.price is not None:
        names.append("cost")
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    tokens = flops = seconds = 0
    for part in plan.work:
        table.add_row(*_work_cells(plan, part.name, part.tokens, part.flops, part.seconds))
        tokens += part.tokens
        flops += part.flops
        seconds += part.seconds
    table.add_row(*_work_cells(plan, "all", tokens, flops, seconds), style="bold")
    return table


def _work_cells(plan: Plan, name: str, tokens: float, flops: float, seconds: float) -> list[Any]:
    cells = [name, f"{tokens:,.0f}", f"{flops / 1e15:,.3g}", f"{seconds / 3600:,.3g}"]
    if plan.price is not None:
        cells.append(f"{plan.price * plan.ranks * seconds / 3600:,.2f}")
    return cells


def _cell(size: float) -> str:
    """Return bytes in GB; nothing where there are none, so that what counts stands out."""
    return f"{size / GB:.2f}" if size else ""


def assumed(plan: Plan) -> str:
    """Return what the time is computed from."""
    peak = plan.device.flops
    if plan.device.name == "this CPU":
        return f"measured {peak / 1e9:.0f} GFLOP/s in a matrix product, of which {CPU_SHARE:.0%} are assumed"
    return (
        f"assumed: {LEARNING_SHARE:.0%} of {peak / 1e12:.0f} TFLOP/s (bf16) in passes, {SAMPLING_SHARE:.0%} of "
        f"{plan.device.bandwidth / 1e12:.1f} TB/s in sampling, which reads all weights for each token"
    )
