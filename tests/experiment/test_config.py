import pytest
import yaml

from rlhf.cli import main
from rlhf.config import parse
from rlhf.errors import UserError
from rlhf.experiment.check import check_files
from rlhf.experiment.config import ExperimentConfig
from tests.experiment.example import experiment, method, options

SAMPLED = {"prompts": ["p.jsonl"], "sample": "s.yaml", "annotate": "a.yaml"}
DPO = {"dpo": method()}
PPO = {"ppo": method("ppo")}
MATCHED = {"match": "flops", "total": 1e9}


def swept(values, name="beta"):
    return {"methods": {"dpo": method(sweep={name: values})}}


@pytest.mark.parametrize(
    "more,message",
    [
        # unknown keys, with the nearest known one
        (
            {"pairs": {"dat": ["x"]}},
            r"pairs: unknown key 'dat'. Did you mean 'data'\? Known keys: data, prompts, sample, ann",
        ),
        (
            {"budget": {"match": "none", "totl": 1}},
            r"budget: unknown key 'totl'. Did you mean 'total'\?",
        ),
        (
            {"judge": {"url": "x"}},
            r"'judge' is .*expected \{function: module:function\}, \{http: URL\} or \{openai: URL, model: NAME\}",
        ),
        ({"reward": {"confg": "x"}}, r"reward: unknown key 'confg'. Did you mean 'config'\?"),
        (
            {"train_referee": {"seed": 1}, "gold": None},
            "train_referee: unknown key 'seed'.*Known keys: config, op",
        ),
        (
            {"methods": {"dpo": method(sweeep={})}},
            r"methods: 'dpo': unknown key 'sweeep'. Did you mean 'sweep'\?",
        ),
        (
            {"methods": {"dpo": "configs/dpo.yaml"}},
            "methods: 'dpo': found 'configs/dpo.yaml', expected a mapping",
        ),
        # strengths
        ({"methods": {"dpo": {"program": "dpo"}}}, r"methods: 'dpo': 'sweep' is missing"),
        (
            swept([]),
            r"sweep: found \{'beta': \[\]\}, expected one option with different values: \{beta: \[",
        ),
        (swept(0.1), "sweep: found {'beta': 0.1}, expected one option"),
        (swept([0.1, "much"]), "methods: 'dpo'.sweep: found .*'beta'.*expected one option"),
        (swept([0.1, True]), "expected one option with different values"),
        (swept([0.1, float("nan")]), "expected one option with different values"),
        (swept([0.1, 0.1]), "expected one option with different values"),
        (swept([0.1, "1e-1"]), "expected one option with different values"),
        # both named 0.123457
        (swept([0.12345671, 0.12345672]), "expected one option with different values"),
        ({"methods": {"dpo": method(sweep={"beta": [1], "seed": [2]})}}, "expected one option"),
        (swept([10, 20], "max_steps"), "methods: 'dpo'.sweep: 'max_steps' is the length of a run"),
        (
            swept([1, 2], "seed"),
            "methods: 'dpo'.sweep: 'seed' is set by the experiment, the same for all",
        ),
        # methods and their options
        (
            {"methods": {"dpo": method("sft")}},
            "methods: 'dpo'.program: found 'sft', expected 'dpo' or 'ppo'",
        ),
        ({"methods": {"dpo": {"sweep": {"beta": [1]}}}}, "methods: 'dpo': 'program' is missing"),
        (
            {"methods": {"dpo": method(options={"half": "b"})}},
            "methods: 'dpo'.options: 'half' is set by the experi",
        ),
        (
            {"methods": {"dpo": method(options=None)}},
            "methods: 'dpo'.options: found None, expected a mapping",
        ),
        ({"reward": {"options": {"seed": 3}}}, "reward.options: 'seed' is set by the experiment"),
        (
            {"reward": {"options": {"dtype": "float32"}}},
            "reward.options: 'dtype' is set by the experiment",
        ),
        (
            {"train_referee": {"options": {"half": "a"}}, "gold": None},
            "train_referee.options: 'half' is set by",
        ),
        ({"methods": {"dpo": method(eval_every=0)}}, "eval_every: found 0, expected"),
        (
            {"methods": {"dpo": method(eval_every=2.5)}},
            "eval_every: found 2.5, expected a whole number",
        ),
        # names
        (
            {"methods": {"sft": method()}},
            "methods: 'sft': a name has letters, digits and '_' alone, and 'sft' is",
        ),
        ({"methods": {"a/b": method()}}, "methods: 'a/b': a name has letters"),
        ({"methods": {"dpo-2": method()}}, "a name has letters"),
        ({"methods": {"": method()}}, "a name has letters"),
        # best of n
        (
            {"methods": DPO | {"best_of_n": {"sweep": {"beta": [2]}}}},
            "'best_of_n'.sweep: unknown key 'beta'",
        ),
        (
            {"methods": DPO | {"best_of_n": {"sweep": {"n": [2.5]}}}},
            "sweep.n, item 1: found 2.5, expected a whole number",
        ),
        (
            {"methods": DPO | {"best_of_n": {"sweep": {"n": [0]}}}},
            "'best_of_n'.sweep.n, item 1: found 0, expected",
        ),
        (
            {"methods": DPO | {"best_of_n": {"sweep": {"n": [2]}, "program": "ppo"}}},
            "best_of_n': unknown key 'program",
        ),
        (
            {"methods": DPO | {"best_of_n": {"sweep": {"n": [2]}}}, "reward": None},
            "'best_of_n' chooses by the rewa",
        ),
        # what the methods learn from
        (
            {"methods": PPO, "reward": None},
            r"methods: 'ppo' needs a reward: give 'reward: \{config: configs/reward.y",
        ),
        ({"methods": {}}, "'methods' trains nothing; for example dpo: {program: dpo"),
        ({"methods": {"best_of_n": {"sweep": {"n": [2]}}}}, "'methods' trains nothing"),
        (
            {"pairs": {}},
            r"pairs: expected either data: \[FILE\], or prompts: \[FILE\] with sample: CONFIG",
        ),
        ({"pairs": {"data": ["x"], **SAMPLED}}, "pairs: expected either"),
        ({"pairs": {"prompts": ["x"], "sample": "s.yaml"}}, "pairs: expected either"),
        # budget
        (
            {"budget": {"match": "flop"}},
            r"budget.match: found 'flop', expected 'flops', .*'none'. Did you mean 'flops'",
        ),
        ({"budget": {"match": "flops"}}, "budget: 'total' is missing, expected a number above 0"),
        (
            {"budget": {"match": "flops", "total": "much"}},
            "budget.total: found 'much', expected a number",
        ),
        (
            {"budget": {"match": "flops", "total": 0}},
            "budget.total: found 0, expected .*greater than 0",
        ),
        (
            {"budget": {"match": "flops", "total": float("inf")}},
            "budget.total: found inf, expected .*finite",
        ),
        (
            {"budget": MATCHED | {"tolerance": -1}},
            "budget.tolerance: found -1, expected .*greater than 0",
        ),
        (
            {"budget": MATCHED, "methods": DPO | {"ppo": method("ppo", sweep={"kl_coef": [1, 2]})}},
            r"unequal numbers of swept values \(dpo 1, ppo 2\): .* Give as many, or budget: \{match: none\}",
        ),
        (
            {"budget": MATCHED, "methods": {"dpo": method(options={"max_steps": 9})}},
            "methods: 'dpo' sets 'max_steps', which follows from the matched budget; leave it out",
        ),
        # the rest
        ({"seeds": []}, r"'seeds' is \[\], expected different whole numbers"),
        ({"seeds": [1, 1]}, r"'seeds' is \[1, 1\], expected different whole numbers"),
        ({"seeds": [-1]}, r"'seeds' is \[-1\], expected different whole numbers from 0 on"),
        (
            {"launcher": " "},
            "'launcher' is empty, expected 'deepspeed --num_accelerators 1', or 'python' for none",
        ),
        (
            {"referee": [{"model": "r"}]},
            "'gold' and a referee are both given: where the true reward is known, no",
        ),
        ({"train_referee": {"config": "r.yaml"}}, "'gold' and a referee are both given"),
        (
            {"referee": [{"model": "r"}], "train_referee": {"config": "r.yaml"}, "gold": None},
            "'referee' names a referee and 'train_referee' trains one: give one of them",
        ),
        (
            {"judge": {"timeout": 3}},
            r"'judge' is .*expected \{function: module:function\}, \{http: URL\} or \{openai: URL, model: NAME\}",
        ),
        (
            {"judge": {"function": "m:f", "http": "x"}},
            r"'judge' is .*expected \{function: module:function\}, ",
        ),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        experiment(tmp_path, **more)


def test_the_example_itself_is_fine_and_says_what_it_is(tmp_path):
    config = experiment(tmp_path)
    check_files(config)
    assert config.trained == ["dpo", "ppo"] and config.matched is None
    # 2 samples of each prompt, and beside them 2 blocks of up to 4 to choose from
    assert config.pool == 10
    assert experiment(tmp_path, methods=DPO).pool == 2
    assert experiment(tmp_path, budget=MATCHED).matched == "flops"


def test_unequal_numbers_of_strengths_are_allowed_where_nothing_is_matched(tmp_path):
    methods = DPO | {"ppo": method("ppo", sweep={"kl_coef": [1, 2]})}
    assert experiment(tmp_path, methods=methods).trained == ["dpo", "ppo"]


def test_numbers_that_yaml_reads_as_texts_are_numbers(tmp_path):
    # YAML 1.1 reads 2e12 and 1e-05 as texts
    more = yaml.safe_load("{budget: {match: flops, total: 2e12}, pairs: {data: one.jsonl}}")
    config = experiment(tmp_path, methods={"dpo": method(sweep={"beta": ["1e-05", 0.1]})}, **more)
    assert config.methods["dpo"]["sweep"] == {"beta": [1e-5, 0.1]}
    assert config.budget == {"match": "flops", "total": 2e12, "tolerance": 0.1}
    assert config.pairs == {"data": ["one.jsonl"]}


def test_a_folder_has_one_name(tmp_path):
    assert experiment(tmp_path, output_dir="runs/./x/").output_dir == "runs/x"


@pytest.mark.parametrize(
    "more,message",
    [
        ({"initial_policy": "sf"}, r"initial_policy .*sf: no such run. Did you mean .*sft\?"),
        (
            {"pairs": {"data": ["pair.jsonl"]}},
            r"pair.jsonl: no such file. Did you mean .*pairs.jsonl\?",
        ),
        (
            {"prompts": ["prompt.jsonl"]},
            r"prompt.jsonl: no such file. Did you mean .*prompts.jsonl\?",
        ),
        ({"perplexity": {"sft": ["held.jsonl"]}}, "held.jsonl: no such file"),
        (
            {"reward": {"config": "rewards.yaml"}},
            r"rewards.yaml: no such file. Did you mean .*reward.yaml\?",
        ),
        ({"methods": {"dpo": method(config="dp.yaml")}}, "dp.yaml: no such file"),
        ({"train_referee": {"config": "ref.yaml"}, "gold": None}, "ref.yaml: no such file"),
        ({"pairs": SAMPLED}, "p.jsonl: no such file"),
        ({"pairs": SAMPLED | {"prompts": ["pairs.jsonl"]}}, "s.yaml: no such file"),
    ],
)
def test_what_is_named_has_to_be_there(tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        check_files(experiment(tmp_path, **more))


def test_names_on_the_hub_and_events_of_a_store_are_no_missing_files(tmp_path):
    (tmp_path / "votes.db").touch()
    pairs = {"data": [f"{tmp_path}/votes.db@118", "owner/pairs"]}
    check_files(
        experiment(
            tmp_path,
            initial_policy="owner/model",
            pairs=pairs,
            prompts=["owner/prompts:small@test"],
        )
    )


def run_file(tmp_path, capsys, **more):
    """Return exit code and stderr of rlhf experiment run FILE."""
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(options(tmp_path, **more)))
    with pytest.raises(SystemExit) as ended:
        main(["experiment", "run", str(file)])
    return ended.value.code, capsys.readouterr().err


def test_the_command_names_the_file_and_ends_with_code_2(tmp_path, capsys):
    code, said = run_file(tmp_path, capsys, seeds=[1, 1])
    assert code == 2 and said.startswith(
        f"error: {tmp_path}/x.yaml: 'seeds' is [1, 1], expected different"
    )
    code, said = run_file(tmp_path, capsys, checkpoint=2)
    assert code == 2 and "x.yaml: unknown option 'checkpoint'. Did you mean 'checkpoints'?" in said
    code, said = run_file(tmp_path, capsys, checkpoints=0)
    assert code == 2 and "'checkpoints' is 0, expected at least 1" in said
    code, said = run_file(tmp_path, capsys, initial_policy=str(tmp_path / "sff"))
    assert (
        code == 2
        and f"initial_policy {tmp_path}/sff: no such run. Did you mean {tmp_path}/sft?" in said
    )
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_the_options_read_back_as_they_were_saved(tmp_path):
    from rlhf.config import save_options

    config = experiment(tmp_path, budget=MATCHED, seeds=[7, 3])
    save_options(config, tmp_path / "experiment.yaml")
    assert parse(ExperimentConfig, ["--config", str(tmp_path / "experiment.yaml")]) == config
