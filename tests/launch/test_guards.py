"""Guards in real runs: what is skipped, rolled back to and stopped, and what a kill in the middle
of it costs.
"""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from rlhf.data.records import Scores
from rlhf.errors import EXIT_GUARD, EXIT_USER_ERROR, EarlyExit, UserError
from rlhf.offline import trainers
from rlhf.ppo.passes import LossPasses
from rlhf.ppo.trainer import PPOTrainer
from rlhf.ranks.distributed import DistributedContext
from rlhf.runs import checkpoint
from rlhf.runs.run import Run
from rlhf.runs.tracking import read_metrics
from tests.launch.conftest import SMALL, differences, door, flags_of, ppo_flags

CALLS = {"count": 0, "bad": ()}  # of the scorer below
# Only the critic learns in the first three steps, so that kl/sequence is 0 up to step 4 and first
# moves at step 5. The rollback from there (one bad rollout, made by the update of step 4) goes to a
# checkpoint of before step 4: step 2's.
LATE = [
    "--critic_warmup_steps",
    "3",
    "--total_episodes",
    "40",
    "--save_steps",
    "2",
    "--save_total_limit",
    "9",
    # a KL of exactly 0 while the policy stands still
    "--old_logprobs",
    "learner",
]


class Crash(BaseException):
    """The process ends here; nothing catches it."""


def by_length(samples) -> Scores:
    """The length of each response, but NaN for the last one in the calls that are to be bad."""
    CALLS["count"] += 1
    totals = [float(len(ids)) for ids in samples.response_ids]
    return Scores([*totals[:-1], math.nan] if CALLS["count"] in CALLS["bad"] else totals)


def always_one(samples) -> Scores:
    return Scores([1.0] * len(samples.responses))


def flags(runs, files, output, *more) -> list[str]:
    return [*flags_of("ppo", runs / "sft", files["pairs"], output), *ppo_flags(runs), *more]


def guarded(runs, files, output, guards, *more) -> list[str]:
    quiet = {"truncation": "off", "no_signal": "off"}  # these responses are all cut off
    return flags(runs, files, output, *LATE, "--guards", json.dumps(quiet | guards), *more)


def start(arguments) -> int:
    """The exit code of a run."""
    try:
        door("ppo")(arguments)
    except SystemExit as end:
        return end.code
    return 0


def rows_of(folder) -> list[dict]:
    """The lines of steps; those of evaluations left out."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if "kl/sequence" in row]


def result_of(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def plain(runs, files, tmp_path_factory):
    """The run in which no guard strikes."""
    folder = tmp_path_factory.mktemp("plain")
    assert start(guarded(runs, files, folder, {})) == 0
    assert [row["kl/sequence"] == 0 for row in rows_of(folder)] == [True] * 4 + [False]
    assert rows_of(folder)[4]["kl/sequence"] > 0
    return folder


def always(limit: int) -> dict:
    """As soon as the policy moves at all, at whatever step size."""
    return {"max_kl": {"threshold": 1e-9, "window": 1, "action": "rollback", "limit": limit}}


@pytest.fixture(scope="module")
def stopped(runs, files, tmp_path_factory):
    """A run that is rolled back twice and then stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    assert start(guarded(runs, files, folder, always(2))) == EXIT_GUARD
    return folder


def test_a_rollback_goes_back_with_half_the_step_size(stopped, plain):
    rows, before = rows_of(stopped), rows_of(plain)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]  # cut back twice, and written again
    # linear from 1e-2 to 0 over 5 steps: 1e-2 * (1 - 3/5) at step 4, and after two rollbacks a
    # quarter of it
    assert before[3]["learning_rate"] == pytest.approx(4e-3) and rows[3][
        "learning_rate"
    ] == pytest.approx(1e-3)
    assert [row["guard/rollbacks"] for row in rows] == [0, 0, 2, 2, 2]
    assert rows[4]["guard/rate_scale"] == 0.25
    restored, original = (f / "checkpoints" / "step-000002" for f in (stopped, plain))
    for name in (
        "adapter_model.safetensors",
        "value/adapter_model.safetensors",
        "value/value_head.safetensors",
    ):
        assert (restored / name).read_bytes() == (original / name).read_bytes(), name
    assert json.loads((restored / "ppo.json").read_text())["guards"]["rollbacks"] == 2
    # a shorter step leaves the reference less far
    assert 0 < rows[4]["kl/sequence"] < before[4]["kl/sequence"] / 2


def test_weights_and_moments_are_those_of_the_checkpoint(runs, files, plain, tmp_path, monkeypatch):
    load, seen = PPOTrainer.load, []

    def spy(self, folder, after=None):
        before = self.learner.state_dict()
        load(self, folder, after)
        moments = copy.deepcopy(self.learner.optimizer.state_dict()["state"])
        seen.append((before, self.learner.state_dict(), moments, self.steps_done))

    monkeypatch.setattr(PPOTrainer, "load", spy)
    start(guarded(runs, files, tmp_path, always(1)))
    ((before, after, moments, done),) = seen
    kept = torch.load(
        plain / "checkpoints" / "step-000002" / "learner" / "plain.pt", weights_only=True
    )
    assert done == 2 and set(kept["module"]) == set(after)
    assert all(torch.equal(kept["module"][name], after[name]) for name in after)
    assert not all(torch.equal(before[name], after[name]) for name in after)
    for number, state in kept["optimizer"]["state"].items():
        assert all(
            torch.equal(state[k], moments[number][k]) for k in ("step", "exp_avg", "exp_avg_sq")
        ), number


def test_after_the_last_rollback_it_is_a_stop_and_everything_is_written_down(stopped, capsys):
    result = result_of(stopped)
    assert [(e["guard"], e["action"], e["step"], e["since"]) for e in result["guards"]] == [
        ("max_kl", "rollback", 5, 4),
        ("max_kl", "rollback", 5, 4),
        ("max_kl", "stop", 5, 4),
    ]
    assert "after 2 rollbacks" in result["stopped"] and "raise kl_coef" in result["stopped"]
    assert result["steps"] == 5 and (stopped / "adapter_model.safetensors").is_file()
    evaluated = [
        r["step"] for r in read_metrics(stopped / "metrics.jsonl") if "eval/score/total" in r
    ]
    assert evaluated == [0, 5]  # the headline is that of the weights that were kept
    # it would go on as if nothing had been
    assert not (stopped / "checkpoints" / "step-000005").exists()


def test_a_stopped_run_goes_on_only_when_told_from_where(runs, files, stopped, tmp_path, capsys):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    before = (folder / "metrics.jsonl").read_bytes()
    again = guarded(runs, files, folder, {"max_kl": "off"})
    assert start(again) == EXIT_GUARD
    said = capsys.readouterr()
    assert "was stopped: kl/sequence is" in said.out + said.err
    assert f"--resume {folder}/checkpoints/step-" in said.out + said.err
    assert (folder / "metrics.jsonl").read_bytes() == before and "stopped" in result_of(folder)
    assert start([*again, "--resume", str(folder / "checkpoints" / "step-000004")]) == 0
    result = result_of(folder)
    assert "stopped" not in result and len(result["guards"]) == 2  # what that checkpoint knew of


def points(monkeypatch, arguments) -> list[int]:
    """The points of the checkpoint writer from the last before the first rollback to the end of
    what that writes.
    """
    passed, first = [], []
    roll_back = Run.roll_back

    def noted(self, before):
        first.append(len(passed))
        return roll_back(self, before)

    monkeypatch.setattr(checkpoint, "crash_point", passed.append)
    monkeypatch.setattr(Run, "roll_back", noted)
    code = start(arguments)
    monkeypatch.undo()
    assert code in (0, EXIT_GUARD)
    last = first[0] + passed[first[0] :].index("renamed")
    told = ("filled", "set aside", "renamed")
    return [
        n
        for n, where in enumerate(passed, 1)
        if first[0] <= n <= last + 1 and (n == first[0] or where in told)
    ]


@pytest.fixture(scope="module")
def recovered(plain):
    """A threshold that the first course crosses at step 5, the last one, and the one at half the
    step size does not.
    """
    threshold = 0.6 * rows_of(plain)[4]["kl/sequence"]
    return {"max_kl": {"threshold": threshold, "window": 1, "action": "rollback"}}


def test_a_kill_around_a_rollback_costs_nothing(
    runs, files, recovered, tmp_path, monkeypatch, capsys
):
    whole = tmp_path / "whole"
    numbers = points(monkeypatch, guarded(runs, files, whole, recovered))
    expected = result_of(whole)
    assert [e["action"] for e in expected["guards"]] == ["rollback"] and "stopped" not in expected
    assert len(numbers) == 4  # the last of step 4; filled, set aside, renamed
    for number in numbers:
        output, passed = tmp_path / f"at-{number}", []

        def point(where, passed=passed, number=number):
            passed.append(where)
            if len(passed) == number:
                raise Crash(where)

        arguments = guarded(runs, files, output, recovered)
        monkeypatch.setattr(checkpoint, "crash_point", point)
        with pytest.raises(Crash):
            door("ppo")(arguments)
        monkeypatch.undo()
        assert start(arguments) == 0
        assert differences(whole, output) == [], f"after a crash at point {number}: {passed[-1]}"
        assert result_of(output)["guards"] == expected["guards"]
        assert rows_of(output)[-1]["guard/rollbacks"] == 1
    assert "resuming from" in capsys.readouterr().out


def test_a_kill_between_rollbacks_does_not_lose_their_count(
    runs, files, stopped, tmp_path, monkeypatch
):
    arguments, seals = guarded(runs, files, tmp_path, always(2)), []

    def point(where):
        seals.append(where)
        # checkpoints of steps 2 and 4, the first rollback's, and that of step 4 again
        if seals.count("renamed") == 4:
            raise Crash

    monkeypatch.setattr(checkpoint, "crash_point", point)
    with pytest.raises(Crash):
        door("ppo")(arguments)
    monkeypatch.undo()
    assert start(arguments) == EXIT_GUARD
    assert differences(stopped, tmp_path) == []
    ours, theirs = result_of(tmp_path), result_of(stopped)
    assert (ours["guards"], ours["stopped"]) == (theirs["guards"], theirs["stopped"])


def test_without_a_checkpoint_a_rollback_is_a_stop(runs, files, tmp_path, capsys):
    assert start(guarded(runs, files, tmp_path, always(2), "--save_steps", "0")) == EXIT_GUARD
    assert "no checkpoint" in capsys.readouterr().out
    assert "kl/sequence" in result_of(tmp_path)["stopped"] and result_of(tmp_path)["steps"] == 5


# numbers that are none


def scored(runs, files, output, bad, *more) -> list[str]:
    CALLS.update(count=0, bad=bad)
    spec = json.dumps([{"function": f"{__name__}:by_length", "name": "tone"}])
    return flags(
        runs,
        files,
        output,
        "--reward",
        spec,
        "--eval_prompts",
        "0",
        "--total_episodes",
        "48",
        "--guards",
        # whether responses end, and how far an update goes, is luck here
        "{truncation: off, no_signal: off, ratio: off}",
        *more,
    )


def test_a_nan_score_is_skipped_and_counted(runs, files, tmp_path):
    assert start(scored(runs, files, tmp_path, (3,))) == 0
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["guard/skipped_rollouts"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert ["score/raw" in row for row in rows] == [True, True, False, True, True, True]
    (event,) = result_of(tmp_path)["guards"]
    assert (event["guard"], event["action"], event["step"], event["times"]) == (
        "not_finite",
        "skip",
        3,
        1,
    )
    assert "'tone'" in event["reason"] and "where is my" in event["reason"]
    (told,) = read_metrics(tmp_path / "tables" / "guards.jsonl")  # the table that W&B is sent
    assert (told["step"], told["guard"], told["reason"]) == (3, "not_finite", event["reason"])


def test_a_scorer_that_gives_nan_for_ever_ends_the_run_by_name(runs, files, tmp_path, capsys):
    assert start(scored(runs, files, tmp_path, range(1, 99))) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert "'tone'" in said and "nan" in said.lower() and "where is my" in said
    assert CALLS["count"] == 5  # four are borne in 20
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_an_update_with_a_nan_loss_changes_nothing(runs, files, tmp_path, monkeypatch):
    policy_pass, update, seen = LossPasses.policy_pass, PPOTrainer.update, []

    def poisoned(self, *rest):
        loss, metrics = policy_pass(self, *rest)
        return (loss * math.nan if len(seen) == 5 else loss), metrics

    def monitored(self, *rest):
        optimizer = self.learner.optimizer

        def moments():
            return [v.clone() for state in optimizer.state.values() for v in state.values()]

        before = [*self.learner.state_dict().values(), *moments()]
        result = update(self, *rest)
        after = [*self.learner.state_dict().values(), *moments()]
        seen.append(len(before) == len(after) and all(map(torch.equal, before, after)))
        return result

    monkeypatch.setattr(LossPasses, "policy_pass", poisoned)
    monkeypatch.setattr(PPOTrainer, "update", monitored)
    assert (
        start(
            flags(runs, files, tmp_path, "--num_ppo_epochs", "2", "--guards", "{truncation: off}")
        )
        == 0
    )
    assert seen == [False] * 5 + [True] + [False] * 2  # two steps of four updates
    rows = rows_of(tmp_path)
    assert [row["guard/skipped_updates"] for row in rows] == [0, 1]
    assert rows[1]["ppo/updates"] == 3 and math.isfinite(rows[1]["loss/total"])
    (event,) = result_of(tmp_path)["guards"]
    assert (event["guard"], event["action"], event["value"]) == ("not_finite", "skip", "nan")


def test_a_run_that_could_learn_from_no_rollout_is_not_done(
    runs, files, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(CALLS, "count", 0)
    monkeypatch.setitem(CALLS, "bad", (1, 2))
    scorer = ["--reward", f"[{{function: '{__name__}:by_length'}}]", "--total_episodes", "16"]
    assert start([*flags(runs, files, tmp_path, *scorer), "--eval_prompts", "0"]) == EXIT_GUARD
    assert "ppo: nothing was learnt: every rollout was skipped" in capsys.readouterr().out
    scorer[1] = f"[{{function: '{__name__}:always_one'}}]"
    scorer += ["--missing_eos_score", "none"]
    assert (
        start([*flags(runs, files, tmp_path / "other", *scorer), "--eval_prompts", "0"])
        == EXIT_GUARD
    )
    assert (
        "ppo: nothing was learnt: before the first update the scores that are"
        in capsys.readouterr().out
    )
    for folder in (tmp_path, tmp_path / "other"):
        assert not list(folder.glob("*.safetensors")) and not (folder / "result.json").exists()
    assert not (tmp_path / "other" / "checkpoints").exists()  # the same command begins anew


@pytest.mark.parametrize("name", ["reward", "eval_scorers"])
def test_scorers_are_checked_before_anything_is_loaded(runs, files, tmp_path, name, capsys):
    voice = tmp_path / "voice.yaml"
    for content, message in ((None, "no such file"), ("name: x\nguid: y\n", "guid")):
        if content:
            voice.write_text(content)
        out = tmp_path / "run"
        assert start(flags(runs, files, out, f"--{name}", f"[{{voice: {voice}}}]")) == 2
        assert message in capsys.readouterr().err and not out.exists()


def test_pretraining_data_reaches_the_updates(runs, files, tmp_path):
    pretraining = [
        "--ptx_coef",
        "0.5",
        "--ptx_data",
        files["instructions"],
        "--guards",
        "{no_signal: off}",
        "--critic_trunk",
        "own",
    ]
    assert (
        start(
            [
                *flags(runs, files, tmp_path, *pretraining),
                "--total_episodes",
                "8",
                "--eval_prompts",
                "0",
            ]
        )
        == 0
    )
    (row,) = rows_of(tmp_path)
    assert row["loss/ptx"] > 0
    assert 0 < max(row["grad/norm_policy"], row["grad/norm_value"]) < row["grad/norm"]


def spoiled(what: str, at: int):
    """Trainer.training_step whose loss, gradient or weight becomes NaN at step `at`, of three."""
    step = Trainer.training_step

    def broken(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step + 1 != at:
            return loss
        weight = next(p for p in model.parameters() if p.requires_grad and p.grad is not None)
        if what == "gradient":
            weight.grad.view(-1)[0] = math.nan
        if what == "weight":
            weight.data.view(-1)[0] = math.nan
        return loss * math.nan if what == "loss" else loss

    return broken


@pytest.mark.parametrize(
    ("name", "what", "at", "said"),
    [
        ("sft", "gradient", 2, "stopped at step 2: the gradient is not finite"),
        ("dpo", "loss", 2, "stopped at step 2: the loss or a weight is not finite"),
        # as ZeRO would leave it
        ("reward", "weight", 3, "stopped at step 3: the loss or a weight is not finite"),
    ],
)
def test_numbers_that_are_not_finite_stop_a_run_and_are_not_saved(
    runs, files, tmp_path, monkeypatch, capsys, name, what, at, said
):
    monkeypatch.setattr(Trainer, "training_step", spoiled(what, at))
    data = files["instructions" if name == "sft" else "pairs"]
    arguments = [*flags_of(name, runs / "sft", data, tmp_path), *SMALL, "--save_steps", "1"]
    with pytest.raises(SystemExit) as stopped:
        door(name)(arguments)
    assert stopped.value.code == EXIT_GUARD and f"{name}: {said}" in capsys.readouterr().out
    for folder in (tmp_path, tmp_path / "other"):
        assert not list(folder.glob("*.safetensors")) and not (folder / "result.json").exists()
    assert not (tmp_path / "other" / "checkpoints").exists()  # the same command begins anew
    kept = checkpoint.newest(tmp_path / "checkpoints", print)
    assert kept.step == at - 1
    assert all(
        w.isfinite().all() for w in load_file(kept.folder / "adapter_model.safetensors").values()
    )


def test_a_result_that_is_not_finite_is_no_result(tmp_path):
    run = SimpleNamespace(
        program="dpo", checkpoints=tmp_path / "none", close=lambda: None, world=DistributedContext()
    )
    run.folder = tmp_path / "out"
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=7), evaluate=lambda: {"eval_loss": math.nan}
    )
    with pytest.raises(
        EarlyExit, match="dpo: stopped at step 7: the loss on held-out rows is not finite"
    ) as stopped:
        trainers.held_out_loss(trainer, run)
    assert stopped.value.code == EXIT_GUARD
    model = torch.nn.Linear(2, 1)
    model.weight.data[0, 1] = math.inf
    with pytest.raises(
        UserError, match="out: not saved: 'weight' holds numbers that are not finite"
    ):
        trainers.save_policy(run, model, None)
    assert not (tmp_path / "out").exists()
