"""`rlhf doctor`: look at the machine and at what a run needs, and say what to do."""

import dataclasses
import json
from dataclasses import asdict, dataclass
from functools import partial, update_wrapper
from typing import Any

from rlhf.config import option, parse, read_file
from rlhf.doctor import inputs, machine
from rlhf.doctor.findings import Check, Finding, run_check
from rlhf.errors import EarlyExit
from rlhf.files import cache_folder
from rlhf.options.programs import PROGRAMS, command_of, programs_of
from rlhf.values import is_required


@dataclass
class DoctorConfig:
    """Look at this machine, and at the models and data that a run would read: each line is good, or
    says what to do. The exit code is 0 where all is good, else 1.
    """

    run_config: str | None = option(
        None, "a program's YAML file; also look at the models, data and services that it names"
    )
    json: bool = option(False, "print JSON instead of lines")


def read_program(path: str) -> dict[str, Any]:
    """Return the options that a program's YAML file gives. Raises UserError, as the program would, for
    what it would refuse; options that are missing may come from its command line.
    """
    # what several programs know is the same option in each of them
    program = programs_of(path)[0]
    options, command = PROGRAMS[program], command_of(program)
    values = read_file(options, path, command)
    required = {field.name for field in dataclasses.fields(options) if is_required(field)}
    if required <= values.keys():
        # ranges, and what does not go together
        parse(options, ["--config", path], command)
    return values


def checks_of(options: dict[str, Any]) -> list[Check]:
    """Return the checks in the order of the report."""
    places = (str(options.get("output_dir") or "."), str(cache_folder()))
    checks: list[Check] = [
        _with(machine.versions, inputs.extras_of(options)),
        machine.accelerator,
        machine.compiler,
        machine.operators,
        _with(machine.room, places),
        machine.ports,
        machine.addresses,
    ]
    for check in (inputs.models, inputs.scorers, inputs.data, inputs.vllm, inputs.wandb):
        checks.append(_with(check, options))
    return checks


def _with(check: Any, argument: Any) -> Check:
    return update_wrapper(partial(check, argument), check)


def doctor(config: DoctorConfig) -> None:
    """Print a line for each finding; raise EarlyExit with code 1 where one is no good."""
    options = read_program(config.run_config) if config.run_config else {}
    findings: list[Finding] = []
    for check in checks_of(options):
        for finding in run_check(check):
            findings.append(finding)
            # as they come: the network may take its time
            if not config.json:
                _print(finding)

    faults = sum(not finding.good for finding in findings)
    if config.json:
        listed = [{**asdict(finding), "good": finding.good} for finding in findings]
        print(json.dumps({"good": not faults, "findings": listed}, indent=1))
    if faults:
        # the JSON is all that a program would read
        raise EarlyExit("" if config.json else f"{faults} to look at", 1)


def _print(finding: Finding) -> None:
    mark = "good" if finding.good else "FAULT"
    print(f"{mark:<6}{finding.name:<14} {finding.found}", flush=True)
    if not finding.good:
        print(f"{'':<6}{'':<14} -> {finding.remedy}", flush=True)
