import json
import statistics
import subprocess

import pytest
from torch.utils.flop_counter import FlopCounterMode

from reward.loaded import reward_scorer
from rlhf.collect.sample import SampleConfig, sample
from rlhf.config import parse
from rlhf.data.load import load
from rlhf.data.records import Preference, Prompt, Samples, prompt_group
from rlhf.data.store import Store
from rlhf.errors import UserError

QUESTIONS = [
    f"where is my {thing} please"
    for thing in ("lamp", "chair", "parcel", "order", "refund", "team")
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", [{"prompt": q} for q in QUESTIONS])


def config(tmp_path, prompts, model, **more):
    small = {
        "max_prompt_length": 64,
        "max_response_length": 6,
        "test_fraction": 0.0,
        "validation_fraction": 0.0,
    }
    return SampleConfig(
        **{"model_name_or_path": model, "data": [prompts], "store": str(tmp_path / "s.db")}
        | small
        | more
    )


def pairs(tmp_path):
    with Store.open(tmp_path / "s.db") as store:
        return list(store.at().pairs().values())


def test_one_policy_with_two_settings(tmp_path, prompts, sft_path):
    counts = sample(
        config(tmp_path, prompts, sft_path, temperature=[0.7, 1.3], samples_per_prompt=2)
    )
    assert (
        counts["prompts"] == 6 and counts["responses"] + counts["equal"] + counts["empty"] == 6 * 4
    )
    with Store.open(tmp_path / "s.db") as store:
        rows = store._db.execute(
            "SELECT sampling, count(*) FROM responses GROUP BY sampling"
        ).fetchall()
        assert {json.loads(s)["temperature"] for s, _ in rows} == {0.7, 1.3} and len(rows) == 2
        by_prompt = store._db.execute("SELECT count(*) FROM responses GROUP BY prompt").fetchall()
        # every two of a prompt's n different answers: n (n - 1) / 2
        assert (
            counts["comparisons"]
            == sum(n * (n - 1) // 2 for (n,) in by_prompt)
            == store.at().stats()["comparisons"]
        )
    again = sample(
        config(tmp_path, prompts, sft_path, temperature=[0.7, 1.3], samples_per_prompt=2)
    )
    assert again == counts and len(pairs(tmp_path)) == counts["comparisons"]


def test_of_each_prompt_the_most_disputed_pair_is_stored(
    tmp_path, prompts, base_path, sft_path, member_paths
):
    from rlhf.commands import run_sample

    asked = config(tmp_path, prompts, sft_path, samples_per_prompt=4)
    every = sample(asked)
    wanted = {}
    scorers = [reward_scorer(path) for path in member_paths]
    for pair in pairs(tmp_path):
        both = [pair["messages"]] * 2, [pair["text_a"], pair["text_b"]], [[]] * 2, [[]] * 2
        ended = [pair["ended_a"] != 0, pair["ended_b"] != 0]
        gaps = []
        for score in scorers:
            one, other = score(Samples(*both, ended, [{}, {}])).total
            gaps.append(one - other)
        prompt = pair["messages"][0]["content"]
        found = (statistics.pstdev(gaps), {pair["text_a"], pair["text_b"]})
        wanted[prompt] = max(wanted.get(prompt, found), found, key=lambda pair: pair[0])
    assert every["comparisons"] > len(wanted) == 6

    asked = config(
        tmp_path,
        prompts,
        sft_path,
        samples_per_prompt=4,
        select="disagreement",
        select_by=member_paths,
        store=str(tmp_path / "chosen.db"),
    )
    run_sample(asked)
    with Store.open(tmp_path / "chosen.db") as store:
        chosen = list(store.at().pairs().values())
    found = {pair["messages"][0]["content"]: {pair["text_a"], pair["text_b"]} for pair in chosen}
    assert found == {prompt: texts for prompt, (_, texts) in wanted.items()}
    assert len(chosen) == 6
    # one model alone has no spread, and a mean
    asked.select, asked.select_by, asked.pairs = "margin", member_paths[:1], 2
    assert run_sample(asked) is None
    asked.select_by, asked.select_reference = [sft_path], base_path
    assert run_sample(asked) is None
    asked.select_by, asked.select_reference = member_paths[:1] * 2, None
    with pytest.raises(UserError, match=r"select_by: .*names a reward model twice"):
        run_sample(asked)


def test_a_second_setting_changes_nothing_of_the_first(tmp_path, prompts, sft_path):
    def texts(name, **more):
        sample(config(tmp_path, prompts, sft_path, store=str(tmp_path / name), **more))
        with Store.open(tmp_path / name) as store:
            return {
                r[0]
                for r in store._db.execute(
                    "SELECT text FROM responses WHERE sampling LIKE '%: 1.0, \"top_p%'"
                )
            }

    alone, both = texts("a.db"), texts("b.db", temperature=[1.0, 0.5])
    assert alone == both and len(alone) > 6


def test_as_many_prompts_are_sampled_as_asked_for_where_some_are_too_long(tmp_path, sft_path):
    questions = [*QUESTIONS, *("so " * 80 + q for q in QUESTIONS)]
    data = write(tmp_path / "p.jsonl", [{"prompt": q} for q in questions])
    asked = config(tmp_path, data, sft_path, max_prompt_length=64)
    asked.prompts = 5
    assert sample(asked)["prompts"] == 5


def test_the_store_knows_what_its_responses_cost(tmp_path, prompts, sft_path, monkeypatch):
    # which makes passes that are no sampling
    monkeypatch.setattr("rlhf.engines.batched.slots_are_exact", lambda model: True)
    settings = config(tmp_path, prompts, sft_path, samples_per_prompt=2, max_response_length=1)
    with FlopCounterMode(display=False) as counter:
        sample(settings)
    with Store.open(tmp_path / "s.db") as store:
        spent = json.loads(store.setting("budget"))
    assert (spent["episodes"], spent["tokens_generated"], spent["tokens_trained"]) == (12, 12, 0)
    # torch's counter does not see the fused attention of one pass: 2 layers of 4 heads of 8, about
    # 20 positions
    assert 0 < spent["flops"] - counter.get_total_flops() < 0.15 * spent["flops"]


def test_two_policies_give_one_answer_each(tmp_path, prompts, base_path, sft_path):
    counts = sample(config(tmp_path, prompts, sft_path, other=base_path, samples_per_prompt=1))
    found = pairs(tmp_path)
    assert len(found) == counts["comparisons"] <= 6 and found
    for pair in found:
        assert {pair["model_a"], pair["model_b"]} == {sft_path, base_path}
    with Store.open(tmp_path / "s.db") as store:
        prints = {
            r[0]
            for r in store._db.execute(
                "SELECT adapter_fingerprint FROM responses WHERE model = ?", [sft_path]
            )
        }
        assert len(prints) == 1 and None not in prints


def test_three_policies_meet_on_test_prompts_and_equal_answers_are_kept(tmp_path):
    rows = [{"prompt": q, "split": "test" if i < 4 else "train"} for i, q in enumerate(QUESTIONS)]
    data = write(tmp_path / "p.jsonl", rows)
    files = []
    for name in ("one", "two", "three"):
        answers = []
        for i, question in enumerate(QUESTIONS):
            text = "the same" if i == 0 and name != "three" else f"{name} {i}"
            answers.append({"prompt": question, "response": text})
        files.append(write(tmp_path / f"{name}.jsonl", answers))
    counts = sample(config(tmp_path, data, None, runs=files, split="test"))
    # 4 prompts, 3 pairs of policies at each, of which one pair gave the same answer
    assert (counts["prompts"], counts["responses"], counts["comparisons"]) == (4, 12, 11)
    assert counts["equal"] == 1
    assert sample(config(tmp_path, data, None, runs=files, split="test")) == counts
    with Store.open(tmp_path / "s.db") as store:
        view = store.at()
        assert {pair["messages"][0]["content"] for pair in view.pairs().values()} == set(
            QUESTIONS[:4]
        )
        ((*models, group),) = view.equal_answers()
        assert sorted(models) == ["one.jsonl", "two.jsonl"]
        assert group == prompt_group([{"role": "user", "content": QUESTIONS[0]}])
        # no letter is always the same policy's
        assert len({pair["model_a"] for pair in view.pairs().values()}) > 1


def test_answers_are_ordered_at_once_where_all_differ(tmp_path, capsys):
    data = write(tmp_path / "p.jsonl", [{"prompt": question} for question in QUESTIONS])
    files = []
    for name in ("one", "two", "three"):
        answers = []
        for i, question in enumerate(QUESTIONS):
            text = "the same" if i == 0 and name != "three" else f"{name} {i}"
            answers.append({"prompt": question, "response": text})
        files.append(write(tmp_path / f"{name}.jsonl", answers))
    counts = sample(config(tmp_path, data, None, runs=files, rank=True))
    # where two runs gave the same answer, each is compared with the third one
    assert (counts["rankings"], counts["comparisons"]) == (len(QUESTIONS) - 1, 2)
    assert f"{len(QUESTIONS) - 1} rankings and 2 comparisons; 1 equal" in capsys.readouterr().out
    assert sample(config(tmp_path, data, None, runs=files, rank=True)) == counts
    with Store.open(tmp_path / "s.db") as store:
        stats, rankings = store.at().stats(), store.at().rankings()
        assert (stats["rankings"], stats["comparisons"]) == (counts["rankings"], 2)
        for ranking in rankings.values():
            models = {response["model"] for response in ranking["responses"]}
            assert models == {"one.jsonl", "two.jsonl", "three.jsonl"}
    # the other way round would ask about pairs of the rankings one by one
    with pytest.raises(UserError, match="compared already"):
        sample(config(tmp_path, data, None, runs=files[:2], store=str(tmp_path / "t.db")))
        sample(config(tmp_path, data, None, runs=files, rank=True, store=str(tmp_path / "t.db")))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"model_name_or_path": "a", "rank": True},
            "orders 3 to 8 answers of each prompt, found 2",
        ),
        ({"runs": ["a", "b"], "samples_per_prompt": 5, "rank": True}, "found 10"),
        ({"model_name_or_path": "a.jsonl", "select": "random", "rank": True}, "and no 'select'"),
        ({"runs": ["a"]}, "at least two different policies"),
        ({"runs": ["a", "b"], "other": "c"}, "and no 'other'"),
        ({"model_name_or_path": "a", "split": "test"}, "give 'runs' to decide between"),
        ({"model_name_or_path": "a", "runs": ["b", "c"]}, "give either"),
        ({}, "give either"),
    ],
)
def test_what_runs_cannot_be_combined_with(options, message):
    asked = SampleConfig(data=["p.jsonl"], store="s.db", **options)
    with pytest.raises(UserError, match=message):
        asked.validate()
        asked.sources()


def test_a_missing_run_and_a_reward_model_are_refused_before_anything_is_sampled(
    tmp_path, prompts, sft_path, member_paths, capfd
):
    wrong = {
        str(tmp_path / "nothing"): "no such folder",
        member_paths[0]: "a reward model, not a policy",
    }
    for path, message in wrong.items():
        asked = config(tmp_path, prompts, None, runs=[sft_path, path], split="test")
        with pytest.raises(UserError, match=message):
            sample(asked)
    assert "sampling" not in capfd.readouterr().err


def test_answers_from_files_need_no_model(tmp_path, prompts):
    one = write(
        tmp_path / "one.jsonl",
        [{"prompt": q, "response": f"one {i}"} for i, q in enumerate(QUESTIONS[:4])],
    )
    other = [
        {"prompt": q, "completion": f"other {i}", "label": i > 0}
        for i, q in enumerate(QUESTIONS[2:])
    ]
    other = write(tmp_path / "other.jsonl", other)
    counts = sample(config(tmp_path, prompts, one, other=other))
    # what both answer: questions 2 and 3
    assert (counts["prompts"], counts["comparisons"]) == (2, 2)
    for pair in pairs(tmp_path):
        i = QUESTIONS.index(pair["messages"][0]["content"])
        assert {pair["text_a"], pair["text_b"]} == {f"one {i}", f"other {i - 2}"}
        assert (pair["ended_a"], pair["ended_b"]) == (None, None)


def test_a_file_of_pairs_is_judged_again(tmp_path, prompts):
    rows = [
        {"prompt": q, "chosen": "better", "rejected": "apart", "rejected_ended": False}
        for q in QUESTIONS
    ]
    rows += [{"prompt": "not asked for", "chosen": "x", "rejected": "y"}]
    counts = sample(config(tmp_path, prompts, write(tmp_path / "prefs.jsonl", rows)))
    assert counts["comparisons"] == 6
    for pair in pairs(tmp_path):
        assert (pair["text_a"], pair["text_b"], pair["ended_a"], pair["ended_b"]) == (
            "apart",
            "better",
            0,
            1,
        )
    with Store.open(tmp_path / "s.db") as store:
        assert store.at().votes() == []


def test_control_pairs_are_marked_and_never_trained_on(tmp_path, prompts):
    one = write(
        tmp_path / "one.jsonl",
        [{"prompt": q, "response": t} for q in QUESTIONS for t in ("yes", "no")],
    )
    controls = [
        {"prompt": "Say hello", "chosen": text, "rejected": "go away"}
        for text in ("hello", "good day")
    ]
    controls = write(tmp_path / "controls.jsonl", controls)
    counts = sample(config(tmp_path, prompts, one, controls=controls))
    assert (counts["comparisons"], counts["controls"]) == (6, 2)
    with Store.open(tmp_path / "s.db") as store:
        known = store.at().controls()
        right = {store.at().pair(id)[f"text_{side}"] for id, side in known.items()}
        assert right == {"hello", "good day"} and store.at().stats()["comparisons"] == 6
        annotator = store.add_annotator("ann")
        for id, side in known.items():
            store.vote(id, annotator, side)
        assert store.at().preferences() == []


def test_the_test_split_is_left_out(tmp_path, prompts):
    answers = write(
        tmp_path / "a.jsonl",
        [{"prompt": q, "response": t} for q in QUESTIONS for t in ("yes", "no")],
    )
    sample(config(tmp_path, prompts, answers, test_fraction=0.5))
    held_out = {
        r.prompt[0]["content"] for r in load(prompts, Prompt, split="test", test_fraction=0.5)
    }
    asked = {pair["messages"][0]["content"] for pair in pairs(tmp_path)}
    assert held_out and asked == set(QUESTIONS) - held_out


def test_what_cannot_be_paired_is_said(tmp_path, prompts):
    alike = write(
        tmp_path / "alike.jsonl",
        [{"prompt": q, "response": t} for q in QUESTIONS for t in ("yes", " yes")],
    )
    with pytest.raises(UserError, match="nothing to judge"):
        sample(config(tmp_path, prompts, alike))
    strange = write(tmp_path / "strange.jsonl", [{"prompt": "no such question", "response": "x"}])
    with pytest.raises(UserError, match=r"strange\.jsonl: answers none of the 6 prompts"):
        sample(config(tmp_path, prompts, strange))
    for flags, message in (
        (["--samples_per_prompt", "1"], "a comparison needs at least 2"),
        (
            ["--temperature", "0.7,1.0", "--top_p", "1.0,0.9,0.8"],
            "'temperature' has 2 values and 'top_p' 3",
        ),
        (["--temperature", "0.7,0"], "'temperature' is 0.0, expected more than 0"),
    ):
        with pytest.raises(UserError, match=message):
            parse(
                SampleConfig, ["--model_name_or_path", "m", "--data", "d", "--store", "s", *flags]
            )


def test_files_are_paired_without_torch(tmp_path, prompts):
    import sys

    answers = write(
        tmp_path / "a.jsonl",
        [{"prompt": q, "response": t} for q in QUESTIONS for t in ("yes", "no")],
    )
    code = (
        "import sys; from rlhf.collect.sample import SampleConfig, sample\n"
        f"sample(SampleConfig(model_name_or_path={answers!r}, data=[{prompts!r}], store={str(tmp_path / 's.db')!r}))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_prompts_with_the_same_answers_join_in_the_store_and_named_groups_stay(tmp_path):
    # twelve questions of which two name a group; each gets "Yes." and "No.", and one of its own
    rows = [
        {"prompt": f"is it {i}?"} | ({"group": f"g{i}", "split": "train"} if i < 2 else {})
        for i in range(12)
    ]
    data = write(tmp_path / "p.jsonl", rows)
    said = [{"prompt": row["prompt"], "response": t} for row in rows[:11] for t in ("Yes.", "No.")]
    said += [{"prompt": "is it 11?", "response": t} for t in ("It is.", "Hardly.")]
    answers = write(tmp_path / "a.jsonl", said)
    shares = {"validation_fraction": 0.4, "test_fraction": 0.0}
    sample(config(tmp_path, data, answers, **shares))
    path = str(tmp_path / "s.db")

    def groups(kind):
        return {r.prompt[0]["content"]: r.group for r in load(path, kind, **shares)}

    before = {r.prompt[0]["content"]: r.group for r in load(data, Prompt)}
    # nothing is voted on: each prompt has the group it has in its file
    assert groups(Prompt) == before
    with Store.open(path) as store:
        ann = store.add_annotator("ann")
        for id in store.at().pairs():
            store.vote(id, ann, "a")
        # as the file gives it
        assert {row.get("split") for row in store.at().prompt_rows()} == {"train", None}
    free = [f"is it {i}?" for i in range(2, 11)]
    wanted = before | dict.fromkeys(free, min(before[q] for q in free))
    assert groups(Preference) == wanted == groups(Prompt)
    assert (
        len({r.split for r in load(path, Preference, **shares) if r.prompt[0]["content"] in free})
        == 1
    )


def test_a_group_that_the_file_has_joined_is_not_torn_in_the_store(tmp_path):
    # two questions with one pair of answers are one group in their file; the store gets other
    # answers to them
    rows = [{"prompt": q, "chosen": "Yes.", "rejected": "No."} for q in QUESTIONS]
    data = write(tmp_path / "p.jsonl", rows)
    answers = [{"prompt": q, "response": f"{q} {t}"} for q in QUESTIONS for t in ("one", "two")]
    sample(config(tmp_path, data, write(tmp_path / "a.jsonl", answers)))
    assert len({r.group for r in load(str(tmp_path / "s.db"), Prompt)}) == 1


def test_a_store_of_old_with_group_and_split_written_down_still_reads(tmp_path):
    with Store.open(tmp_path / "s.db", create=True) as store:
        ann = store.add_annotator("ann")
        for i, split in enumerate(("train", "validation", "train")):
            messages = [{"role": "user", "content": f"is it {i}?"}]
            prompt = store.add_prompt(messages, group=prompt_group(messages), split=split)
            pair = store.add_comparison(*(store.add_response(prompt, t) for t in ("Yes.", "No.")))
            store.vote(pair, ann, "a")
    found = load(str(tmp_path / "s.db"), Preference)
    assert [r.split for r in found] == ["train", "validation", "train"]
    assert [r.group for r in found] == [prompt_group(r.prompt) for r in found]


def test_bad_rows_stop_or_are_skipped_and_a_failed_call_leaves_no_store(tmp_path, prompts):
    bad = write(tmp_path / "bad.jsonl", [{"prompt": ""}, *({"prompt": q} for q in QUESTIONS)])
    rows = [{"prompt": q, "response": t} for q in QUESTIONS for t in ("yes", "no")]
    answers = write(tmp_path / "a.jsonl", [{"prompt": "x", "response": 1}, *rows])
    with pytest.raises(UserError, match=r"bad\.jsonl row 1: .*--on_error skip"):
        sample(config(tmp_path, bad, answers))
    alike = write(tmp_path / "alike.jsonl", [row for row in rows if row["response"] == "yes"])
    with pytest.raises(UserError, match="nothing to judge"):
        sample(config(tmp_path, prompts, alike))
    assert not (tmp_path / "s.db").exists()
    assert sample(config(tmp_path, bad, answers, on_error="skip"))["comparisons"] == 6
