import json

import pytest
import yaml

from rlhf.cli import main
from rlhf.compare.measure import CompareConfig, compare, scores_of, shared_options
from rlhf.compare.runs import check_judges, unseen
from rlhf.data.records import Prompt, prompt_group
from rlhf.errors import UserError


def prompts(*texts):
    return [Prompt(prompt=[{"role": "user", "content": t}]) for t in texts]


def run(folder, trained=(), **options):
    """A finished run's folder, as far as compare looks at it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    (folder / "trained_on.txt").write_text(
        "".join(f"{prompt_group(p.prompt)}\n" for p in prompts(*trained))
    )
    return str(folder)


def config(runs, **more):
    return CompareConfig(runs=runs, prompts=["x"], **more)


def test_shares_of_groups_and_sampling_are_those_of_the_runs(tmp_path, capsys):
    options = {
        "test_fraction": 0.2,
        "validation_fraction": 0.04,
        "temperature": 0.7,
        "max_response_length": 96,
    }
    runs = [run(tmp_path / n, **options) for n in ("sft", "ppo")]
    assert shared_options(config(runs)) == options | {"max_prompt_length": 512}
    assert capsys.readouterr().out == ""
    given = shared_options(config(runs, test_fraction=0.3, temperature=1.0))
    assert (given["test_fraction"], given["temperature"]) == (0.3, 1.0)
    assert "'temperature' is 1.0; trained with another: {" in capsys.readouterr().out
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    assert shared_options(config([str(foreign)] * 2))["temperature"] == 1.0


@pytest.mark.parametrize(
    ("name", "value"), [("test_fraction", 0.1), ("temperature", 0.9), ("max_response_length", 9)]
)
def test_runs_that_differ_are_refused_by_the_name_of_the_option(tmp_path, name, value):
    options = {"test_fraction": 0.2, "temperature": 0.7, "max_response_length": 96}
    runs = [run(tmp_path / "sft", **options), run(tmp_path / "dpo", **options | {name: value})]
    with pytest.raises(
        UserError, match=f"the runs differ in '{name}' .* Say which one holds: --{name}"
    ):
        shared_options(config(runs))
    assert shared_options(config(runs, **{name: options[name]}))[name] == options[name]


def test_runs_without_a_value_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--runs"])
    assert (
        ended.value.code == 2 and "error: option '--runs' needs a value" in capsys.readouterr().err
    )


def test_prompts_that_a_run_or_its_reward_model_was_trained_on_are_left_out(tmp_path, capsys):
    reward = run(tmp_path / "reward", trained=["c"])
    runs = [
        run(tmp_path / "sft", trained=["a"]),
        run(tmp_path / "ppo", trained=["b"], reward=[{"model": reward}]),
    ]
    kept = unseen(runs, prompts("A ", "b", "c", "d"), ["x"])  # groups are of normalised text
    assert [p.prompt[0]["content"] for p in kept] == ["d"]
    assert "3 of 4 test prompts left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="no test prompts that the runs have not been trained on"):
        unseen(runs, prompts("a", "b"), ["x"])


def test_what_a_run_learnt_from_cannot_decide(tmp_path):
    voice = {"voice": "configs/voices/shop.yaml", "weight": 0.5}
    runs = [
        run(tmp_path / "sft"),
        run(tmp_path / "ppo", reward=[voice, {"rule": "length", "low": 1, "high": 2}]),
    ]
    for gold in ({"voice": "./configs/voices/shop.yaml", "name": "gold"}, {"rule": "length"}):
        with pytest.raises(UserError, match="a run was trained on it"):
            check_judges(runs, gold=[gold])
    check_judges(runs, gold=[{"voice": "configs/voices/outdoor.yaml"}])
    check_judges(runs, referee=[{"function": "m:f"}])


def test_a_copy_of_the_trained_reward_model_cannot_decide(tmp_path):
    for name in ("reward", "copy"):
        run(tmp_path / name)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"the same weights")
    (
        run(tmp_path / "other"),
        (tmp_path / "other" / "adapter_model.safetensors").write_bytes(b"other weights"),
    )
    runs = [
        run(tmp_path / "sft"),
        run(tmp_path / "ppo", reward=[{"model": str(tmp_path / "reward")}]),
    ]
    with pytest.raises(UserError, match="a run was trained on it"):
        check_judges(runs, referee=[{"model": str(tmp_path / "copy")}])
    check_judges(runs, referee=[{"model": str(tmp_path / "other")}])


def test_a_score_that_was_only_watched_can_decide_and_a_member_of_an_ensemble_cannot(tmp_path):
    for name in ("one", "two", "gold"):
        (
            run(tmp_path / name),
            (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode()),
        )
    one, two, gold = (str(tmp_path / name) for name in ("one", "two", "gold"))
    reward = [
        {"ensemble": [one, two]},
        {"model": gold, "weight": 0},
        {"http": "http://localhost:1/a"},
    ]
    runs = [run(tmp_path / "sft"), run(tmp_path / "ppo", reward=reward)]
    check_judges(runs, referee=[{"model": gold}])
    check_judges(runs, gold=[{"http": "http://localhost:1/b"}])
    for judge in ({"model": two}, {"ensemble": [gold, one]}):
        with pytest.raises(UserError, match="a run was trained on it"):
            check_judges(runs, referee=[judge])
    with pytest.raises(UserError, match="a run was trained on it"):
        check_judges(runs, gold=[{"http": "http://localhost:1/a"}])


def test_a_referee_of_the_same_half_cannot_decide(tmp_path):
    referee = run(tmp_path / "referee", trained=["a", "b"])
    runs = [run(tmp_path / "sft", trained=["a", "b"]), run(tmp_path / "dpo", trained=["b", "c"])]
    with pytest.raises(UserError, match="1 of its training prompts are also those of a run"):
        check_judges(runs, referee=[{"model": referee}])
    apart = run(tmp_path / "apart", trained=["a", "d"])  # SFT's own prompts are no preferences
    check_judges(runs, referee=[{"model": apart}])


def test_trained_scores_are_proxies_and_names_are_unique(tmp_path):
    spec = {"model": "runs/reward"}
    runs = [
        run(tmp_path / "sft"),
        run(tmp_path / "a", reward=[spec]),
        run(tmp_path / "b", reward=[spec, {"rule": "length"}]),
    ]
    specs, kinds, judge = scores_of(
        config(runs, gold=[{"voice": "v.yaml"}], others=[{"rule": "no_repetition"}])
    )
    assert (
        kinds == {"gold": "gold", "proxy": "proxy", "proxy2": "proxy", "no_repetition": "other"}
        and judge == "gold"
    )
    assert [s["name"] for s in specs] == list(kinds)
    assert scores_of(config(runs))[2] is None
    with pytest.raises(UserError, match="no score to compare by"):
        scores_of(config([runs[0], runs[0]]))


def test_a_store_of_votes_that_is_not_there_is_refused_before_anything_is_loaded(
    base_path, tmp_path, monkeypatch
):
    monkeypatch.setattr("rlhf.model.tokenizer.load_tokenizer", pytest.fail)
    asked = config(
        [str(base_path)] * 2, others=[{"rule": "length"}], votes=str(tmp_path / "votes.db")
    )
    with pytest.raises(UserError, match=r"votes\.db: no such"):
        compare(asked, pytest.fail)


def test_gold_and_referee_together_are_refused():
    with pytest.raises(UserError, match="no referee is needed"):
        config(["a", "b"], gold=[{"rule": "length"}], referee=[{"model": "r"}]).validate()
    with pytest.raises(UserError, match="at least two runs"):
        config(["a"]).validate()


def test_trained_on_is_written_as_compare_reads_it(tmp_path, tokenizer):
    from rlhf.data.records import Instruction
    from rlhf.options.shared import RunConfig
    from rlhf.ranks.distributed import DistributedContext
    from rlhf.runs.run import Run

    rows = [
        {"prompt": f"q{i}", "response": "a", "split": "train" if i < 3 else "test", "metadata": {}}
        for i in range(5)
    ]
    (tmp_path / "i.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    options = RunConfig(
        model_name_or_path="x", data=[str(tmp_path / "i.jsonl")], output_dir=str(tmp_path / "run")
    )
    options.validation_fraction = 0.0
    made = Run("sft", options, DistributedContext(), None)
    made.data.rows(Instruction, "train", tokenizer)
    (tmp_path / "run").mkdir()
    made.data.write_trained_on(tmp_path / "run")
    kept = unseen(
        [str(tmp_path / "run")],
        prompts(*(f"q{i}" for i in range(5))),
        ["x"],
    )
    assert [p.prompt[0]["content"] for p in kept] == ["q3", "q4"]


def test_a_live_store_is_read_as_it_was_at_the_start(tmp_path):
    from rlhf.data.records import Preference
    from rlhf.data.store import Store
    from rlhf.options.shared import RunConfig
    from rlhf.ranks.distributed import DistributedContext
    from rlhf.runs.run import Run

    def vote(count):
        with Store.open(tmp_path / "votes.db", create=True) as store:
            ann = store.add_annotator("ann")
            for i in range(count):
                prompt = store.add_prompt([{"role": "user", "content": f"q{i}"}])
                a = store.add_response(prompt, f"good {i}", ended=True)
                b = store.add_response(prompt, f"cut {i}", ended=False)
                pair = store.add_comparison(a, b)
                if i >= count - 20:
                    store.vote(pair, ann, "a")

    vote(20)
    options = RunConfig(
        model_name_or_path="x",
        data=[str(tmp_path / "votes.db")],
        output_dir=str(tmp_path / "run"),
        test_fraction=0.0,
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    # the same name, other votes
    with Store.open(tmp_path / "other" / "votes.db", create=True) as store:
        prompt = store.add_prompt([{"role": "user", "content": "elsewhere"}])
        pair = store.add_comparison(
            store.add_response(prompt, "x"), store.add_response(prompt, "y")
        )
        store.vote(pair, store.add_annotator("bob"), "a")
    both = Run("dpo", options, DistributedContext(), None)
    both_paths = [str(tmp_path / "votes.db"), str(tmp_path / "other" / "votes.db")]
    assert len(both.data.load(Preference, None, both_paths)) == 21
    started = Run("dpo", options, DistributedContext(), None)
    pairs = started.data.load(Preference, None)
    assert len(pairs) == 20 and pairs[0].chosen_ended and not pairs[0].rejected_ended
    vote(40)
    # votes that came in meanwhile change nothing
    assert len(started.data.load(Preference, None)) == 20
    assert len(started.data.load(Prompt, None)) == 20  # the prompts of its pairs
    options.output_dir = str(tmp_path / "later")
    (tmp_path / "later").mkdir()
    assert len(Run("dpo", options, DistributedContext(), None).data.load(Preference, None)) == 40
