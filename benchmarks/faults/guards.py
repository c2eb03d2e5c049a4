"""Do the guards catch what they are for? Faults put into real PPO runs that are healthy until then,
one at a time.

    python -m benchmarks.faults.guards               # a model made in memory: minutes on one core
    python -m benchmarks.faults.guards --model runs/quickstart/sft --data runs/sandbox/prompts.jsonl
    python -m benchmarks.faults.guards --simulate    # the test for reward hacking on made-up noise
    python -m benchmarks.faults.guards --errors      # kl/sequence +- its standard errors on made-up rollouts
    python -m benchmarks.faults.guards --clean runs/ppo-seeds/*    # what guards did in finished runs

Each prints a Markdown table. The first ends with exit code 1 if a fault was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.data.records import BadScore, Prompt, Samples, Scores
from rlhf.errors import UserError
from rlhf.guards import Decision
from rlhf.model.adapters import lora_config
from rlhf.model.loading import load_model
from rlhf.model.tokenizer import stop_ids
from rlhf.ppo.guards import Guards
from rlhf.ppo.trainer import PPOConfig, PPOTrainer, TrainingData
from rlhf.ranks.distributed import DistributedContext
from rlhf.roles.one_base import Roles
from rlhf.stats import clustered_se, student_quantile

FAULT = 10  # the first step that is faulty; steps count from 1
HARD_LIMIT = 5  # updates within which NaN, ratio and KL explosions have to be caught
ABSURD = 3.0  # a step size
SINGLE = {"num_ppo_epochs": 1, "num_mini_batches": 1}  # one update a rollout
FREE = {"kl_coef": 0.0}


@dataclass
class Fault:
    """One way to break a run from step FAULT on, until step `last` (None: for ever)."""

    name: str
    guard: str  # that has to catch it
    hard: bool = False
    last: int | None = None
    score: Callable[[Samples], Scores] | None = None  # in the place of the healthy scorer
    # a context around one update, or all
    poison: Callable[[PPOTrainer, Any, Any], Any] | None = None
    rate: float | None = None  # the policy's step size
    options: dict[str, Any] = field(default_factory=dict)
    guards: dict[str, Any] = field(default_factory=dict)
    steps: int = 60

    def strikes(self, step: int) -> bool:
        return step >= FAULT and (self.last is None or step <= self.last)


# what is scored: any function of the ids will do, so that it works on every vocabulary


def share(ids: list[int], rest: int = 0) -> float:
    """Share of the tokens whose number leaves this rest when divided by 4."""
    return sum(token % 4 == rest for token in ids) / len(ids)


def each(function: Callable[[list[int]], float]) -> Callable[[Samples], Scores]:
    return lambda samples: Scores([function(ids) for ids in samples.response_ids])


def nan_for_one(samples: Samples) -> Scores:
    """As a scorer does that divides by nothing for one response; `checked` in reward/compose.py
    says it in these words.
    """
    message = f"scorer 'tone' returned nan for prompt {samples.prompts[0][-1]['content']!r}"
    raise BadScore(message, "tone", 0, math.nan)


def repeats(ids: list[int]) -> float:
    """How often a token is the one before."""
    return 8 * sum(a == b for a, b in itertools.pairwise(ids)) / len(ids)


def overdone(samples: Samples) -> Scores:
    """A proxy that pays for a kind of token without end; gold likes a third of them, and no more
    (Gao et al. 2023).
    """
    shares = [share(ids) for ids in samples.response_ids]
    proxy = [4 * s for s in shares]
    return Scores(proxy, {"proxy": proxy, "gold": [4 * min(s, 0.9 - 1.5 * s) for s in shares]})


# what is poisoned, for one update


@contextlib.contextmanager
def nan_in_batch(trainer: PPOTrainer, rollout, rows):
    """One NaN among the log-probabilities that were kept."""
    kept = rollout.logprobs[rows[0], 0].clone()
    rollout.logprobs[rows[0], 0] = math.nan
    yield
    rollout.logprobs[rows[0], 0] = kept


@contextlib.contextmanager
def nan_in_weight(trainer: PPOTrainer, rollout, rows):
    weight = trainer.roles.parameters_of("policy")[0]
    kept = weight.detach()[0, 0].clone()
    weight.data[0, 0] = math.nan
    yield
    weight.data[0, 0] = kept


@contextlib.contextmanager
def infinite_gradient(trainer: PPOTrainer, rollout, rows):
    """An overflow on the way back, which no loss shows."""
    weight = trainer.roles.parameters_of("policy")[0]
    hook = weight.register_hook(lambda gradient: gradient * math.inf)
    yield
    hook.remove()


FAULTS = [
    Fault("NaN score, once", "not_finite", hard=True, last=FAULT, score=nan_for_one, steps=20),
    Fault("NaN score for ever", "not_finite", hard=True, score=nan_for_one, steps=20),
    Fault("NaN loss, one update", "not_finite", hard=True, last=FAULT, poison=nan_in_batch, steps=20),
    Fault("NaN weight during one update", "not_finite", hard=True, last=FAULT, poison=nan_in_weight, steps=20),
    Fault("NaN loss for ever", "not_finite", hard=True, poison=nan_in_batch, steps=20),
    Fault("infinite gradient, finite loss", "not_finite", hard=True, last=FAULT, poison=infinite_gradient, steps=20),
    Fault("step size 3, one step", "ratio", hard=True, last=FAULT, rate=ABSURD, steps=20),
    Fault("step size 3", "ratio", hard=True, rate=ABSURD, steps=20),
    Fault("step size 3, one step, rolled back", "ratio", hard=True, last=FAULT, rate=ABSURD, steps=20,
          guards={"ratio": "rollback"}),
    Fault("step size 3, one update a rollout", "max_kl", hard=True, rate=ABSURD, options=SINGLE, steps=20,
          guards={"max_kl": 10}),
    Fault("drift: no KL penalty", "max_kl", score=each(lambda ids: 4 * share(ids, 1)), options=FREE,
          guards={"max_kl": 30}),
    Fault("pays for one answer", "entropy", score=each(lambda ids: -sum(ids) / 200), options=FREE, steps=90),
    Fault("pays for length", "length", score=each(lambda ids: len(ids) / 2), options=FREE),
    Fault("pays for brevity", "length", score=each(lambda ids: -len(ids) / 2), options=FREE),
    Fault("pays for saying it again", "repetition", score=each(repeats), options=FREE),
    Fault(
        "pays for not ending",
        "truncation",
        score=lambda s: Scores([0.0 if e else 4.0 for e in s.ended]),
        options=FREE,
    ),
    Fault("scorer says one thing", "score_collapse", score=each(lambda ids: 1.0), steps=30),
    Fault("overdone proxy, gold watched", "hacking", score=overdone, options=FREE, steps=90),
]  # fmt: skip


HEALTHY = each(lambda ids: 4 * share(ids))


@dataclass
class Seen:
    """What a run with a fault showed. `found` has each decision with the number of updates begun
    since the fault.
    """

    found: list[tuple[Decision, int]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    updates: int = 0
    harmed: bool = False  # an update that was refused has changed weights
    end: str = ""

    @property
    def early(self) -> list[Decision]:
        """False alarms."""
        return [decision for decision, _ in self.found if decision.step < FAULT]

    def first(self, guard: str) -> tuple[Decision, int] | None:
        return next(((d, n) for d, n in self.found if d.guard == guard and d.step >= FAULT), None)


def play(fault: Fault, make: Callable[[Fault, Callable], PPOTrainer]) -> Seen:
    """One run with the fault. A rollback goes to a checkpoint of any step, in a folder that is
    thrown away.
    """
    seen = Seen()

    def score(samples: Samples) -> Scores:
        # which becomes a fault by itself, when gold has had enough
        always = fault.score is overdone
        if fault.score and (always or fault.strikes(trainer.steps_done + 1)):
            return fault.score(samples)
        return HEALTHY(samples)

    def note() -> None:
        seen.found += [
            (decision, seen.updates) for decision in trainer.guards.decisions.drain_events()
        ]

    trainer = make(fault, score)
    spoil(trainer, fault, seen, note)
    with tempfile.TemporaryDirectory() as folder:

        def on_step(step, metrics, rollout) -> None:
            seen.metrics.append(metrics)
            note()
            place = Path(folder) / str(step)
            place.mkdir(exist_ok=True)
            trainer.save(place)

        def roll_back(decision: Decision) -> bool:
            trainer.load(Path(folder) / str(decision.since - 1), after=decision)
            return True

        try:
            did = "stopped at" if trainer.train(on_step, roll_back) else "went on to"
            seen.end = f"{did} step {trainer.steps_done}"
        except BadScore:
            seen.end = f"stopped at step {trainer.steps_done + 1} by the scorer's message"
    note()
    seen.events = trainer.guards.decisions.events
    return seen


def spoil(trainer: PPOTrainer, fault: Fault, seen: Seen, note: Callable[[], None]) -> None:
    """Put the fault's poison and step size where they belong, and look at each update from outside."""
    update, rates = trainer.update, trainer.learning_rates

    def spoiled_update(experience, rows, sizes, step=0, number=0):
        poison = contextlib.nullcontext()
        seen.updates += step + 1 >= FAULT
        if fault.poison and fault.strikes(step + 1) and (fault.last is None or seen.updates == 1):
            poison = fault.poison(trainer, experience.rollout, rows)
        before = trainer.learner.state_dict()
        with poison:
            metrics, decision = update(experience, rows, sizes, step, number)
        note()
        if decision is not None and decision.action != "warn":
            after = trainer.learner.state_dict()
            seen.harmed |= not all(torch.equal(before[name], after[name]) for name in before)
        return metrics, decision

    def spoiled_rates(step: int) -> list[float]:
        # what happened once does not come again
        over = fault.last is not None and trainer.guards.decisions.rollbacks
        first, *others = rates(step)
        if fault.rate and fault.strikes(step + 1) and not over:
            first = fault.rate
        return [first, *others]

    trainer.update, trainer.learning_rates = spoiled_update, spoiled_rates


def row(fault: Fault, seen: Seen) -> tuple[list[str], bool]:
    """Return a line of the table, and whether the fault was caught as it has to be."""
    done = []
    for event in seen.events:
        times = f" x {event['times']}" if event["times"] > 1 else ""
        done.append(f"{event['guard']}: {event['action']}{times}")
    changed = dict(fault.options)
    if fault.guards:
        changed["guards"] = fault.guards
    options = [f"`{name}: {value}`".replace("'", "") for name, value in changed.items()]
    cells = [fault.name, ", ".join(options) or "-"]

    caught = seen.first(fault.guard)
    if caught is None:
        return [*cells, "**missed**", "-", "; ".join(done) or "-", seen.end, "-"], False
    decision, updates = caught
    in_time = True
    if fault.hard:
        after = f"update {updates}" if updates else "scoring, no update"
        in_time = updates <= HARD_LIMIT
    elif fault.guard == "hacking":
        after = f"{decision.step - peak(seen)} steps after gold's best"
    else:
        sustained = decision.step - decision.since
        after = f"{decision.step - FAULT + 1} steps, {sustained} since the threshold"

    end = seen.end
    if seen.early:
        end += "; **a false alarm before**"
    if seen.harmed:
        end += "; **harmed**"
    reason = decision.reason.split(":")[0]
    cells += [f"`{decision.guard}`", after, "; ".join(done), end, reason]
    return cells, in_time and not seen.early and not seen.harmed


def peak(seen: Seen) -> int:
    """The step about which gold was best, as a mean over five steps."""
    gold = [m["score/gold"] for m in seen.metrics]
    means = [sum(gold[i - 2 : i + 3]) / 5 for i in range(2, len(gold) - 2)]
    return means.index(max(means)) + 3


# where runs come from


def in_memory(folder: str) -> tuple[str, list[dict], list[int]]:
    """A tiny model with random weights, its tokenizer, prompts, and the one token in twelve that
    ends a response.
    """
    from tests.conftest import make_model, make_tokenizer

    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = ("one", "three", "seventeen", "a", "of it", "many things", "yes", "no")
    rows = []
    for text in texts:
        record = Prompt(prompt=[{"role": "user", "content": text}])
        rows.append({"prompt_ids": tokenizer(text)["input_ids"], "record": record})
    return folder, rows, [tokenizer.eos_token_id, *range(3, len(tokenizer), 12)]


def maker(
    model: str, rows: list[dict] | None, stops: list[int] | None, data: str | None, seed: int
) -> Callable:
    """(fault, scorer) -> trainer on this model; rows and stops None: those of the data and the
    model.
    """

    def make(fault: Fault, scorer: Callable) -> PPOTrainer:
        values = {
            "model_name_or_path": model, "data": [data or "-"], "output_dir": "-", "reward": [{"model": "-"}],
            "rollout_batch_size": 64, "total_episodes": 64 * fault.steps, "per_device_train_batch_size": 64,
            "num_ppo_epochs": 2, "num_mini_batches": 2, "learning_rate": 3e-3, "seed": seed,
            "lr_scheduler_type": "constant", "missing_eos_score": None, "max_response_length": 48 if data else 24,
        }  # fmt: skip
        config = PPOConfig(**(values | fault.options), guards=fault.guards)
        torch.manual_seed(seed)
        initial = load_model(model, "float32")
        prompts, ends = rows, stops
        if data:
            from rlhf.data.encode import encode_prompts
            from rlhf.data.load import load

            prompts = encode_prompts(
                load([data], Prompt, split="train", limit=512), initial.tokenizer, 64
            )
            ends = stop_ids(initial.tokenizer, initial.model)
        roles = Roles(initial, lora_config(r=8))
        monitored = ["gold"] if fault.score is overdone else []
        training = TrainingData(prompts, initial.tokenizer, ends)
        return PPOTrainer(
            config, roles, scorer, training, DistributedContext(), monitored=monitored
        )

    return make


def inject(model: str | None, data: str | None, only: str | None, seed: int) -> tuple[str, bool]:
    """The table of all faults, and whether each was caught."""
    lines = table(["fault", "set", "caught by", "at", "what was done", "the run", "reason"])
    good = True
    with tempfile.TemporaryDirectory() as folder:
        start, rows, stops = (model, None, None) if model else in_memory(folder)
        make = maker(start, rows, stops, data, seed)
        for fault in FAULTS:
            if only and only not in (fault.guard, fault.name):
                continue
            cells, caught = row(fault, play(fault, make))
            good &= caught
            lines += table(cells)
            print("\n".join(lines) if len(lines) == 3 else lines[-1], flush=True)
    return "\n".join(lines) + "\n", good


# the test for reward hacking on made-up noise


def noise(rng: random.Random, correlation: float):
    """Numbers with mean 0 and variance 1, each correlated with the one before."""
    value = rng.gauss(0, 1)
    while True:
        yield value
        value = correlation * value + math.sqrt(1 - correlation**2) * rng.gauss(0, 1)


def alarm(
    rng: random.Random, monitored: Callable[[int], float], steps: int, correlation: float = 0.0
) -> int | None:
    """The step at which a run whose proxy rises by 0.3 a step is called hacked."""
    guards, proxies, others = Guards({}, ["gold"]), noise(rng, 0.0), noise(rng, correlation)
    for step in range(1, steps + 1):
        gold = monitored(step) + next(others)
        if guards.step(step, {"score/raw": 0.3 * step + next(proxies), "score/gold": gold}):
            return step
    return None


BEFORE = 40  # steps of health before a fall
# name -> fall after so many steps, rise a step before
FALLS: dict[str, tuple[Callable[[int], float], float]] = {
    "falls 0.2 a step": (lambda n: 0.2 * n, 0.0),
    "falls 0.3 a step": (lambda n: 0.3 * n, 0.0),
    "drops by 5 at once": (lambda n: 5.0, 0.0),
    "drops by 5 at once, rose by a third a step before": (lambda n: 5.0, 1 / 3),
    "drops by 8 at once": (lambda n: 8.0, 0.0),
    "drops by 8 at once, rose by a third a step before": (lambda n: 8.0, 1 / 3),
    "falls by 6 over 8 steps": (lambda n: min(6.0, 0.75 * n), 0.0),
}


def simulate(series: int) -> str:
    """False alarms and delays of the hacking test, over so many made-up series each."""
    lines = table(["watched score", "alarm"])
    for correlation in (0.0, 0.3, 0.5, 0.8):
        found = [alarm(random.Random(n), lambda step: 0.0, 80, correlation) for n in range(series)]
        share_of = sum(step is not None for step in found) / series
        lines += table(
            [f"does not move, correlation {correlation:g}, 80 steps", f"{100 * share_of:.1f} %"]
        )
    for name, (fall, rise) in FALLS.items():

        def monitored(step: int, fall=fall, rise=rise) -> float:
            return rise * min(step, BEFORE) - (fall(step - BEFORE) if step > BEFORE else 0.0)

        found = [alarm(random.Random(n), monitored, 2 * BEFORE) for n in range(series)]
        early = sum(step is not None and step <= BEFORE for step in found)
        delays = sorted(
            step - BEFORE if step else math.inf for step in found if step is None or step > BEFORE
        )
        half, most = delays[(len(delays) - 1) // 2], delays[math.ceil(0.9 * len(delays)) - 1]
        caught = f"{100 * sum(map(math.isfinite, delays)) / len(delays):.1f} % within {BEFORE}"
        rest = f"90 % within {most}, " if most < math.inf else ""
        lines += table(
            [name, f"half within {half} steps, {rest}{caught}; {100 * early / series:.1f} % before"]
        )
    return "\n".join(lines) + "\n"


def errors(rollouts: int) -> str:
    """How often kl/sequence with its standard error holds the truth over so many rollouts, rows as
    independent and by prompt. A prompt's KL is gamma distributed with mean 5, its samples normal
    with that mean and twice that variance. The last two: how often a KL of 0.01 is called negative
    at a step.
    """
    lines = table(["prompts x samples", "spread of prompts", "rows, 1.96", "by prompt, 1.96", "by prompt, t",
                   "negative, rows", "negative, by prompt"])  # fmt: skip
    for count, samples in ((64, 1), (16, 4), (8, 8)):
        clusters = [str(i // samples) for i in range(64)]
        for spread in (0.25, 0.5):
            rng = np.random.default_rng([count, int(100 * spread)])
            hits, below = np.zeros(3), np.zeros(2)
            for _ in range(rollouts):
                own = np.repeat(rng.gamma(spread**-2, spread**2, count), samples)
                noise = rng.standard_normal(64)
                kl = 5 * own + np.sqrt(10 * own) * noise
                none = 0.01 * own + np.sqrt(0.02 * own) * noise
                rows, by_prompt = kl.std(ddof=1) / 8, clustered_se(kl.tolist(), clusters)
                quantile = student_quantile(0.975, count - 1)
                reaches = [1.96 * rows, 1.96 * by_prompt, quantile * by_prompt]
                hits += abs(kl.mean() - 5) <= np.array(reaches)
                error = np.array([none.std(ddof=1) / 8, clustered_se(none.tolist(), clusters)])
                below += none.mean() + 3 * error < -0.01  # as the guard has it
            cells = [f"{count} x {samples}", f"{spread:g}"]
            cells += [f"{100 * hit / rollouts:.1f} %" for hit in hits]
            cells += [f"{100 * times / rollouts:.2f} %" for times in below]
            lines += table(cells)
    return "\n".join(lines) + "\n"


# runs that are there


def clean(folders: list[str]) -> str:
    """What the guards of finished runs did; raises UserError for a folder that holds none."""
    lines = table(["run", "seed", "steps", "events", "stopped"])
    stops = alarms = 0
    for folder in map(Path, folders):
        try:
            result = json.loads((folder / "result.json").read_text())
            metrics = (folder / "metrics.jsonl").read_text().splitlines()
            steps = max(json.loads(line)["step"] for line in metrics)
            did = result["guards"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder}: no finished PPO run there ({error})") from None
        events = [f"{e['guard']}: {e['action']} x {e['times']} from step {e['step']}" for e in did]
        stopped = result.get("stopped")
        stops, alarms = stops + bool(stopped), alarms + bool(events)
        about = [
            folder.name,
            str(result["seed"]),
            str(steps),
            "; ".join(events) or "-",
            stopped or "-",
        ]
        lines += table(about)
    return "\n".join(lines) + f"\n\n{len(folders)} runs, {alarms} with an event, {stops} stopped.\n"


def table(cells: list[str]) -> list[str]:
    """A line of a Markdown table; with its rule, where it is the head."""
    line = "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"
    return [line, "|" + "---|" * len(cells)] if cells[0] in HEADS else [line]


HEADS = ("fault", "watched score", "run", "prompts x samples")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a policy to break in the place of the one in memory")
    parser.add_argument("--data", help="its prompts")
    parser.add_argument("--only", help="one fault, or those of one guard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--series", type=int, default=400, help="made-up series each")
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--clean", nargs="+", metavar="RUN", help="folders of finished runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if bool(options.model) != bool(options.data):
        parser.error("--model and --data belong together")
    if options.clean:
        try:
            print(clean(options.clean), end="")
        except UserError as error:
            sys.exit(str(error))
    elif options.errors:
        print(errors(10 * options.series), end="")
    elif options.simulate:
        print(simulate(options.series), end="")
    elif not inject(options.model, options.data, options.only, options.seed)[1]:
        sys.exit("a fault was missed, came late, or followed a false alarm")


if __name__ == "__main__":
    main()
