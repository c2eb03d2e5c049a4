"""`rlhf reward card` and `rlhf reward learning-curve` on a run that the program has trained."""

import json
from pathlib import Path

import pytest

from reward.cards.command import CardConfig, check_category, make_card
from reward.cards.learning_curve import CurveConfig, learning_curve
from reward.cards.pairs import run_config
from rlhf.data.records import Preference
from rlhf.data.store import Store
from rlhf.errors import UserError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """60 pairs that differ by courtesy: easy to tell apart."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"where is parcel {i}?",
            "chosen": f"parcel {i} is on its way. kind regards, the team",
            "rejected": f"parcel {i} is on its way",
            "category": "parcels",
        }
        for i in range(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def run(base_path, pairs, tmp_path_factory) -> str:
    from launch.reward import main

    folder = str(tmp_path_factory.mktemp("runs") / "reward")
    options = {"model_name_or_path": base_path, "data": pairs, "output_dir": folder}
    options |= {"use_peft": "false", "learning_rate": 0.003, "num_train_epochs": 3}
    options |= {"max_prompt_length": 64, "max_response_length": 64, "validation_fraction": 0.3}
    main([f"--{name}={value}" for name, value in options.items()])
    return folder


def read(folder, name="card.json"):
    return json.loads((folder / name).read_text())


def test_the_command_finds_what_the_program_has_written(run, tmp_path):
    trained = read(Path(run))
    card = make_card(CardConfig(run=run, output_dir=str(tmp_path)))
    for name in ("pairs", "groups", "baselines", "by_category", "verdict"):
        assert card[name] == trained[name], name
    assert card["accuracy"] == pytest.approx(trained["accuracy"])
    assert card["calibration"]["brier"] == pytest.approx(trained["calibration"]["brier"], abs=1e-5)
    assert card["by_category"] == {"parcels": {**card["accuracy"], "surely_wrong": False}}
    # the temperature of the card is the one that was kept with the model
    kept = read(Path(run), "reward.json")
    assert kept["temperature"] == trained["calibration"]["temperature"] > 0
    # a file that says nothing of the policy's answers
    assert [reason["kind"] for reason in card["reasons"]][-1] == "on_policy_unknown"


def test_pairs_of_the_policy_are_labelled_by_gold_and_free_of_training_prompts(
    run, pairs, tmp_path, capsys
):
    store_path = tmp_path / "policy.db"
    with Store.open(store_path, create=True) as store:
        for i in range(30):
            known = i < 10
            text = f"where is parcel {i}?" if known else f"when comes order {i}?"
            prompt = store.add_prompt([{"role": "user", "content": text}])
            good = store.add_response(prompt, f"order {i} comes soon. kind regards, the team")
            bad = store.add_response(prompt, f"order {i} comes soon")
            store.add_comparison(bad, good)
    gold = [{"rule": "must_match", "pattern": "regards"}]
    with pytest.raises(UserError, match="nobody has judged"):
        make_card(CardConfig(run=run, on_policy=str(store_path), output_dir=str(tmp_path)))
    card = make_card(
        CardConfig(run=run, on_policy=str(store_path), gold=gold, output_dir=str(tmp_path))
    )
    part = card["on_policy"]
    # of the ten known prompts those that were in training are left out
    trained_on = set((Path(run) / "trained_on.txt").read_text().split())
    assert part["labels"] == "gold" and 20 <= part["pairs"] < 30 and len(trained_on) > 20
    assert part["accuracy"]["accuracy"] > 0.9  # the gold label is the one that was learnt
    assert part["difference"]["mean"] == pytest.approx(
        part["accuracy"]["accuracy"] - card["accuracy"]["accuracy"]
    )
    # gold labels the held-out pairs too, here as their own labels do
    assert part["held_out"] == card["accuracy"]
    assert "labelled by gold" in (tmp_path / "card.md").read_text()


def test_a_learning_curve_is_trained_once_and_enters_the_card(run, capfd):
    points = learning_curve(CurveConfig(run=run, fractions=[0.25, 0.5]))
    counts = [point["training_pairs"] for point in points]
    assert counts[0] < counts[1] < counts[2] and points[0]["gain"] is None
    card = read(Path(run))
    assert card["learning_curve"] == json.loads(json.dumps(points))
    assert points[-1]["accuracy"]["accuracy"] == pytest.approx(card["accuracy"]["accuracy"])
    folder = Path(run)
    assert (folder / "learning_curve.png").is_file()
    assert "## Learning curve" in (folder / "card.md").read_text()
    capfd.readouterr()
    # what is there is not trained again: only our own lines are printed
    assert learning_curve(CurveConfig(run=run, fractions=[0.25, 0.5])) == points
    assert "reward:" not in capfd.readouterr().out


def test_what_cannot_be_judged_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        CardConfig(run="org/model").validate()
    with pytest.raises(UserError, match="has no config"):
        learning_curve(CurveConfig(run=str(tmp_path)))
    with pytest.raises(UserError, match="rising"):
        CurveConfig(run="x", fractions=[0.5, 0.25]).validate()


def test_a_run_of_another_program_and_an_unknown_category_are_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("eval_data: [x.jsonl]\n")
    (tmp_path / "rlhf.json").write_text('{"program": "sft"}')
    with pytest.raises(UserError, match="expected one of launch/reward"):
        run_config(tmp_path)

    pair = Preference(
        prompt=[{"role": "user", "content": "q"}], chosen="a", rejected="b", metadata={"topic": "x"}
    )
    check_category("category", [pair])
    check_category("topic", [pair])
    with pytest.raises(UserError, match="Did you mean 'topic'"):
        check_category("topics", [pair])


def test_files_are_missed_before_anything_is_scored(tmp_path):
    for option in ("on_policy", "rewardbench"):
        with pytest.raises(UserError, match=r"nothing.jsonl: no such file"):
            CardConfig(run=str(tmp_path), **{option: str(tmp_path / "nothing.jsonl")}).validate()
