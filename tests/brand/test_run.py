"""The plan of `rlhf brand run`, with a small script in the place of every program."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from rlhf.brand import run as module
from rlhf.brand.config import BrandConfig
from rlhf.brand.plan import plan
from rlhf.brand.run import run_brand
from rlhf.cli import main
from rlhf.commands import COMMANDS
from rlhf.config import parse
from rlhf.data.store import Store
from rlhf.errors import EXIT_INTERRUPTED, EarlyExit, UserError
from rlhf.jobs import commands, runner
from rlhf.jobs.job import fingerprints

STEPS = ["answers", "pairs", "dpo", "ab", "ab-votes", "measure", "verdict"]
# leaves the outputs of a job and says so; stores are real ones, with one pair
PROGRAM = """
import json, pathlib, sys
from rlhf.data.store import Store
name, *outputs = sys.argv[1:]
if pathlib.Path(f"fail-{name}").exists():
    sys.exit("error: no luck")
for output in map(pathlib.Path, outputs):
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".db":
        with Store.open(output, create=True) as store:
            prompt = store.add_prompt([{"role": "user", "content": "?"}])
            store.add_comparison(*(store.add_response(prompt, text, model=text) for text in "xy"))
    else:
        ship = pathlib.Path("ship").exists()
        output.write_text(json.dumps({"finished": "now", "ship": ship, "verdict": "V", "gates": []}))
with open("ran", "a") as ran:
    ran.write(f"{name}\\n")
"""


@pytest.fixture
def brand(tmp_path, monkeypatch):
    """A function that runs a brand with commands that only leave their files, and returns the jobs
    that ran.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        runner,
        "full_command",
        lambda _, job: [sys.executable, "-c", PROGRAM, job.name, *job.outputs],
    )
    monkeypatch.setattr(runner, "code_version", dict)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(commands, "has_accelerator", lambda: False)
    write_inputs(tmp_path)

    def run(**more):
        Path("ran").write_text("")
        run_brand(config_of(**more))
        return Path("ran").read_text().split()

    return run


def write_inputs(folder, prompts=500):
    """Write what a brand names, with enough prompts for its gates: a fifth of 500 is above 76."""
    for name in ("voice.yaml", "texts.jsonl"):
        (folder / name).write_text(name)
    rows = [json.dumps({"prompt": f"Where is mug {number}?"}) for number in range(prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")


def config_of(**more):
    config = BrandConfig(
        **{
            **{"voice": "voice.yaml", "model_name_or_path": "base", "output_dir": "out"},
            **{"prompts": ["prompts.jsonl"], "texts": ["texts.jsonl"], "task": ["texts.jsonl"]},
            **{"votes": "simulated"},
            **more,
        }
    )
    config.validate()
    return config


def test_all_is_done_once_and_the_verdict_is_shown(brand, capfd):
    assert brand() == STEPS
    said = capfd.readouterr().out
    assert "[2/7] pairs: pairs by the voice" in said
    assert "$ rlhf brand pairs --answers out/answers.db --voice voice.yaml" in said
    assert "It is not exported. What blocks it is in out/report.md" in said
    assert brand() == []
    said = capfd.readouterr().out
    assert "[1/7] answers: answers of the base - done before, reused" in said and "V\n" in said


def test_a_run_that_failed_goes_on_where_it_was(brand, tmp_path):
    (tmp_path / "fail-dpo").touch()
    with pytest.raises(
        UserError, match=r"step 'dpo' failed, exit code 1; .*out/logs/dpo.log: error: no luck"
    ):
        brand()
    assert (tmp_path / "ran").read_text().split() == STEPS[:2]
    (tmp_path / "fail-dpo").unlink()
    assert brand() == STEPS[2:]


def test_results_of_other_options_are_refused_or_set_aside(brand, tmp_path):
    brand()
    with pytest.raises(UserError, match=r"pairs: --margin was 0.1, now 0.2") as refused:
        brand(margin=0.2)
    assert "answers" not in str(refused.value) and "--redo true" in str(refused.value)
    assert brand(margin=0.2, redo=True) == [name for name in STEPS if name != "answers"]
    assert list((tmp_path / "out/aside").glob("pairs-*/pairs.jsonl"))
    # a bound of a gate concerns the verdict alone
    assert brand(margin=0.2, gates={"facts": -0.1}, redo=True) == ["verdict"]
    (tmp_path / "voice.yaml").write_text("another voice")
    with pytest.raises(UserError, match="pairs: what it reads or depends on"):
        brand(margin=0.2, gates={"facts": -0.1})


def test_what_ships_is_exported_where_that_is_asked(brand, tmp_path, capfd):
    (tmp_path / "ship").touch()
    assert brand(export="merged") == [*STEPS, "export"]
    assert "exported: out/export/merged" in capfd.readouterr().out
    assert brand(export="merged") == []
    assert brand(export="gguf") == ["export"]
    assert brand() == []
    assert "To ship it: rlhf export out/dpo --to merged" in capfd.readouterr().out


def test_what_does_not_ship_is_not_exported(brand):
    assert brand(export="merged") == STEPS


def judge_all(path):
    with Store.open(path) as store:
        ann = store.add_annotator("ann")
        for pair in store.at().pairs():
            store.vote(pair, ann, "a", left="a")


def test_people_are_waited_for_twice(brand, tmp_path):
    people = {"check": "people", "votes": "people"}
    with pytest.raises(EarlyExit, match=r"out/check\.db: 0 of 1 pairs are judged") as waits:
        brand(**people)
    assert waits.value.code == EXIT_INTERRUPTED
    assert "rlhf collect serve out/check.db --annotators NAME,NAME --overlap 1" in str(waits.value)
    assert (tmp_path / "ran").read_text().split() == ["answers", "pairs", "check"]
    with pytest.raises(EarlyExit):
        brand(**people)
    assert (tmp_path / "ran").read_text() == ""

    judge_all("out/check.db")
    with pytest.raises(EarlyExit, match=r"out/ab\.db: 0 of 1 pairs"):
        brand(**people)
    assert (tmp_path / "ran").read_text().split() == ["checked", "dpo", "ab", "measure"]
    event = json.loads((tmp_path / "out/check.people.json").read_text())["event"]
    judge_all("out/ab.db")
    assert brand(**people) == ["verdict"]

    # votes that come later change nothing that is done
    with Store.open("out/check.db") as store:
        store.vote(1, store.add_annotator("bob"), "b", left="a")
        assert store.last_event() > event
    assert brand(**people) == []
    config = config_of(**people)
    jobs = {job.name: job for job in plan(config, {"check": event, "ab": 7})}
    assert f"out/check.db@{event}" in jobs["checked"].command
    assert "out/ab.db@7" in jobs["verdict"].command


def test_other_pairs_are_judged_anew(brand, tmp_path):
    people = {"check": "people"}
    with pytest.raises(EarlyExit):
        brand(**people)
    judge_all("out/check.db")
    brand(**people)
    with pytest.raises(EarlyExit, match=r"out/check\.db: 0 of 1"):
        brand(**people, margin=0.3, redo=True)


def test_every_command_reads_its_options(tmp_path):
    """Each job's words are options that its command has."""
    import pkgutil

    template = {"prompts": ["Where is my {item}?"], "values": {"item": ["mug"]}}
    config = config_of(
        **{"prompts": [], "templates": template, "check": "simulated", "export": "merged"},
        **{"gates": {"facts": None}, "refusal_phrases": ["geht nicht"], "n_prompts": 5},
    )
    jobs = plan(config, {}, ships=True)
    assert [job.name for job in jobs] == [
        *("prompts", "answers", "pairs", "check", "check-votes", "checked", "dpo"),
        *("ab", "ab-votes", "measure", "verdict", "export"),
    ]
    assert len(set(fingerprints(jobs).values())) == len(jobs)
    for job in jobs:
        if job.program != "rlhf":
            from rlhf.options.offline import DPORunConfig

            found = parse(DPORunConfig, job.arguments)
            assert found.data == ["out/checked.jsonl"] and found.eval_prompts == 0
            continue
        words = job.arguments
        name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
        parsed = parse(pkgutil.resolve_name(COMMANDS[name].options), words[len(name.split()) :])
        if job.name == "prompts":
            assert parsed.templates == template
        if job.name in ("pairs", "verdict"):
            assert parsed.refusal_phrases == ["geht nicht"]
        if job.name == "verdict":
            assert parsed.gates == {"facts": None}


def test_ppo_learns_from_the_score_and_needs_no_pairs():
    from rlhf.options.ppo import PPOConfig

    jobs = plan(config_of(method="ppo"), {})
    assert [job.name for job in jobs] == ["ppo", "ab", "ab-votes", "measure", "verdict"]
    found = parse(PPOConfig, jobs[0].arguments)
    assert found.reward == [{"voice": "voice.yaml"}] and found.data == ["prompts.jsonl"]
    assert "--training" not in jobs[-1].arguments


@pytest.mark.parametrize(
    "more, message",
    [
        ({"templates": {"prompts": ["x"]}}, "either 'prompts' (files) or 'templates'"),
        ({"texts": []}, "gates: {perplexity: null}"),
        ({"task": []}, "the gate 'task' needs it"),
        ({"method": "ppo", "check": "people"}, "method ppo has none"),
        ({"train": {"data": "x"}}, "'train' has 'data'"),
        ({"gates": {"fact": 0}}, "Did you mean 'facts'?"),
        ({"rewrite": False, "samples_per_prompt": 1}, "a pair needs two"),
    ],
)
def test_options_that_cannot_work_are_refused(more, message):
    with pytest.raises(UserError) as refused:
        config_of(**more)
    assert message in str(refused.value)


def test_files_that_are_missing_are_named_before_anything_is_made(brand, tmp_path):
    for more in (
        {"voice": "voices.yaml"},
        {"texts": ["text.jsonl"]},
        {"train": {"config": "no.yaml"}},
    ):
        with pytest.raises(UserError, match="no such file"):
            brand(**more)
    assert not (tmp_path / "out").exists()


def test_too_few_test_prompts_for_a_gate_are_refused_before_anything_is_made(brand, tmp_path):
    write_inputs(tmp_path, prompts=100)
    with pytest.raises(
        UserError, match=r"gate 'refusals' .* with 2\d groups .*: it takes 76\."
    ) as end:
        brand()
    assert not (tmp_path / "out").exists()
    # the bound that it names can be kept
    offered = float(str(end.value).partition("{refusals: ")[2].partition("}")[0])
    assert brand(gates={"refusals": offered}) == STEPS
    assert brand(gates={"refusals": None}, redo=True) == ["verdict"]


def test_few_test_prompts_are_counted_where_templates_make_them_or_a_limit_is_set():
    template = {
        "prompts": ["Where is my {item}?"],
        "values": {"item": [f"mug {n}" for n in range(500)]},
    }
    config = config_of(prompts=[], templates=template)
    groups = module.test_groups(config)
    assert 76 < groups < 130
    config.test_prompts = 60
    assert module.test_groups(config) == 60
    with pytest.raises(UserError, match="with 60 groups of test prompts"):
        module.check_test_prompts(config)


def test_dpo_of_few_pairs_has_its_own_defaults_where_none_are_given(tmp_path):
    from rlhf.options.offline import DPORunConfig

    def options_of(**train):
        job = next(job for job in plan(config_of(train=train), {}) if job.name == "dpo")
        return parse(DPORunConfig, job.arguments)

    found = options_of()
    assert (found.learning_rate, found.num_train_epochs) == (3e-4, 5)
    assert found.loss_type == ["sigmoid", "sft"] and found.trl == {"loss_weights": [1.0, 0.5]}
    file = tmp_path / "train.yaml"
    file.write_text("learning_rate: 1.0e-5\nloss_type: [ipo]\n")
    # flags win over a file, so what the file says is not given
    found = options_of(config=str(file), num_train_epochs=2)
    assert (found.learning_rate, found.num_train_epochs) == (1e-5, 2)
    assert found.loss_type == ["ipo"] and found.trl == {}


def test_a_kill_is_gone_on_from(tmp_path):
    """Killed with the first job at work, the same command does the rest."""
    program = """
import sys
from rlhf.jobs import commands, runner
from tests.brand import test_run as test
slow = "import time; time.sleep(float(__import__('os').environ['SLOW']))\\n" + test.PROGRAM
runner.full_command = lambda _, job: [sys.executable, "-c", slow, job.name, *job.outputs]
runner.code_version = dict
runner.POLL_SECONDS = 0.02
commands.has_accelerator = lambda: False
test.run_brand(test.config_of())
"""
    root = Path(__file__).parents[2]
    write_inputs(tmp_path)
    (tmp_path / "ran").write_text("")
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**environment, "SLOW": "0.5"}, stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while "pairs" not in (tmp_path / "ran").read_text():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = (tmp_path / "ran").read_text().split()
    subprocess.run(command, cwd=tmp_path, env={**environment, "SLOW": "0"}, check=True, timeout=300)
    ran = (tmp_path / "ran").read_text().split()
    assert ran[: len(before)] == before and ran[:2] == STEPS[:2]
    # the job that was at work is done again at most
    assert list(dict.fromkeys(ran)) == STEPS
    assert len(ran) <= len(STEPS) + 1


def test_every_option_is_used():
    """By the plan, the run or its checks."""
    folder = Path(module.__file__).parent
    text = "".join((folder / name).read_text() for name in ("plan.py", "run.py", "config.py"))
    unused = []
    for field in fields(BrandConfig):
        if f"config.{field.name}" not in text and f'"{field.name}"' not in text:
            unused.append(field.name)
    assert unused == []


def test_the_judge_of_the_tone_and_the_dtype_reach_every_command_that_needs_them(tmp_path):
    judge = {"function": "my.tone:measure"}
    jobs = plan(config_of(judge=judge, dtype="bfloat16"), {})
    judged, cast = [], []
    for job in jobs:
        words = " ".join(job.arguments)
        judged += [job.name] if "--judge" in words and "my.tone:measure" in words else []
        cast += [job.name] if "--dtype bfloat16" in words else []
    assert judged == ["pairs", "verdict"]
    assert cast == ["answers", "dpo", "ab", "measure"]

    reward = plan(config_of(judge=judge, method="ppo"), {})[0].arguments
    assert json.loads(reward[reward.index("--reward") + 1]) == [
        {"voice": "voice.yaml", "judge": judge}
    ]
    # without them commands, and so the fingerprints of finished jobs, are as they were
    assert not any(
        "--judge" in job.arguments or "--dtype" in job.arguments for job in plan(config_of(), {})
    )


def test_a_judge_that_cannot_be_one_is_refused_before_anything_is_sampled(tmp_path, capsys):
    file = tmp_path / "brand.yaml"
    lines = ["voice: configs/voices/shop.yaml", "model_name_or_path: base", "votes: simulated"]
    lines += [f"output_dir: {tmp_path}/out", "gates: {perplexity: null, task: null}"]
    lines += ["prompts: [x.jsonl]", "judge: {openai: not-an-address}"]
    file.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as end:
        main(["brand", "run", str(file)])
    assert end.value.code == 2
    assert "judge" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
