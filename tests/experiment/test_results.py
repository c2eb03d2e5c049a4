"""What was measured, written by hand: 2 prompts x 2 samples of the foundation, a trial at two
steps, the best of 2.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rlhf.config import save_options
from rlhf.errors import UserError
from rlhf.experiment.measure import policies_of, scores_of
from rlhf.experiment.plan import plan
from rlhf.experiment.results import best_of, check_same_prompts, read_results, read_rows
from rlhf.experiment.state import load_experiment
from rlhf.files import dumps
from rlhf.jobs.job import fingerprints
from tests.experiment.example import experiment, method
from tests.experiment.test_cost import flops, write_metrics, write_result

TRIAL = "seed-0/dpo-beta-0.1"
MORE = {
    "methods": {"dpo": method(options={"max_steps": 4}), "best_of_n": {"sweep": {"n": [2]}}},
    "seeds": [0],
}
PROMPTS = [
    {"prompt": f"question {i}", "group": f"g{i}", "ids": [i], "metadata": {}} for i in range(2)
]


def row(prompt: int, sample: int, response: str, kl: float = 0.0, **scores) -> dict:
    ended = not response.endswith("...")
    common = {
        "prompt": prompt,
        "sample": sample,
        "response": response,
        "length": len(response),
        "ended": ended,
    }
    return common | {
        "kl": kl,
        "scores": {name.replace("_", "/"): value for name, value in scores.items()},
    }


FOUNDATION = [
    row(p, s, f"a{p}{s}", gold=p + s / 10, gold_fact=math.nan if p else 1.0)
    for p in (0, 1)
    for s in range(4)
]
SEEDED = [r | {"scores": {**r["scores"], "proxy": 5.0}} for r in FOUNDATION if r["sample"] < 2]
STEPS = {
    2: [row(p, s, "one two", kl=0.5, gold=0.2, gold_fact=1.0, proxy=1.0) for p in (0, 1) for s in (0, 1)],
    4: [row(0, 0, "w x y z w x y z", 1.0, gold=0.1, gold_fact=1.0, proxy=2.0),
        row(0, 1, "no\u2028end ...", 2.0, gold=0.3, gold_fact=1.0, proxy=3.0),
        row(1, 0, "", 3.0, gold=0.5, gold_fact=math.nan, proxy=4.0),
        row(1, 1, "good", 4.0, gold=0.7, gold_fact=1.0, proxy=6.0)],
}  # fmt: skip


def write_measure(
    out: Path, name: str, files: dict[str, list[dict]], budget=None, kinds=None
) -> None:
    place = out / "measures" / name
    place.mkdir(parents=True, exist_ok=True)
    for file, rows in files.items():
        head = {"step": 0, "numbers": {"perplexity/sft": 2.5}, "budget": budget or {}}
        (place / file).write_text(
            "".join(dumps(line) + "\n" for line in [head, *rows]), encoding="utf-8"
        )
    (place / "prompts.json").write_text(json.dumps({"prompts": PROMPTS}))
    done = {
        "finished": True,
        "trial": name,
        "files": list(files),
        "kinds": kinds or {"gold": "gold", "proxy": "proxy"},
    }
    (place / "done.json").write_text(json.dumps(done | {"judge": "gold"}))


def measured(folder: Path, without=(), **more):
    """The experiment with everything done, but for the jobs `without`."""
    config = experiment(folder, **(MORE | more))
    out = folder / "out"
    jobs = plan(config, {"dpo": 4})
    write_result(out / "seed-0" / "reward", 300)
    write_result(out / TRIAL, 40)
    write_measure(out, "foundation", {"step-000000.jsonl": FOUNDATION}, kinds={"gold": "gold"})
    write_measure(
        out, "seed-0/foundation", {"step-000000.jsonl": SEEDED, "best-of-000002.jsonl": STEPS[2]}
    )
    steps = {f"step-{step:06d}.jsonl": rows for step, rows in STEPS.items()}
    write_measure(out, TRIAL, steps, budget={"flops": 40.0})
    marks = fingerprints(jobs)
    for job in jobs:
        if job.name not in without:
            file = out / "jobs" / f"{job.name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            about = {
                "fingerprint": marks[job.name],
                "finished": "2026-01-01",
                "seconds": 3.0,
                "code": {"commit": "c"},
            }
            file.write_text(json.dumps(about))
    return config


def test_values_land_in_their_places(tmp_path):
    results = read_results(measured(tmp_path))
    keys = [(p.method, p.swept, p.seed, p.step, p.last) for p in results.points]
    assert keys == [("sft", None, None, 0, True), ("sft", None, 0, 0, True), ("best_of_n", 2.0, 0, 2, True),
                    ("dpo", 0.1, 0, 2, False), ("dpo", 0.1, 0, 4, True)]  # fmt: skip
    end = results.points[-1]
    np.testing.assert_allclose(end.values["kl"], [[1, 2], [3, 4]])
    np.testing.assert_allclose(end.values["score/gold"], [[0.1, 0.3], [0.5, 0.7]])
    np.testing.assert_allclose(end.values["score/proxy"], [[2, 3], [4, 6]])
    np.testing.assert_allclose(end.values["length"], [[15, 10], [0, 4]])
    np.testing.assert_allclose(end.values["words"], [[8, 3], [0, 1]])
    np.testing.assert_allclose(end.values["ended"], [[1, 0], [1, 1]])
    # "w x y z w x y z": five runs of four words, the last of which is the first again
    np.testing.assert_allclose(end.values["repetition"], [[0.2, 0], [0, 0]])
    assert end.numbers["perplexity/sft"] == 2.5 and end.budget == {"flops": 40.0}
    assert end.responses == [
        ["w x y z w x y z", "no\u2028end ..."],
        ["", "good"],
    ]
    assert results.groups == ["g0", "g1"] and results.prompts == ["question 0", "question 1"]
    assert results.judge == "gold" and results.methods["dpo"]["swept"] == "beta"
    # the best of 2 is chosen among draws 2-3 and 4-5 of the foundation, whose own samples are draws
    # 0 and 1
    assert results.points[2].noise == [range(2, 4), range(4, 6)] and end.noise is None
    assert results.methods["best_of_n"] | {"options": {}} == {
        "program": "best_of_n", "swept": "n", "swept_values": [2.0], "baseline": True, "options": {},
    }  # fmt: skip


def test_of_the_foundation_s_pool_the_first_samples_are_its_measurement(tmp_path):
    point = read_results(measured(tmp_path)).initial
    np.testing.assert_allclose(point.values["score/gold"], [[0, 0.1], [1, 1.1]])
    assert point.values["kl"].shape == (2, 2) and not point.values["kl"].any()


def test_the_foundation_stands_once_for_all_and_once_with_each_seed_s_proxy(tmp_path):
    results = read_results(measured(tmp_path))
    assert "score/proxy" not in results.initial.values
    np.testing.assert_allclose(results.initial_of(0).values["score/proxy"], 5.0)


def test_diversity_is_that_of_equally_many_responses(tmp_path):
    # the file has 8 words, 5 of them different; the first two samples of each prompt are 4
    # different ones
    config = measured(tmp_path)
    rows = [r if r["sample"] < 2 else r | {"response": "again"} for r in FOUNDATION]
    write_measure(
        tmp_path / "out", "foundation", {"step-000000.jsonl": rows}, kinds={"gold": "gold"}
    )
    results = read_results(config)
    assert results.initial.numbers["distinct_1"] == 1.0
    # w x y z w x y z, no end ..., good: 8 different of 12
    assert results.points[-1].numbers["distinct_1"] == pytest.approx(8 / 12)


def test_parts_of_a_score_that_do_not_apply_everywhere_are_left_out(tmp_path):
    results = read_results(measured(tmp_path))
    # gold/fact is NaN for some prompts
    assert results.score_kinds == {"gold": "gold", "proxy": "proxy"}


def test_parts_that_apply_everywhere_are_kept_as_others(tmp_path):
    config = measured(tmp_path)
    measures = {
        "foundation": {"step-000000.jsonl": FOUNDATION},
        "seed-0/foundation": {"step-000000.jsonl": SEEDED, "best-of-000002.jsonl": STEPS[2]},
        TRIAL: {"step-000004.jsonl": STEPS[4]},
    }
    for name, files in measures.items():
        whole = {
            f: [r | {"scores": r["scores"] | {"gold/fact": 1.0}} for r in rows]
            for f, rows in files.items()
        }
        write_measure(tmp_path / "out", name, whole, kinds={"gold": "gold"})
    results = read_results(config)
    assert results.score_kinds == {"gold": "gold", "gold/fact": "other"}


def test_what_is_missing_and_what_was_made_otherwise_is_named(tmp_path):
    results = read_results(measured(tmp_path, without=[f"measure/{TRIAL}"], **MORE))
    assert results.meta["missing"] == [f"measure/{TRIAL}"] and results.meta["left_out"] == []
    assert results.of("dpo") == [] and len(results.points) == 3
    # a trial whose options have changed since: its old measurement does not count
    measured(tmp_path)
    methods = MORE["methods"] | {"dpo": method(options={"max_steps": 4, "learning_rate": 1.0})}
    results = read_results(experiment(tmp_path, **(MORE | {"methods": methods})))
    assert (
        sorted(results.meta["left_out"]) == sorted([TRIAL, f"measure/{TRIAL}"])
        and results.of("dpo") == []
    )
    # a result that is gone
    config = measured(tmp_path)
    (tmp_path / "out" / "measures" / "seed-0" / "foundation" / "done.json").unlink()
    results = read_results(config)
    assert results.meta["missing"] == ["measure/seed-0/foundation"]
    assert results.of("best_of_n") == [] and results.initial_of(0) is results.initial


def test_meta_has_what_is_needed_to_repeat_it(tmp_path):
    config = measured(tmp_path)
    (tmp_path / "out" / TRIAL / "result.json").write_text(
        json.dumps({"finished": "x", "stopped": "kl above 30"})
    )
    meta = read_results(config).meta
    assert (
        meta["name"] == "out" and meta["config"]["seeds"] == [0] and meta["lengths"] == {"dpo": 4}
    )
    assert meta["stopped"] == {TRIAL: "kl above 30"} and meta["seconds"][TRIAL] == 3.0
    assert meta["finished"] == "2026-01-01" and meta["code"] == ['{"commit": "c"}']


def test_shared_costs_are_means_over_seeds(tmp_path):
    results = read_results(measured(tmp_path))
    assert results.shared_budget == {"reward": {"flops": 300.0}}


def test_before_anything_is_measured_the_report_says_so(tmp_path):
    with pytest.raises(
        UserError,
        match="nothing is measured yet; rlhf experiment run begins with the initial policy",
    ):
        read_results(experiment(tmp_path))
    # matched, the foundation measured, and no pilot yet
    config = measured(tmp_path, methods={"dpo": method()}, budget={"match": "flops", "total": 100})
    results = read_results(config)
    assert results.meta["lengths"] is None and results.of("dpo") == []
    assert "pilot/dpo" in results.meta["missing"]


# what the measuring itself decides


def test_the_best_of_n_by_the_proxy_and_its_kl():
    # one prompt, 8 samples: the first two are the foundation's own, then two blocks of three; of
    # equal ones the first
    proxies = [2.0, 3.0, 0.1, 0.9, 0.5, 0.3, 0.3, 0.2]
    rows = [row(0, i, f"r{i}", proxy=value, gold=-value) for i, value in enumerate(proxies)]
    found = list(best_of(rows[::-1], 3, 2))
    assert [(r["sample"], r["response"], r["prompt"]) for r in found] == [
        (0, "r3", 0),
        (1, "r5", 0),
    ]
    # log n - (n - 1)/n: for n = 3 1.0986123 - 0.6666667
    assert [r["kl"] for r in found] == pytest.approx([0.4319456, 0.4319456], abs=1e-6)
    _, other = best_of(rows, 1, 2)
    assert other["response"] == "r3" and other["kl"] == 0
    assert rows[3]["sample"] == 3 and rows[3]["kl"] == 0.0  # the pool stays as it was


def test_other_prompts_than_the_foundation_s_are_refused(tmp_path):
    config = measured(tmp_path)
    place = tmp_path / "out" / "measures" / TRIAL
    check_same_prompts(config, place)
    (place / "prompts.json").write_text(json.dumps({"prompts": PROMPTS[:1]}))
    with pytest.raises(
        UserError, match="not the test prompts that the initial policy was measured on"
    ):
        check_same_prompts(config, place)


def test_numbers_that_json_does_not_know_come_back(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(
        dumps({"step": 0})
        + "\n"
        + dumps(row(0, 0, "a\u0085b\u2028c", gold=math.nan, x=math.inf))
        + "\n"
    )
    head, (back,) = read_rows(file)
    assert head == {"step": 0} and back["response"] == "a\u0085b\u2028c"
    assert math.isnan(back["scores"]["gold"]) and back["scores"]["x"] == math.inf


def test_the_policies_of_a_run_are_its_checkpoints_and_its_end(tmp_path):
    (tmp_path / "config.yaml").write_text("save_steps: 4")
    for name in (
        "checkpoint-4",
        "checkpoint-7",
        "checkpoint-8",
        "checkpoint-10",
        "aside-checkpoint-4",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "checkpoint-8":  # was never finished
            (tmp_path / "checkpoints" / name / "manifest.json").touch()
    write_metrics(tmp_path, flops(1, 2, first=9))
    # 7 is of an interruption, 10 is the end, which stands in the run's own folder
    assert list(policies_of(tmp_path).items()) == [
        (4, f"{tmp_path}/checkpoints/checkpoint-4"),
        (10, str(tmp_path)),
    ]


def test_a_run_that_a_guard_stopped_before_its_first_checkpoint_is_its_end(tmp_path):
    (tmp_path / "config.yaml").write_text("save_steps: 50")
    write_metrics(tmp_path, flops(1, 2, 3))
    assert policies_of(tmp_path) == {3: str(tmp_path)}


def test_scorers_are_named_by_what_they_are(tmp_path):
    ppo = method(
        "ppo",
        options={
            "reward": [{"model": "{reward}"}, {"rule": "length", "weight": 0.5, "name": "short"}]
        },
    )
    config = experiment(
        tmp_path, methods={"dpo": method(), "ppo": ppo}, others=[{"rule": "length", "name": "long"}]
    )
    specs, kinds, judge = scores_of(config, 1)
    assert judge == "gold" and kinds == {
        "gold": "gold",
        "proxy": "proxy",
        "proxy2": "proxy",
        "long": "other",
    }
    assert specs[1:3] == [
        {"model": f"{tmp_path}/out/seed-1/reward", "name": "proxy"},
        {"rule": "length", "name": "proxy2"},
    ]
    # the foundation has no seed's reward model
    assert scores_of(config, None)[1] == {"gold": "gold", "long": "other"}
    made = experiment(tmp_path, gold=None, train_referee={"options": {}})
    assert scores_of(made, None) == ([{"model": f"{tmp_path}/out/referee", "name": "referee"}], {"referee": "referee"},
                                     "referee")  # fmt: skip
    with pytest.raises(
        UserError, match="two scorers are called 'gold': give one of them another 'name'"
    ):
        scores_of(experiment(tmp_path, others=[{"rule": "length", "name": "gold"}]), None)


def test_an_experiment_is_found_by_its_folder_from_where_it_was_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = experiment(tmp_path, output_dir="out")
    (tmp_path / "out").mkdir()
    save_options(config, tmp_path / "out" / "experiment.yaml")
    assert load_experiment("out") == load_experiment(tmp_path / "out") == config
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="output_dir out, which is another folder from here"):
        load_experiment("../out")
    with pytest.raises(UserError, match="no experiment here"):
        load_experiment(tmp_path)
