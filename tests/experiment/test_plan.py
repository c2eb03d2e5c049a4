import functools
import shutil
from pathlib import Path

import pytest
import yaml

from rlhf.collect.sample import SampleConfig
from rlhf.config import parse
from rlhf.errors import UserError
from rlhf.experiment.config import Method
from rlhf.experiment.plan import INITIAL, flags, given_length, plan
from rlhf.jobs.job import fingerprints
from rlhf.sandbox.annotators import AnnotateConfig
from tests.experiment.example import experiment, method
from tests.launch.conftest import door

LENGTHS = {"dpo": 10, "ppo": 5}


def jobs_of(folder: Path, lengths=LENGTHS, **more):
    return {job.name: job for job in plan(experiment(folder, **more), lengths)}


def marks(folder: Path, lengths=LENGTHS, **more) -> dict[str, str]:
    return fingerprints(plan(experiment(folder, **more), lengths))


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if after.get(name) != before[name]}


def sampled(folder: Path) -> dict:
    """Pairs that the foundation samples and annotators judge."""
    for name, text in (("sample", "prompts: 4"), ("annotate", "noise: 0.2")):
        (folder / f"{name}.yaml").write_text(text)
    return {name: str(folder / f"{name}.yaml") for name in ("sample", "annotate")} | {
        "prompts": [str(folder / "prompts.jsonl")]
    }


def read_back(job):
    """The options that the job's program will have, by its own class."""
    return parse(class_of(job.program.removeprefix("launch.")), job.arguments)


@functools.cache
def class_of(program: str) -> type:
    main = door(program).__wrapped__
    return main.__globals__[
        {"dpo": "DPORunConfig", "ppo": "PPOConfig", "reward": "RewardRunConfig"}[program]
    ]


def test_every_job_comes_after_what_it_needs_and_has_one_name(tmp_path):
    for more in (
        {},
        {"budget": {"match": "flops", "total": 1e9}},
        {"pairs": sampled(tmp_path)},
        {"pairs": sampled(tmp_path), "gold": None, "train_referee": {"options": {}}},
    ):
        jobs = plan(experiment(tmp_path, **more), LENGTHS)
        names = [job.name for job in jobs]
        assert len(set(names)) == len(names)
        for number, job in enumerate(jobs):
            assert set(job.needs) <= set(names[:number]), job.name
            assert set(job.after) <= set(job.needs)


def test_the_jobs_of_a_small_experiment(tmp_path):
    jobs = jobs_of(tmp_path)
    trials = [f"seed-{s}/{t}" for s in (0, 1) for t in ("dpo-beta-0.1", "dpo-beta-0.5", "ppo-kl_coef-0.02",
                                                       "ppo-kl_coef-0.2")]  # fmt: skip
    own = ["seed-0/reward", "seed-1/reward", *trials]
    assert set(jobs) == {*own, *(f"measure/{n}" for n in ("foundation", "seed-0/foundation", "seed-1/foundation")),
                         *(f"measure/{n}" for n in trials)}  # fmt: skip
    assert jobs["seed-0/dpo-beta-0.1"].needs == []  # the pairs are given, and DPO needs no reward
    assert jobs["seed-1/ppo-kl_coef-0.02"].needs == ["seed-1/reward"]
    # each seed's reward model scores all of that seed's policies, DPO's too
    assert set(jobs["measure/seed-1/dpo-beta-0.5"].needs) == {
        *("seed-1/dpo-beta-0.5", "seed-1/reward", "measure/foundation")
    }
    assert set(jobs["measure/seed-0/foundation"].needs) == {"seed-0/reward", "measure/foundation"}
    run = jobs["seed-1/ppo-kl_coef-0.2"]
    assert (run.kind, run.method, run.swept, run.seed, run.steps) == ("trial", "ppo", 0.2, 1, 5)
    assert jobs["seed-0/reward"].kind == "reward"
    assert jobs["seed-0/reward"].outputs == [f"{tmp_path}/out/seed-0/reward/result.json"]
    assert jobs["measure/seed-0/dpo-beta-0.1"].outputs == [
        f"{tmp_path}/out/measures/seed-0/dpo-beta-0.1/done.json"
    ]


def test_matched_methods_have_a_pilot_first_and_trials_once_the_lengths_are_known(tmp_path):
    more = {"budget": {"match": "flops", "total": 1e9}}
    first = jobs_of(tmp_path, None, **more)
    assert not any(job.kind == "trial" for job in first.values())
    assert {name for name in first if name.startswith("pilot/")} == {"pilot/dpo", "pilot/ppo"}
    assert first["pilot/ppo"].needs == ["seed-0/reward"]
    assert not any(name.startswith("pilot/") for name in jobs_of(tmp_path))
    dpo, ppo = (read_back(first[f"pilot/{name}"]) for name in ("dpo", "ppo"))
    assert (dpo.max_steps, dpo.beta, dpo.logging_steps, dpo.save_steps, dpo.seed) == (
        8,
        0.1,
        1,
        0,
        0,
    )
    assert (ppo.total_steps, ppo.kl_coef, ppo.logging_steps, ppo.save_steps, ppo.seed) == (
        3,
        0.02,
        1,
        0,
        0,
    )


@pytest.mark.parametrize("name", ["seed-1/dpo-beta-0.5", "seed-1/ppo-kl_coef-0.2", "seed-1/reward"])
def test_what_is_planned_is_what_the_program_reads(tmp_path, name):
    config = read_back(jobs_of(tmp_path, max_prompt_length=64, max_response_length=24, on_error="skip",
                               validation_fraction=0.2, test_fraction=0.3)[name])  # fmt: skip
    assert config.model_name_or_path == f"{tmp_path}/sft" and config.data == [
        f"{tmp_path}/pairs.jsonl"
    ]
    assert (
        config.output_dir == f"{tmp_path}/out/{name}" and config.seed == 1 and config.half == "all"
    )
    assert (config.max_prompt_length, config.max_response_length, config.on_error) == (
        64,
        24,
        "skip",
    )
    assert (config.validation_fraction, config.test_fraction) == (0.2, 0.3)
    if name.endswith("reward"):
        return
    assert config.learning_rate == 1e-3  # the method's own file
    assert config.eval_prompts == 0 and config.temperature == 1.0
    # 2 checkpoints: DPO's 10 steps at 5 and 10, PPO's 5 at 3 and 5; none of them is removed again
    assert config.save_steps == (5 if "dpo" in name else 3) and config.save_total_limit >= 2


def test_the_dtype_of_an_experiment_is_that_of_all_its_programs(tmp_path):
    more = {"pairs": sampled(tmp_path)}
    jobs = jobs_of(tmp_path, dtype="bfloat16", **more)
    assert read_back(jobs["seed-1/reward"]).dtype == "bfloat16"
    assert read_back(jobs["seed-1/dpo-beta-0.1"]).dtype == "bfloat16"
    sample = parse(SampleConfig, jobs["seed-1/sample"].arguments[2:])
    assert sample.dtype == "bfloat16"
    assert jobs[f"measure/{INITIAL}"].measures.settings["dtype"] == "bfloat16"
    # auto: the file of each decides, and commands are those of earlier versions
    for job in jobs_of(tmp_path, **more).values():
        assert "--dtype" not in job.arguments


def test_strength_and_length_reach_the_program(tmp_path):
    jobs = jobs_of(tmp_path)
    dpo, ppo = (read_back(jobs[n]) for n in ("seed-0/dpo-beta-0.5", "seed-0/ppo-kl_coef-0.02"))
    assert (dpo.beta, dpo.max_steps) == (0.5, 10)
    assert (ppo.kl_coef, ppo.total_episodes, ppo.rollout_batch_size, ppo.total_steps) == (
        0.02,
        80,
        16,
        5,
    )
    assert ppo.reward == [{"model": f"{tmp_path}/out/seed-0/reward"}]


def test_options_of_a_method_stand_over_its_file_and_arrive_as_they_are(tmp_path):
    own = {
        "lora_r": 8, "reward": [{"model": "{reward}"}, {"voice": "größe, 'a' b.yaml", "weight": 0.5}],
        "missing_eos_score": None, "whiten_rewards": True, "guards": {"max_kl": {"threshold": 30}},
        "learning_rate": "2e-3",
    }  # fmt: skip
    ppo = method("ppo", config=str(tmp_path / "ppo.yaml"), options=own)
    config = read_back(
        jobs_of(tmp_path, {"ppo": 5}, methods={"ppo": ppo})["seed-1/ppo-kl_coef-0.1"]
    )
    assert config.lora_r == 8 and config.learning_rate == 2e-3 and config.whiten_rewards is True
    assert config.missing_eos_score is None and config.guards == {"max_kl": {"threshold": 30}}
    assert config.reward == [
        {"model": f"{tmp_path}/out/seed-1/reward"},
        {"voice": "größe, 'a' b.yaml", "weight": 0.5},
    ]


def test_paths_with_spaces_and_commas(tmp_path):
    folder = tmp_path / "my data, new"
    folder.mkdir()
    config = read_back(jobs_of(folder)["seed-0/ppo-kl_coef-0.2"])
    assert config.data == [f"{folder}/pairs.jsonl"] and config.reward == [
        {"model": f"{folder}/out/seed-0/reward"}
    ]
    assert config.output_dir == f"{folder}/out/seed-0/ppo-kl_coef-0.2"


def test_with_a_referee_trained_here_methods_get_half_a_and_it_gets_half_b(tmp_path):
    jobs = jobs_of(tmp_path, gold=None, train_referee={"options": {"use_peft": False}})
    referee = read_back(jobs["referee"])
    assert (referee.half, referee.use_peft, referee.seed) == ("b", False, 1000)
    assert referee.output_dir == f"{tmp_path}/out/referee"
    halves = {n: read_back(j).half for n, j in jobs.items() if j.run_folder and n != "referee"}
    assert set(halves.values()) == {"a"} and len(halves) == 10
    assert all("referee" in job.needs for name, job in jobs.items() if name.startswith("measure/"))


def test_sampled_pairs_are_made_anew_for_each_seed_and_all_learn_from_them(tmp_path):
    jobs = jobs_of(tmp_path, pairs=sampled(tmp_path), max_response_length=24, seeds=[3, 5])
    for seed in (3, 5):
        store = f"{tmp_path}/out/seed-{seed}/preferences.db"
        sample = parse(SampleConfig, jobs[f"seed-{seed}/sample"].arguments[2:])
        assert (sample.seed, sample.store, sample.prompts, sample.max_response_length) == (
            seed,
            store,
            4,
            24,
        )
        assert (
            sample.data == [f"{tmp_path}/prompts.jsonl"]
            and sample.model_name_or_path == f"{tmp_path}/sft"
        )
        annotate = parse(AnnotateConfig, jobs[f"seed-{seed}/annotate"].arguments[2:])
        assert (annotate.seed, annotate.store, annotate.noise) == (seed, store, 0.2)
        for name in (
            f"seed-{seed}/dpo-beta-0.1",
            f"seed-{seed}/reward",
            f"seed-{seed}/ppo-kl_coef-0.2",
        ):
            assert (
                read_back(jobs[name]).data == [store]
                and f"seed-{seed}/annotate" in jobs[name].needs
            )


def test_folder_names_of_small_strengths(tmp_path):
    jobs = jobs_of(
        tmp_path, {"dpo": 4}, methods={"dpo": method(sweep={"beta": [1e-05, 1, 100000.5]})}
    )
    assert {job.name: read_back(job).beta for job in jobs.values() if job.kind == "trial" and job.seed == 0} == {
        "seed-0/dpo-beta-1e-05": 1e-5, "seed-0/dpo-beta-1": 1.0, "seed-0/dpo-beta-100000": 100000.5,
    }  # fmt: skip


@pytest.mark.parametrize("steps,checkpoints,every", [(10, 2, 5), (7, 2, 4), (2, 4, 1), (9, 1, 9)])
def test_checkpoints_are_spread_over_the_run(tmp_path, steps, checkpoints, every):
    jobs = jobs_of(tmp_path, {"dpo": steps}, methods={"dpo": method()}, checkpoints=checkpoints)
    assert read_back(jobs["seed-0/dpo-beta-0.1"]).save_steps == every


def test_eval_every_stands_over_checkpoints_and_may_be_longer_than_the_run(tmp_path):
    for every in (3, 50):
        jobs = jobs_of(tmp_path, {"dpo": 10}, methods={"dpo": method(eval_every=every)})
        config = read_back(jobs["seed-0/dpo-beta-0.1"])
        assert config.save_steps == every and config.save_total_limit >= 10 // every + 1


# fingerprints: what changes which


def test_fingerprints_do_not_depend_on_how_many_run_at_a_time_or_how_they_are_launched(tmp_path):
    before = marks(tmp_path)
    more = {
        "processes": 4,
        "launcher": "python",
        "redo": True,
        "report_to": "wandb",
        "project": "x",
        "batch_size": 2,
    }
    assert marks(tmp_path, **more) == before


def test_a_seed_or_a_strength_more_leaves_the_others_alone(tmp_path):
    before = marks(tmp_path)
    dpo = {
        "program": "dpo",
        "config": str(tmp_path / "dpo.yaml"),
        "sweep": {"beta": [0.1, 0.2, 0.5]},
    }
    methods = experiment(tmp_path).methods
    for more in (
        {"seeds": [0, 1, 2]},
        {"seeds": [1, 0]},
        {"methods": methods | {"dpo": dpo}},
        {"methods": methods | {"ppo_more": method("ppo")}},
    ):
        after = marks(tmp_path, LENGTHS | {"ppo_more": 5}, **more)
        assert changed(before, after) == set() and len(after) >= len(before)


def test_one_n_more_of_best_of_n_measures_the_foundation_alone_anew(tmp_path):
    before, methods = marks(tmp_path), experiment(tmp_path).methods
    best = {f"measure/seed-{s}/foundation" for s in (0, 1)}
    # within the pool that was sampled: chosen anew from it; beyond: sampled anew
    after = marks(tmp_path, methods=methods | {"best_of_n": {"sweep": {"n": [2, 3, 4]}}})
    assert changed(before, after) == best
    after = marks(tmp_path, methods=methods | {"best_of_n": {"sweep": {"n": [2, 4, 8]}}})
    assert changed(before, after) == best | {"measure/foundation"}


@pytest.mark.parametrize(
    "more",
    [
        {"n_prompts": 3}, {"samples_per_prompt": 3}, {"gold": [{"rule": "length", "low": 1, "high": 9}]},
        {"others": [{"rule": "length", "low": 1, "high": 9}]}, {"perplexity": {"sft": ["owner/texts"]}},
    ],
)  # fmt: skip
def test_options_of_measuring_change_the_measuring_alone(tmp_path, more):
    before, after = marks(tmp_path), marks(tmp_path, **more)
    assert changed(before, after) == {name for name in before if name.startswith("measure/")}


def test_a_file_that_measuring_reads_changes_the_measuring_alone(tmp_path):
    before = marks(tmp_path)
    for name in ("prompts.jsonl", "voice.yaml"):
        options = (tmp_path / name).read_text()
        after = marks_with(tmp_path, {name: options + "\n"})
        assert changed(before, after) == {name for name in before if name.startswith("measure/")}, (
            name
        )


def marks_with(folder: Path, files: dict[str, str], **more) -> dict[str, str]:
    """Fingerprints when some files of the example have other contents."""
    config = experiment(folder, **more)
    for name, text in files.items():
        (folder / name).write_text(text)
    return fingerprints(plan(config, LENGTHS))


def test_another_foundation_changes_everything(tmp_path):
    before = marks(tmp_path)
    assert changed(
        before, marks_with(tmp_path, {"sft/adapter_model.safetensors": "others"})
    ) == set(before)
    shutil.copytree(tmp_path / "sft", tmp_path / "sft2")
    after = marks(tmp_path, initial_policy=str(tmp_path / "sft2"))
    assert changed(before, after) == set(before)
    # a name on the Hub
    assert changed(after, marks(tmp_path, initial_policy="owner/model")) == set(before)


def test_the_file_of_a_method_changes_its_trials_and_their_measuring(tmp_path):
    before = marks(tmp_path)
    after = marks_with(
        tmp_path, {"dpo.yaml": yaml.safe_dump({"learning_rate": 2e-3, "max_steps": 40})}
    )
    dpo = {name for name in before if "dpo" in name}
    assert changed(before, after) == dpo and len(dpo) == 8
    after = marks(tmp_path, LENGTHS | {"dpo": 11})
    assert changed(before, after) == dpo


def test_what_a_job_stands_on_changes_it(tmp_path):
    before = marks(tmp_path)
    after = marks_with(tmp_path, {"reward.yaml": "num_train_epochs: 2"})
    # the reward models, what learns from them, and whatever they score
    untouched = {
        "measure/foundation",
        *(f"seed-{s}/dpo-beta-{b}" for s in (0, 1) for b in (0.1, 0.5)),
    }
    assert set(before) - changed(before, after) == untouched
    after = marks_with(
        tmp_path, {"pairs.jsonl": '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'}
    )
    assert set(before) - changed(before, after) == {"measure/foundation"}


def test_sampled_pairs_change_what_stands_on_them(tmp_path):
    more = {"pairs": sampled(tmp_path), "gold": None, "train_referee": {"options": {}}}
    before = marks(tmp_path, **more)
    after = marks_with(tmp_path, {"annotate.yaml": "noise: 0.3"}, **more)
    # the referee learns from the pairs of the first seed, and it measures everything
    assert set(before) - changed(before, after) == {"seed-0/sample", "seed-1/sample"}
    after = marks_with(
        tmp_path, {"annotate.yaml": "noise: 0.2", "sample.yaml": "prompts: 3"}, **more
    )
    assert changed(before, after) == set(before)


def test_a_scorer_that_a_method_learns_from_changes_its_runs_and_what_is_measured_by_it(tmp_path):
    (tmp_path / "brand.yaml").write_text("a")
    ppo = method("ppo", options={"reward": [{"voice": str(tmp_path / "brand.yaml")}]})
    more = {"methods": {"dpo": method(), "ppo": ppo}, "reward": None, "seeds": [0]}
    before = marks(tmp_path, **more)
    after = marks_with(tmp_path, {"brand.yaml": "b"}, **more)
    assert set(before) - changed(before, after) == {"seed-0/dpo-beta-0.1", "measure/foundation"}


# lengths that are given


def test_steps_of_a_method_that_is_not_matched(tmp_path):
    methods = experiment(tmp_path).methods

    def steps(method: dict) -> int:
        return given_length(Method.model_validate(method))

    # 320 episodes in rollouts of 16
    assert steps(methods["dpo"]) == 40 and steps(methods["ppo"]) == 20
    assert steps(methods["ppo"] | {"options": {"total_episodes": "6.4e2"}}) == 40
    assert steps(methods["ppo"] | {"options": {"rollout_batch_size": 64}}) == 5
    # less than one rollout of 64
    for method_ in (method(), method("ppo", options={"total_episodes": 63})):
        with pytest.raises(
            UserError, match=r"trains is not known: give '(max_steps|total_episodes)'"
        ):
            steps(method_)


def test_flags_read_back():
    given = {"a": 1e-05, "b": True, "c": None, "d": ["x y", "z,w"], "e": {"k": "😀"}, "f": "text"}
    words = list(flags(given))
    assert words == ["--a", "1e-05", "--b", "true", "--c", "none", "--d", '["x y", "z,w"]', "--e", '{"k": "😀"}', "--f",
                     "text"]  # fmt: skip
