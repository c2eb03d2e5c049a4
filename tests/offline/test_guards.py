"""The guards of SFT, reward models and DPO on numbers, and on runs that diverge."""

import json
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.config import parse
from rlhf.errors import EarlyExit, UserError
from rlhf.offline.callbacks import RunCallback
from rlhf.offline.guards import OfflineGuards
from rlhf.options.guards import OFFLINE_GUARDS
from rlhf.options.offline import SFTRunConfig
from rlhf.ranks.distributed import DistributedContext

PROGRAMS = tuple(OFFLINE_GUARDS)


def feed(guards: OfflineGuards, losses: list[float], start: int = 1) -> list[tuple]:
    """Return (step, guard, action) of each decision on these losses of steps."""
    return [
        (step, decision.guard, decision.action)
        for step, loss in enumerate(losses, start)
        for decision in guards.loss(step, loss)
    ]


def test_a_loss_twice_its_least_mean_for_five_steps_stops_the_run():
    guards = OfflineGuards("sft", {"loss_spike": "off"})
    # least mean of five steps: 2.0; the bound is 4.0
    assert feed(guards, [3.0] * 10 + [2.0] * 10) == []
    # 4.0 is not above it; four steps are too few
    assert feed(guards, [4.0] + [4.1] * 4 + [2.0], 21) == []
    assert feed(guards, [4.1] * 5, 41) == [(45, "divergence", "stop")]
    [event] = guards.decisions.events
    assert (
        "loss/total of a step is 4.1, above 4 (its least was 2), 5 times in a row"
        in event["reason"]
    )


def test_a_run_that_diverges_at_its_second_step_is_compared_with_the_first():
    guards = OfflineGuards("sft")
    # those above twice the first are no part of what is compared with
    assert feed(guards, [2.5] + [9.0] * 5) == [(6, "divergence", "stop")]


def test_a_loss_of_pairs_may_vary_far_above_its_mean_and_not_above_twice_chance():
    near_nothing = [0.69] * 5 + [0.01] * 40 + [0.9] * 12
    assert feed(OfflineGuards("dpo"), near_nothing) == []
    found = feed(OfflineGuards("dpo"), near_nothing[:45] + [1.5] * 5)
    assert (50, "divergence", "stop") in found


def test_a_spike_is_a_step_twice_and_eight_deviations_above_the_twenty_before():
    # mean 2.0, deviation 0.205 (ten of 1.8, ten of 2.2): bounds 4.0 and 3.64
    before = [1.8, 2.2] * 10
    assert feed(OfflineGuards("sft"), [*before, 3.9]) == []
    guards = OfflineGuards("sft")
    assert feed(guards, [*before, 4.1]) == [(21, "loss_spike", "warn")]
    # mean 2.0, deviation 1.026: the bound is 10.21
    wide = [3.0, 1.0] * 10
    assert feed(OfflineGuards("sft"), [*wide, 10.1]) == []
    assert feed(OfflineGuards("sft"), [*wide, 10.3]) == [(21, "loss_spike", "warn")]


def test_dpo_looks_at_kl_and_at_the_chosen_responses():
    guards = OfflineGuards("dpo")
    assert guards.logged(1, {"dpo/logprob_chosen": -20.0, "eval/kl/sequence": 100.0}) == []
    found = guards.logged(2, {"eval/kl/sequence": 101.0})
    assert [(d.guard, d.action) for d in found] == [("max_kl", "stop")]
    assert found[0].reason.startswith("eval/kl/sequence is 101, above 100: ")
    # three log lines below twice -20
    falling = [guards.logged(step, {"dpo/logprob_chosen": -41.0}) for step in (3, 4, 5)]
    assert [len(decisions) for decisions in falling] == [0, 0, 1]
    assert falling[2][0].guard == "chosen_logprob" and falling[2][0].action == "warn"
    # neither is a fault of the others
    assert OfflineGuards("sft").logged(1, {"eval/kl/sequence": 1e6}) == []


def test_chosen_responses_are_compared_with_the_mean_of_the_first_log_lines():
    guards = OfflineGuards("dpo")

    def warned(*logprobs):
        return [len(guards.logged(1, {"dpo/logprob_chosen": logprob})) for logprob in logprobs]

    # -50 is below twice -20: no part of the mean of -20, -30 and -34, whose double is -56
    assert warned(-20.0, -50.0, -30.0, -34.0) == [0] * 4
    assert warned(*[-55.9] * 4, *[-56.1] * 3) == [0] * 6 + [1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_noisy_runs_that_learn_raise_no_alarm(program):
    for seed in range(30):
        noise = random.Random(seed)
        if program == "sft":
            losses = [(1 + 2 * 0.99**i) * noise.lognormvariate(0, 0.2) for i in range(600)]
        else:
            # small batches of pairs, a quarter of them labelled wrongly
            losses = [
                sum(noise.choice((0.3, 0.3, 0.3, 1.4)) for _ in range(4)) / 4 for i in range(600)
            ]
            losses[0] = 0.6931
        assert feed(OfflineGuards(program), losses) == []


def test_rows_one_by_one_scatter_without_diverging():
    for seed in range(5):
        noise = random.Random(seed)
        losses = [noise.lognormvariate(0, 0.6) for _ in range(800)]
        found = feed(OfflineGuards("sft"), losses + [15.0] * 5)
        assert [step for step, guard, _ in found if guard == "divergence"] == [805]


def test_a_step_is_far_by_eight_deviations_of_what_changes_from_step_to_step():
    # least mean of five 1.4, all changes 1, so a deviation of 1.0483: the bound is 1.4 + 8.3864
    before = [1.0, 2.0] * 10
    assert feed(OfflineGuards("sft", {"loss_spike": "off"}), before + [9.78] * 5) == []
    guards = OfflineGuards("sft", {"loss_spike": "off"})
    assert feed(guards, before + [9.80] * 5) == [(25, "divergence", "stop")]


def test_a_restored_state_decides_as_the_run_would_have():
    losses = [2.0 + 0.1 * (i % 3) for i in range(25)] + [5.0] * 12
    whole, first = OfflineGuards("sft"), OfflineGuards("sft")
    expected = feed(whole, losses)
    begun = feed(first, losses[:28])
    resumed = OfflineGuards("sft")
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + feed(resumed, losses[28:], 29) == expected
    assert (30, "divergence", "stop") in expected
    assert resumed.state_dict() == whole.state_dict()
    # an earlier version kept one number in the place of the first log lines
    older = {name: value for name, value in first.state_dict().items() if name != "first_logprobs"}
    resumed.load_state_dict(older | {"first_logprob": -20.0})
    assert resumed.first_logprobs == [] and resumed.recent == first.recent


class Ranks:
    """Threads in the place of ranks, whose numbers are added up."""

    def __init__(self, count: int):
        self.barrier = threading.Barrier(count, timeout=60)
        self.parts: list[torch.Tensor] = []

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.parts.append(tensor.clone())
        self.barrier.wait()
        total = sum(self.parts)
        if self.barrier.wait() == 0:
            self.parts.clear()
        self.barrier.wait()
        tensor.copy_(total)


@pytest.fixture
def two_ranks(monkeypatch):
    """A function of the losses of two ranks at each step, and of KLs where evaluations find them;
    returns what ended each rank, the state of its guards and whether it would save.
    """
    monkeypatch.setattr(torch.distributed, "all_reduce", Ranks(2).all_reduce)

    def rank(number: int, losses: list[tuple[float, float]], kl: dict[int, float]) -> tuple:
        run = SimpleNamespace(
            program="dpo", world=DistributedContext(number, 2), checkpoints=Path("nowhere")
        )
        run.config = SimpleNamespace(guards={"loss_spike": "off"}, eval_steps=1)
        run.interrupted, run.should_checkpoint = lambda: False, lambda step, last: True
        run.close, run.log = lambda: None, lambda text: None
        run.tracker = SimpleNamespace(table=lambda *_: None)
        callback = RunCallback(run, None, None)
        callback._evaluate = lambda model, step: setattr(
            callback, "metrics", {"eval/kl/sequence": kl.get(step, 0.0)}
        )
        callback.trainer = SimpleNamespace(_tr_loss=0.0, _globalstep_last_logged=0)
        control = SimpleNamespace(should_training_stop=False, should_save=False)
        for step, both in enumerate(losses, 1):
            callback.trainer._tr_loss += both[number]
            state = SimpleNamespace(global_step=step, max_steps=100)
            try:
                callback.on_step_end(None, state, control, torch.nn.Linear(1, 1))
            except EarlyExit as ended:
                return str(ended), None, None
            if control.should_training_stop:
                break
        return callback.stop_reason, callback.guards.state_dict(), control.should_save

    def run_both(losses: list[tuple[float, float]], kl: dict[int, float] | None = None) -> list:
        with ThreadPoolExecutor(2) as pool:
            ranks = [pool.submit(rank, number, losses, kl or {}) for number in (0, 1)]
            return [made.result() for made in ranks]

    return run_both


def test_two_ranks_decide_alike_by_the_mean_of_their_losses(two_ranks):
    # 1 on both ranks, then 2 on the mean with 3 on one: not above twice the first, on either rank
    healthy = [(1.0, 1.0)] * 5
    first, second = two_ranks(healthy + [(1.0, 3.0)] * 5)
    assert first == second and first[0] == "" and first[2]
    # 2.25 on the mean, with one rank at 1 all the time
    first, second = two_ranks(healthy + [(1.0, 3.5)] * 6)
    assert first == second and not first[2]
    assert first[0].startswith("guard divergence at step 10: loss/total of a step is 2.25, above 2")


def test_two_ranks_stop_together_by_kl_and_by_a_number_that_is_not_finite_on_one(two_ranks):
    losses = [(0.7, 0.7)] * 6
    first, second = two_ranks(losses, {4: 101.0})
    assert first == second and first[0].startswith(
        "guard max_kl at step 4: eval/kl/sequence is 101"
    )
    first, second = two_ranks([*losses[:2], (0.7, math.nan)])
    assert first == second and "stopped at step 3: the loss or a weight is not finite" in first[0]


def test_the_page_shows_the_defaults():
    page = (Path(__file__).parents[2] / "docs" / "guards.md").read_text()
    lines = page.partition("## SFT, reward models and DPO")[2].splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if "| `" in line]
    for program, guards in OFFLINE_GUARDS.items():
        shown = {row[0]: row[3:6] for row in rows[: len(OFFLINE_GUARDS["dpo"])]}
        for name, guard in guards.items():
            threshold, action, window = shown[name]
            assert (threshold, action) == (f"{guard.threshold:g}", guard.action), (program, name)
            assert window.split()[0] == str(guard.window)


def test_guards_are_set_by_name():
    start = ["--model_name_or_path", "m", "--data", "d", "--output_dir", "o"]
    guards = parse(SFTRunConfig, [*start, "--guards", "{divergence: 3, loss_spike: off}"]).guards
    set_ = OfflineGuards("sft", guards).guards
    assert set_["divergence"].threshold == 3 and set_["loss_spike"].action == "off"
    with pytest.raises(UserError, match="unknown guard 'max_kl'"):
        parse(SFTRunConfig, [*start, "--guards", "{max_kl: 3}"])
    with pytest.raises(UserError, match="cannot be skip: TRL's trainers make each update before"):
        parse(SFTRunConfig, [*start, "--guards", "{divergence: skip}"])
