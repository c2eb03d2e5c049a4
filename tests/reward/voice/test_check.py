"""`rlhf voice check` and `rlhf voice score`: contradictions, examples, spread, what rules saw, the docs."""

import io
import json
import math
import re
from pathlib import Path

import pytest

from reward.voice.answers import Answer, read_answers, same_prompt
from reward.voice.check import check_examples, spread
from reward.voice.score import score_text
from reward.voice.scorer import load_voice
from reward.voice.words import explain, voice_guide
from rlhf.cli import main
from rlhf.data.store import Store
from rlhf.sandbox import SHOP_VOICE
from tests.reward.voice import docs as voice_docs

SHOP = voice_docs.ROOT / "configs" / "voices" / "shop.yaml"
JUDGE = "{http: 'http://localhost:1/tone'}"


def write(tmp_path, text, name="brand.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def jsonl(tmp_path, rows):
    return write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "answers.jsonl")


def run(*argv, capsys):
    main(list(argv))
    return capsys.readouterr().out


def stopped(*argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr()


@pytest.mark.parametrize(("path", "count"), [(voice_docs.PAGE, 2), (voice_docs.OUTPUTS, 7)])
def test_the_pages_print_what_their_commands_print(path, count, tmp_path, monkeypatch):
    """And show the shipped voices, contradictory ones, and scores."""
    page = path.read_text(encoding="utf-8")
    voice_docs.write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    runs = voice_docs.commands(page)
    assert len(runs) == count
    for command, output in runs:
        assert voice_docs.output_of(command) == output, "run: python -m tests.reward.voice.docs"


def test_the_example_of_the_page_names_every_key_and_keeps_its_own_examples(tmp_path):
    page = voice_docs.PAGE.read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(name:.*?)```", page, re.S).group(1)
    voice = load_voice(write(tmp_path, block))
    assert {
        name for name in type(voice).model_fields if name not in voice.model_fields_set
    } == set()
    _, wrong = check_examples(voice)
    assert wrong == []


def test_the_shop_differs_from_the_sandbox_in_credit_examples_and_channels():
    given = {"credit", "examples", "channels"}
    shop, sandbox = load_voice(SHOP), load_voice(SHOP_VOICE)
    assert shop.model_dump(exclude=given) == sandbox.model_dump(exclude=given)
    assert (shop.credit, sandbox.credit) == ("partial", "exact")


def test_what_fails_is_said_with_what_it_leaves(tmp_path):
    voice = load_voice(
        write(tmp_path, "name: X\nlength: {min_words: 3, weight: 3}\nvariety: {weight: 1}")
    )
    # 0.01^(3/4) and 0.01^(1/4)
    assert {row["part"]: pytest.approx(row["fails"]) for row in explain(voice)} == {
        "length": 0.01**0.75,
        "variety": 0.01**0.25,
    }
    assert explain(voice)[0]["rule"] == "the text has at least 3 words"


EXAMPLES = """
name: X
use: {words: [mend, hut], at_least: 1, max_share: 1}
variety: {weight: 0}
examples:
  - {do: we mend it, dont: we sell it}
  - {do: we sell it, dont: we mend it, why: the wrong way round}
  - {dont: a hut}
"""


def test_examples_are_scored_and_doubted(tmp_path):
    rows, wrong = check_examples(load_voice(write(tmp_path, EXAMPLES)))
    assert rows[0]["do"]["score"] == 1.0 and rows[0]["dont"]["score"] == pytest.approx(0.01)
    assert [line.partition(":")[0] for line in wrong] == ["example 2", "example 2", "example 3"]
    assert "its 'do' scores 0.01: use 0.00 (0 of 1)" in wrong[0]
    assert "its 'dont' scores 1.00, no less than its 'do'" in wrong[1]
    assert "no rule sees what is wrong with it" in wrong[2]


def test_check_ends_with_an_error_where_the_file_contradicts_itself(tmp_path, capsys):
    path = write(tmp_path, EXAMPLES)
    out, error = stopped("voice", "check", path, capsys=capsys)
    assert (
        "It contradicts itself:\n- example 2" in out and "3 contradictions, listed above" in error
    )
    out, _ = stopped("voice", "check", path, "--json", capsys=capsys)
    assert len(json.loads(out)["contradictions"]) == 3
    channel = "name: X\nlength: {min_words: 5}\nchannels: {chat: {length: {max_words: 3}}}"
    out, _ = stopped("voice", "check", write(tmp_path, channel), capsys=capsys)
    assert "- channel 'chat': 'length': min_words 5 is above max_words 3" in out


def answers(*texts):
    prompts = [[{"role": "user", "content": f"question {i // 2}"}] for i in range(len(texts))]
    return [Answer(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]


GREETS = "name: X\ngreeting: {forms: [good morning friend]}\nvariety: {weight: 0}"


def test_the_spread_counts_distinct_scores_and_ties(tmp_path):
    voice = load_voice(write(tmp_path, GREETS))
    found = spread(voice, answers("sent", "morning sent", "good morning sent", "good morning sent"))
    # exact: nobody greets; partial: nothing, one word, two words twice; the second pair is a tie
    assert (found["exact"]["distinct"], found["exact"]["ties"]) == (1, 2)
    assert (found["partial"]["distinct"], found["partial"]["ties"]) == (3, 1)
    assert (found["answers"], found["prompts"], found["pairs"]) == (4, 2, 2)
    # 0.01 + 0.99 * 0.8 * (2/3)^3
    assert found["partial"]["high"] == pytest.approx(0.01 + 0.99 * 0.8 * 8 / 27, abs=1e-6)
    assert found["parts"]["greeting"]["distinct"] == 3


def test_check_says_that_all_comparisons_are_ties(tmp_path, capsys):
    rows = [
        {"prompt": f"question {i // 2}", "response": text}
        for i, text in enumerate(["sent", "lost", "found", "kept"])
    ]
    path = jsonl(tmp_path, rows)
    out = run("voice", "check", write(tmp_path, GREETS), "--answers", path, capsys=capsys)
    assert "1 distinct scores; 2 of 2 pairs of answers to one prompt are ties" in out
    assert "WARNING: every comparison of these answers is a tie" in out
    rows[0]["response"], rows[2]["response"] = "morning", "good day"
    out = run(
        "voice", "check", write(tmp_path, GREETS), "--answers", jsonl(tmp_path, rows), capsys=capsys
    )
    assert "WARNING" not in out and "With credit: exact: 0.010 to 0.010, 1 distinct" in out


def test_answers_come_from_pairs_and_from_a_store(tmp_path):
    pairs = jsonl(
        tmp_path, [{"prompt": "Hi", "chosen": "Hello", "rejected": "What", "item": "lamp"}]
    )
    assert [answer.text for answer in read_answers(pairs)] == ["Hello", "What"]
    path = tmp_path / "votes.db"
    with Store.open(path, create=True) as store:
        prompt = store.add_prompt([{"role": "user", "content": "Hi"}], metadata={"item": "lamp"})
        one, two, three = (store.add_response(prompt, text, ended=text != "b") for text in "abc")
        store.add_comparison(one, two)
        store.add_comparison(one, three)
    found = read_answers(str(path))
    assert [(answer.text, answer.ended) for answer in found] == [
        ("a", True),
        ("b", False),
        ("c", True),
    ]
    assert found[0].metadata["item"] == "lamp"
    assert same_prompt(found) == [(0, 1), (0, 2), (1, 2)]


def test_a_model_is_sampled_for_its_spread(tmp_path, capsys, base_path):
    check = ("voice", "check", write(tmp_path, GREETS), "--model_name_or_path", str(base_path))
    assert "'model_name_or_path' and 'data' belong together" in stopped(*check, capsys=capsys).err
    data = jsonl(tmp_path, [{"prompt": f"question {i}"} for i in range(12)])
    size = ("--prompts", "3", "--max_prompt_length", "64", "--max_response_length", "6")
    out = run(*check, "--data", data, *size, capsys=capsys)
    assert "6 answers to 3 prompts score" in out and "of 3 pairs of answers to one prompt" in out


def test_the_parts_of_a_score_multiply_to_its_total():
    shop = load_voice(SHOP)
    facts = {"item": "kettle", "remedy": "replace"}
    for text in ("Hello! sorry about the kettel, mate. We replace it. Fernhill", "So. " * 30):
        for ended in (True, False):
            total, parts, _ = score_text(shop, Answer(text, metadata=facts, ended=ended))
            product = math.prod(part.leaves for part in parts)
            assert total == pytest.approx(product * (1 if ended else shop.truncated))
            assert sum(part.share for part in parts) == pytest.approx(1.0)


def test_score_shows_the_words_that_each_rule_touched(tmp_path, capsys, monkeypatch):
    voice = ("--voice", str(SHOP))
    text = "Hallo, sorry about the lamp, mate. Warmly, Fernhill"
    out = run("voice", "score", text, *voice, "--json", capsys=capsys)
    parts = {row["part"]: row for row in json.loads(out)["parts"]}
    assert (
        parts["avoid"]["bad"] == [[29, 33, "mate"]] and parts["greeting"]["near"][0][2] == "Hallo"
    )
    assert parts["closing"]["good"] == [[35, 51, "Warmly, Fernhill"]]
    # a file, standard input and words without quotes are the same text
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    file = write(tmp_path, text + "\n", "answer.txt")
    plain = run("voice", "score", text, *voice, capsys=capsys)
    for source in ([file], ["-"], text.split()):
        assert run("voice", "score", *source, *voice, capsys=capsys) == plain
    assert "\033" not in plain and "-'mate'" in plain and "~'Hallo'" in plain
    coloured = run("voice", "score", text, *voice, "--colour", "always", capsys=capsys)
    assert "\033[31mmate\033[0m" in coloured and "\033[33mHallo\033[0m" in coloured


def test_score_of_a_file_of_answers_is_a_line_each(tmp_path, capsys):
    rows = [{"prompt": "Hi", "response": text} for text in ("Hello, thank you", "hey mate")]
    out = run("voice", "score", jsonl(tmp_path, rows), "--voice", str(SHOP), capsys=capsys)
    first, second = out.splitlines()
    assert "Hello, thank you" in first and "avoid 0.06" in second
    assert float(first.split()[0]) > float(second.split()[0])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["answer.txt", "--voice", str(SHOP)], "answer.txt: no such file"),
        (["hello", "--voice", str(SHOP), "--channel", "chad"], "no channel 'chad'. Did you mean 'chat'?"),
        (["hello"], "'voice' not given"),
        (["hello", "--voice", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["hello", "--voice", str(SHOP), "--judge", "{htpp: x}"], "Did you mean 'http'?"),
        (["hello", "--voice", str(SHOP), "--judge", JUDGE], "has no 'tone' for the judge to measure"),
    ],
)  # fmt: skip
def test_score_refuses_what_it_cannot_use(argv, said, capsys):
    assert said in stopped("voice", "score", *argv, capsys=capsys).err


def test_check_refuses_a_judge_that_has_nothing_to_measure(capsys):
    error = stopped("voice", "check", str(SHOP), "--judge", JUDGE, capsys=capsys).err
    assert "has no 'tone' for the judge to measure" in error


def test_the_guide_of_those_who_vote_shows_the_new_rules_and_examples(tmp_path):
    text = "name: X\nemoji: {max: 1}\nperson: {speaks_as: we}\nexamples: [{do: we mend it, dont: I sell}]"
    guide = voice_guide(load_voice(write(tmp_path, text)))
    assert guide.rules == [
        'The text speaks as "we", not "I".',
        "The text has at most 1 emoji.",
    ]
    assert dict(guide.lists) == {"We write": ["we mend it"], "We do not write": ["I sell"]}


def test_status_warns_where_every_vote_is_a_tie(tmp_path, capsys):
    path = tmp_path / "votes.db"
    with Store.open(path, create=True) as store:
        prompt = store.add_prompt([{"role": "user", "content": "Hi"}])
        pair = store.add_comparison(*(store.add_response(prompt, text) for text in "ab"))
        good, bad = (store.add_response(prompt, text) for text in "cd")
        control = store.add_comparison(good, bad, kind="control", expected=good)
        ann, bob = store.add_annotator("ann"), store.add_annotator("bob")
        store.vote(pair, ann, "tie")
        # a vote on a control pair is never trained on
        store.vote(control, ann, "a")
    said = "WARNING: all its votes (1) are ties, so no pair has a better answer"
    assert said in run("collect", "status", str(path), capsys=capsys)
    with Store.open(path) as store:
        store.vote(pair, bob, "b")
    assert "WARNING" not in run("collect", "status", str(path), capsys=capsys)


def test_the_voices_of_the_repository_do_not_contradict_themselves(capsys):
    for path in sorted(Path(SHOP).parent.glob("*.yaml")):
        assert "It does not contradict itself." in run("voice", "check", str(path), capsys=capsys)
