"""PPO against an ensemble: one base, metrics of its members, and a run that goes on exactly."""

import json

import pytest

from rlhf.runs import checkpoint
from rlhf.runs.tracking import read_metrics
from tests.conftest import random_reward
from tests.launch.conftest import differences, door, flags_of, ppo_flags

STEPS = 4


class Crash(BaseException):
    """The process ends here; nothing catches it."""


@pytest.fixture(scope="module")
def arguments(base_path, runs, files, tmp_path_factory):
    """Return the options of PPO against two members, one of them watched a second time."""
    second = random_reward(base_path, tmp_path_factory.mktemp("second"), seed=4)
    members = f"[{runs}/reward, {second}]"
    reward = f"[{{ensemble: {members}, how: worst}}, {{model: {second}, name: b, weight: 0}}]"
    more = ["--reward", reward, "--total_episodes", str(8 * STEPS), "--save_steps", "1"]

    def of(output):
        common = flags_of("ppo", runs / "sft", files["pairs"], output)
        return [*common, *ppo_flags(runs), *more]

    return of


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        loaded = []
        patch.setattr("reward.loaded.RewardModels.load", lambda *given: loaded.append(given))
        door("ppo")(arguments(folder))
        # members are roles on the policy's base
        assert loaded == []
    return folder


def test_members_and_their_spread_are_logged(whole):
    rows = [row for row in read_metrics(whole / "metrics.jsonl") if "score/raw" in row]
    assert len(rows) == STEPS
    for row in rows:
        spread = row["score/ensemble/spread"]
        first, second = (
            row[name]
            for name in sorted(row)
            if name.startswith("score/ensemble/") and name != "score/ensemble/spread"
        )
        assert row["score/b"] in (first, second)
        # of two members |a - b| is twice their spread, and the lesser is their mean less it
        expected = (first + second) / 2 - spread
        assert row["score/ensemble"] == pytest.approx(expected, abs=1e-6)
        assert row["score/raw"] == pytest.approx(expected, abs=1e-5)
    result = json.loads((whole / "result.json").read_text())
    assert result["finished"]


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(whole, arguments, tmp_path, monkeypatch):
    seals = 0

    def point(where):
        nonlocal seals
        seals += where == "sealed"
        if seals == 2:
            raise Crash

    monkeypatch.setattr(checkpoint, "crash_point", point)
    with pytest.raises(Crash):
        door("ppo")(arguments(tmp_path))
    monkeypatch.setattr(checkpoint, "crash_point", lambda where: None)
    door("ppo")(arguments(tmp_path))
    assert differences(whole, tmp_path) == []
