"""`rlhf brand run FILE`: from a brand voice to an adapter with a ship verdict.

A plan for the runner of experiments: what is done is not done again, a run that was cut off goes on
when the same command is given, and results of other options are refused, or set aside with
`--redo true`. Where people are to judge, the run stops and says how; the same command goes on.
"""

import math
import shlex
import tempfile
from pathlib import Path

from rlhf.brand.config import BrandConfig
from rlhf.brand.gates import groups_needed, least_increase_shown, read_gates
from rlhf.brand.pairs import write_rows
from rlhf.brand.plan import (
    SPLITS,
    VERDICT_FILES,
    options_of,
    people_file,
    plan,
    read_events,
    run_folder,
    waits_for,
)
from rlhf.brand.prompts import fill
from rlhf.brand.verdict import read_verdict, text_lines
from rlhf.collect.status import summary
from rlhf.config import save_options
from rlhf.data.load import load
from rlhf.data.records import Prompt
from rlhf.data.store import Store
from rlhf.errors import EXIT_INTERRUPTED, EarlyExit, UserError, near_file
from rlhf.files import dumps, write_atomic
from rlhf.jobs.runner import RunOptions, claim, run_jobs, set_jobs, stop_at_failure
from rlhf.jobs.state import PlanState
from rlhf.jobs.steps import StepDisplay

EXPORTED = "To ship it: {command}"
TOO_FEW = (
    "the gate 'refusals' asks that at most {bound:g} more of the answers refuse than the base's, and with {groups} "
    "groups of test prompts not even an adapter that never refuses can show it: {needed}. Give more prompts (values of "
    "a template cost nothing) or a larger test_fraction, ask for less with gates: {{refusals: {least:.2g}}}, or turn "
    "the gate off with gates: {{refusals: null}}"
)
NOT_EXPORTED = "It is not exported. What blocks it is in {report}."
WAITING = (
    "{store}: {complete} of {pairs} pairs are judged{decided}. Let people judge the rest:\n"
    "  rlhf collect serve {store} --annotators NAME,NAME --overlap {overlap} --voice {voice}\n"
    "Then give the same command again: rlhf brand run goes on by itself."
)


def run_brand(config: BrandConfig) -> dict:
    """Do every job that is not done, and return the verdict.

    Raises UserError naming the log where a job fails, EarlyExit on a signal or where people have to
    judge first.
    """
    check_files(config)
    check_test_prompts(config)
    state = PlanState(Path(config.output_dir))
    how = RunOptions(
        launcher=config.launcher,
        stop_at_failure=True,
        changed="set aside" if config.redo else "refuse",
    )
    with claim(state) as signals:
        events = read_events(config)
        set_jobs(state, plan(config, events), how)
        # a store that was set aside takes with it what people had judged
        events = read_events(config)
        save_options(config, state.folder / "brand.yaml")
        display = StepDisplay(state)
        was_there = "verdict" in state.done
        display.show_reused()
        while True:
            set_jobs(state, plan(config, events, ships=ships(config, state)), how)
            run_jobs(state, how, display, signals)
            stop_at_failure(state)
            store = waits_for(config, events)
            if store:
                events[store] = event_of_people(config, store)
                file = Path(people_file(config, store))
                write_atomic(file, dumps({"event": events[store]}) + "\n")
            # the verdict may add the export
            elif len(plan(config, events, ships=ships(config, state))) == len(state.jobs):
                break
    return show_verdict(config, was_there=was_there)


def check_files(config: BrandConfig) -> None:
    """Raise UserError where a file is named that is not there; nothing has been made yet."""
    named = [config.voice]
    if "config" in config.train:
        named.append(config.train["config"])
    for file in named:
        if not Path(file).is_file():
            raise UserError(f"{file}: no such file{near_file(file)}")
    for file in (*config.prompts, *config.texts, *config.task):
        # a name on the Hub has no ending
        if Path(file).suffix and not Path(file).is_file():
            raise UserError(f"{file}: no such file{near_file(file)}")


def check_test_prompts(config: BrandConfig) -> None:
    """Raise UserError where the test prompts are too few for the gate `refusals` of an adapter that
    never refuses: training would end in a verdict that nothing could change.

    A base that refuses itself leaves more room, but how often it does is not known before it is asked.
    """
    bound = read_gates(config.gates).refusals
    if bound is None:
        return
    groups = test_groups(config)
    least = least_increase_shown(groups)
    if least <= bound:
        return
    needed = groups_needed(bound)
    remedy = f"it takes {needed}" if needed else "no number can"
    # a bound that is rounded up can be kept
    possible = math.ceil(100 * least) / 100 if math.isfinite(least) else 1
    raise UserError(TOO_FEW.format(bound=bound, groups=groups, needed=remedy, least=possible))


def test_groups(config: BrandConfig) -> int:
    """Return how many groups of test prompts the A/B has at most."""
    with tempfile.TemporaryDirectory() as folder:
        sources = config.prompts
        if config.templates:
            file = f"{folder}/prompts.jsonl"
            write_rows(file, fill(config.templates))
            sources = [file]
        fractions = options_of(config, SPLITS)
        found = load(sources, Prompt, split="test", quiet=True, **fractions)
    groups = len({record.group for record in found})
    return groups if config.test_prompts is None else min(groups, config.test_prompts)


def event_of_people(config: BrandConfig, name: str) -> int:
    """Return the newest event of a store that people have judged enough. Raises EarlyExit, which
    says how to go on, where they have not.

    Enough: every pair has its votes; between policies also where the rule that may be read at any
    time has decided (rlhf/voting/rates.py).
    """
    path = f"{config.output_dir}/{name}.db"
    with Store.open(path) as store:
        # until the app is served, which sets it
        if store.setting("overlap") is None:
            store.set_setting("overlap", str(config.votes_per_pair))
        found = summary(store)
    progress, votes = found["progress"], found["votes"]
    is_decided = bool(votes) and all(pair["stop"]["state"] != "open" for pair in votes["pairs"])
    if progress["complete"] == progress["all"] or is_decided:
        return found["event"]
    raise EarlyExit(
        WAITING.format(
            store=path,
            complete=progress["complete"],
            pairs=progress["all"],
            decided=", and they do not decide yet" if votes else "",
            overlap=config.votes_per_pair,
            voice=config.voice,
        ),
        EXIT_INTERRUPTED,
    )


def ships(config: BrandConfig, state: PlanState) -> bool:
    """Return whether the verdict of this plan is there and says so."""
    verdicts = [job for job in state.jobs if job.name == "verdict"]
    return any(map(state.is_done, verdicts)) and read_verdict(config.output_dir)["ship"]


def show_verdict(config: BrandConfig, *, was_there: bool) -> dict:
    """Print what follows from the verdict, and the verdict where no job has just printed it; return
    it.
    """
    found = read_verdict(config.output_dir)
    report = f"{config.output_dir}/{VERDICT_FILES[0]}"
    if was_there:
        print("\n" + "\n".join(text_lines(found)))
    if not found["ship"]:
        print(NOT_EXPORTED.format(report=report))
    elif config.export == "none":
        command = ["rlhf", "export", run_folder(config), "--to", "merged"]
        print(EXPORTED.format(command=shlex.join(command)))
    else:
        print(f"exported: {config.output_dir}/export/{config.export}")
    print(f"report: {report}")
    return found
