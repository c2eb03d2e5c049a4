"""AlpacaEval's and Arena-Hard's files: what they look like there, and both ways without loss."""

import json
import math

import pytest

from rlhf.cli import main
from rlhf.data.records import digest
from rlhf.judge import alpaca_eval, arena_hard
from rlhf.judge.commands import read_samples
from rlhf.judge.pairs import JudgedPair, read_pairs, write_pairs

# as tatsu-lab/alpaca_eval has them in example/outputs.json and results/*/annotations.json
OUTPUT = {
    "instruction": "Who is Larry Page?",
    "output": "Larry Page co-founded Google.",
    "generator": "example",
    "dataset": "helpful_base",
    "datasplit": "eval",
}
ANNOTATION = {
    "instruction": "Who is Larry Page?",
    "output_1": "A computer scientist.",
    "generator_1": "gpt4_1106_preview",
    "dataset": "helpful_base",
    "output_2": "Larry Page co-founded Google.",
    "generator_2": "example",
    "datasplit": "eval",
    "annotator": "weighted_alpaca_eval_gpt4_turbo",
    "preference": 1.4593660117,
    "price_per_example": 0.01263,
    "time_per_example": 0.1792055611,
    "raw_completion": {"finish_reason": "length", "text": "M"},
}
# as lmarena/arena-hard-auto has them in data/arena-hard-v2.0
QUESTION = {"uid": "0001b527ced3428d", "category": "hard_prompt", "prompt": "Why?"}
ANSWER = {
    "uid": "0001b527ced3428d",
    "ans_id": "kpYHmjdWG3zxKm3P9y5EMR",
    "model": "sky-t1-32b",
    "messages": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": {"answer": "# So\n\n1. **x**\n"}},
    ],
    "tstamp": 1745605748.43,
    "metadata": {
        "token_len": 7,
        "header_count": {"h1": 1, "h2": 0, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 1, "unordered": 0},
        "bold_count": {"**": 1, "__": 0},
    },
}


def judged():
    def pair(prompt, p_ab, p_ba, group):
        return JudgedPair(
            prompt=prompt, group=group, a="ppo", b="sft", answer_a=f"{prompt} ppo",
            answer_b=f"{prompt} sft", p_ab=p_ab, p_ba=p_ba,
        )  # fmt: skip

    return [pair("x?", 0.9, 0.2, "g1"), pair("y?", 1.0, 1.0, "g2"), pair("z?", math.nan, 0.0, "g3")]


def same(one, other):
    return repr(one) == repr(other)


def test_outputs_of_alpaca_eval_both_ways(tmp_path):
    file = tmp_path / "example.json"
    file.write_text(json.dumps([OUTPUT]))
    rows = list(alpaca_eval.read_outputs(file))
    assert rows[0]["policy"] == "example" and rows[0]["prompt"] == "Who is Larry Page?"
    alpaca_eval.write_outputs(tmp_path / "back.json", rows)
    assert json.loads((tmp_path / "back.json").read_text()) == [OUTPUT]
    # without a generator it is the file's name, with a second part it belongs to the prompt
    file.write_text(json.dumps([{"instruction": "Sum:", "input": "1 2", "output": "3"}]))
    assert next(alpaca_eval.read_outputs(file)) == {
        "prompt": "Sum:\n\n1 2", "response": "3", "policy": "example",
    }  # fmt: skip


def test_annotations_of_alpaca_eval_both_ways(tmp_path):
    file = tmp_path / "annotations.json"
    alpaca_eval.write_annotations(file, judged(), "me")
    rows = json.loads(file.read_text())
    # 1 + the share of output_2, which is the model's: (.9 + .8) / 2; a contradiction is a tie; none
    assert [row["preference"] for row in rows] == [pytest.approx(1.85), 1.5, None]
    assert (rows[0]["generator_1"], rows[0]["output_2"]) == ("sft", "x? ppo")
    assert set(rows[0]) == set(ANNOTATION)
    assert same(list(alpaca_eval.read_annotations(file)), judged())
    # theirs: one order of a weighted annotator
    file.write_text(json.dumps([ANNOTATION, {**ANNOTATION, "preference": 0}]))
    theirs, tie = alpaca_eval.read_annotations(file)
    assert theirs.share == pytest.approx(0.4593660117) and theirs.b == "gpt4_1106_preview"
    assert theirs.a == "example" and tie.share == 0.5
    for wrong in ({"instruction": "x"}, {**ANNOTATION, "preference": 3}):
        file.write_text(json.dumps([wrong]))
        with pytest.raises(Exception, match="row 1: "):
            list(alpaca_eval.read_annotations(file))


def test_answers_of_arena_hard_both_ways(tmp_path):
    (tmp_path / "model_answer").mkdir()
    (tmp_path / "question.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (tmp_path / "model_answer" / "sky-t1-32b.jsonl").write_text(json.dumps(ANSWER) + "\n")
    rows = arena_hard.read_answers(tmp_path)
    arena_hard.write_answers(tmp_path / "back", rows)
    assert json.loads((tmp_path / "back" / "question.jsonl").read_text()) == QUESTION
    back = json.loads((tmp_path / "back" / "model_answer" / "sky-t1-32b.jsonl").read_text())
    assert back == ANSWER
    counts = {**ANSWER["metadata"], "token_len": 9}
    assert arena_hard.style("# So\n\n1. **x**\n") == counts
    assert arena_hard.read_answers(tmp_path / "back") == rows
    assert arena_hard.style("```\n# not a header\n```\n- x")["header_count"]["h1"] == 0


def test_judgments_of_arena_hard_both_ways(tmp_path):
    arena_hard.write_judgments(tmp_path, judged(), "org/me")
    file = tmp_path / "model_judgment" / "org__me" / "ppo.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    # first the baseline is A: P(first better) = p_ba; then the model
    assert [[game["score"] for game in row["games"]] for row in rows] == [
        ["B>A", "A>B"], ["A>B", "A>B"], ["B>A", None],
    ]  # fmt: skip
    assert {key: rows[0][key] for key in ("uid", "model", "baseline", "judge")} == {
        "uid": digest("x?"), "model": "ppo", "baseline": "sft", "judge": "org/me",
    }  # fmt: skip
    assert same(list(arena_hard.read_judgments(tmp_path)), judged())


def test_labels_of_arena_hard_are_read_as_its_leaderboard_reads_them(tmp_path):
    """show_result.py: the second game as it is, the first one turned."""
    for label, expected in (("A>B", 1), ("A>>B", 1), ("A=B", 0.5), ("A<<B", 0), ("B>A", 0),
                            ("B<A", 1), ("B=A", 0.5), ("B>>A", 0)):  # fmt: skip
        assert arena_hard._first_better({"score": label}) == expected, label
    assert math.isnan(arena_hard._first_better(None))


def test_the_first_version_of_arena_hard_is_read(tmp_path):
    folder = tmp_path / "v0"
    (folder / "model_answer").mkdir(parents=True)
    (folder / "model_judgment" / "gpt-4").mkdir(parents=True)
    question = {"question_id": "q1", "category": "arena-hard-v0.1", "turns": [{"content": "Why?"}]}
    (folder / "question.jsonl").write_text(json.dumps(question) + "\n")
    for model in ("gpt-4-0314", "mine"):
        answer = {"question_id": "q1", "answer_id": "a", "model_id": model, "tstamp": 1.0}
        answer["choices"] = [{"index": 0, "turns": [{"content": f"by {model}", "token_len": 2}]}]
        (folder / "model_answer" / f"{model}.jsonl").write_text(json.dumps(answer) + "\n")
    games = [{"user_prompt": "", "judgment": "[[B>A]]", "score": s} for s in ("B>A", "A=B")]
    judgment = {"question_id": "q1", "model": "mine", "judge": "gpt-4", "games": games}
    (folder / "model_judgment" / "gpt-4" / "mine.jsonl").write_text(json.dumps(judgment) + "\n")
    (pair,) = arena_hard.read_judgments(folder)
    assert (pair.prompt, pair.answer_a, pair.b) == ("Why?", "by mine", "gpt-4-0314")
    assert (pair.p_ba, pair.p_ab, pair.share) == (0.0, 0.5, 0.75)


def test_the_commands_write_and_read_both(tmp_path, capsys):
    samples = [
        {"policy": policy, "prompt": prompt, "response": f"{prompt} {policy} {k}"}
        for policy in ("sft", "ppo") for prompt in ("x?", "y?") for k in range(2)
    ]  # fmt: skip
    source = tmp_path / "samples.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in samples))
    first = [row for row in samples if row["response"].endswith("0")]
    for form, found in (("alpaca_eval", "sft.json"), ("arena_hard", "question.jsonl")):
        out = tmp_path / form
        main(["judge", "export", str(source), "--to", form, "--output_dir", str(out)])
        assert (out / found).is_file()
        assert "left out: 4 further answers" in capsys.readouterr().out
    files = [str(tmp_path / "alpaca_eval" / f"{name}.json") for name in ("sft", "ppo")]
    main(["judge", "import", *files, "--output_dir", str(tmp_path / "a")])
    rows = read_samples(tmp_path / "a" / "samples.jsonl")
    assert [{key: row[key] for key in first[0]} for row in rows] == first

    write_pairs(tmp_path / "judged.jsonl", judged())
    for form, found in (("alpaca_eval", "ppo-over-sft/annotations.json"), ("arena_hard", "")):
        out = tmp_path / "pairs" / form
        main(
            [
                "judge",
                "export",
                str(tmp_path / "judged.jsonl"),
                "--to",
                form,
                "--output_dir",
                str(out),
            ]
        )
        main(["judge", "import", str(out / found), "--output_dir", str(tmp_path / "b")])
        assert same(read_pairs(tmp_path / "b" / "judged.jsonl"), judged())
