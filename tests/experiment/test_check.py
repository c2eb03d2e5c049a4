"""What is found wrong before anything is started."""

import json
import shutil

import pytest
import yaml

from reward.compose import check_scorers
from rlhf.data.split import half_of, split_of
from rlhf.errors import UserError
from rlhf.experiment.check import check_decisions, check_programs, check_starts
from rlhf.jobs.runner import last_error
from tests.experiment.example import experiment, method


@pytest.mark.parametrize(
    "spec,message",
    [
        (
            method(sweep={"beat": [0.1]}),
            r"methods: 'dpo': unknown option 'beat'. Did you mean 'beta'\?",
        ),
        (
            method(options={"lerning_rate": 1, "max_steps": 40}),
            "methods: 'dpo': unknown option 'lerning_rate'",
        ),
        (
            method(options={"loss_type": ["ipoo"], "max_steps": 40}),
            "methods: 'dpo': .*found 'ipoo', expected one of sigmoid, .*Did you mean 'ipo'",
        ),
        (
            method("ppo", options={"advantage_estimator": "rlo"}),
            "methods: 'dpo': .*expected one of gae, rloo",
        ),
    ],
)
def test_every_command_is_read_as_its_program_will(tmp_path, spec, message):
    check_programs(experiment(tmp_path))
    with pytest.raises(UserError, match=message):
        check_programs(experiment(tmp_path, methods={"dpo": spec}))


def test_a_part_that_is_no_method_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^reward: unknown option 'epochs'"):
        check_programs(experiment(tmp_path, reward={"options": {"epochs": 1}}))


def test_what_a_method_learns_from_cannot_decide(tmp_path):
    check_decisions(experiment(tmp_path, launcher="python"))
    voice = {"voice": str(tmp_path / "voice.yaml")}
    learns = {"ppo": method("ppo", options={"reward": [voice]})}
    with pytest.raises(UserError, match=r"gold .*'ppo' learns from it, so it cannot decide"):
        check_decisions(experiment(tmp_path, methods=learns, launcher="python"))
    watches = {
        "ppo": method("ppo", options={"reward": [{"model": "{reward}"}, voice | {"weight": 0}]})
    }
    check_decisions(experiment(tmp_path, methods=watches, launcher="python"))


def test_a_judge_and_a_launcher_that_are_not_there_are_found_at_once(tmp_path):
    with pytest.raises(UserError, match="there is no program 'deepsped'"):
        check_decisions(experiment(tmp_path, launcher="deepsped --num_gpus 8"))
    with pytest.raises(UserError, match=r"judge.*'prefer' should be written module:function"):
        check_decisions(experiment(tmp_path, judge={"function": "prefer"}, launcher="python"))


def test_one_number_is_no_count_of_seeds(tmp_path):
    with pytest.raises(
        UserError, match=r"the one seed 5: for as many seeds write \[0, 1, ..., 4\]"
    ):
        experiment(tmp_path, seeds=[5])


def test_the_last_error_of_a_log_is_repeated(tmp_path):
    log = tmp_path / "x.log"
    assert last_error(log) == ""
    log.write_text("begins\nerror: the first\n$ again\nerror: the last\nProcess exits with 2\n")
    assert last_error(log) == ": error: the last"


def start(folder, initial, rows=None, **more):
    """Look at the starts of an experiment on a real foundation, with 60 pairs of test, validation
    and training rows.
    """
    config = experiment(
        folder, initial_policy=initial, max_prompt_length=64, max_response_length=32, **more
    )
    splits = ("test", "validation", "train", "train", "train")
    usual = [
        {"prompt": f"question {i}", "group": f"g{i}", "split": splits[i % 5]} for i in range(60)
    ]
    rows = [row | {"chosen": "yes", "rejected": "no"} for row in (rows(usual) if rows else usual)]
    for name in ("pairs", "prompts"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_starts(config, check_programs(config), check_scorers)


def refused(folder, initial, message, rows=None, **more):
    with pytest.raises(UserError, match=message):
        start(folder, initial, rows, **more)


def only(*splits, half=None):
    return lambda rows: [
        r for r in rows if r["split"] in splits and (half is None or half_of(r["group"]) == half)
    ]


def test_starts_that_a_program_would_refuse_are_refused_before_anything_starts(
    tmp_path, sft_path, base_path
):
    start(tmp_path, sft_path)
    # the foundation is an adapter: a referee that is trained whole would be refused after the first
    # jobs
    whole = {"options": {"use_peft": False}}
    refused(tmp_path, sft_path, "^referee: use_peft is false, but", gold=None, train_referee=whole)
    start(tmp_path, base_path, gold=None, train_referee=whole)
    refused(
        tmp_path,
        sft_path,
        "^reward: --trl: trl: 'epochs' is no option",
        reward={"options": {"trl": {"epochs": 1}}},
    )
    refused(
        tmp_path,
        sft_path,
        "^reward: .*deepspeed: no file 'zer0'",
        reward={"options": {"deepspeed": "zer0"}},
    )
    targets = {"dpo": method(options={"lora_target_modules": ["q_prj"], "max_steps": 9})}
    refused(
        tmp_path,
        base_path,
        "^methods: 'dpo': 'lora_target_modules': no layer is called 'q_prj'",
        methods=targets,
    )
    long = {"max_response_length": 600}
    with pytest.raises(
        UserError,
        match=r"reward: max_prompt_length 64 \+ max_response_length 600 = 664 tokens, but",
    ):
        config = experiment(tmp_path, initial_policy=sft_path, max_prompt_length=64, **long)
        check_starts(config, check_programs(config), check_scorers)


def test_a_foundation_that_is_cut_short_is_refused(tmp_path, sft_path):
    folder = tmp_path / "cut"
    shutil.copytree(sft_path, folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path, str(folder), "adapter_model.safetensors: the weights cannot be read")


def test_scorers_that_cannot_be_made_are_refused(tmp_path, sft_path, reward_path):
    for wrong, message in (
        ({"model": sft_path}, "this adapter has no score head"),
        ({"model": str(tmp_path / "none")}, "none: no such folder"),
        ({"voice": "nowhere.yaml"}, "nowhere.yaml"),
    ):
        refused(tmp_path, sft_path, message, gold=None, referee=[wrong])
        learns = {
            "ppo": method(
                "ppo", options={"reward": [{"model": "{reward}"}, wrong], "total_episodes": 640}
            )
        }
        refused(tmp_path, sft_path, f"^methods: 'ppo': .*{message}", methods=learns)
    start(tmp_path, sft_path, gold=None, referee=[{"model": reward_path}])


def test_each_split_and_half_that_is_used_needs_rows(tmp_path, sft_path):
    message = "^reward: .*pairs.jsonl: no record is left of 24 with split=train and half=all"
    refused(tmp_path, sft_path, message, only("test", "validation"))
    refused(
        tmp_path, sft_path, "prompts .*: 0 groups of the test split", only("train", "validation")
    )

    def none_by_chance(rows):
        """Without splits of their own; of 60 groups none comes to lie among the validation rows."""
        return [
            {"prompt": r["prompt"], "group": r["group"]}
            for r in rows
            if split_of(r["group"]) != "validation"
        ]

    refused(
        tmp_path,
        sft_path,
        "^reward: .*pairs.jsonl: no preference is left for the validation split",
        none_by_chance,
    )
    start(tmp_path, sft_path, none_by_chance, validation_fraction=0.0)

    referee = {"gold": None, "train_referee": {"options": {"max_steps": 3}}}
    start(tmp_path, sft_path, **referee)
    only_a = only("test", "validation", "train", half="a")
    refused(tmp_path, sft_path, "^referee: .*split=train and half=b", only_a, **referee)


def test_what_samples_the_pairs_is_read_too(tmp_path, sft_path):
    for name, options in (("sample", {"prompts": 8}), ("annotate", {"noise": 0.2})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(options))
    pairs = {"prompts": [str(tmp_path / "prompts.jsonl")]}
    pairs |= {name: str(tmp_path / f"{name}.yaml") for name in ("sample", "annotate")}
    start(tmp_path, sft_path, pairs=pairs)
    refused(
        tmp_path,
        sft_path,
        "prompts.jsonl: no record is left of 12 with split=train",
        only("test"),
        pairs=pairs,
    )
    for name in ("sample", "annotate"):
        text = (tmp_path / f"{name}.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(text + "nois: 1\n")
        refused(tmp_path, sft_path, f"^{name}: .*unknown option 'nois'", pairs=pairs)
        (tmp_path / f"{name}.yaml").write_text(text)
