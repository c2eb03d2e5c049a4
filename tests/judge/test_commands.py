"""`rlhf judge pairs` on a store, on the answers of policies, and again when votes come later."""

import json

import pytest

from rlhf.cli import main
from rlhf.data.store import Store
from rlhf.judge.commands import pairs_of_samples
from rlhf.judge.pairs import read_pairs
from tests.judge.test_client import good_wins


def make_store(path, *, votes):
    """16 prompts: the answer of "new" is good in all, people prefer it in 12, where somebody votes."""
    with Store.open(path, create=True) as store, store.transaction():
        people = [store.add_annotator(name) for name in ("ann", "bela")]
        for i in range(16):
            prompt = store.add_prompt([{"role": "user", "content": f"question {i}"}])
            new = store.add_response(prompt, f"good answer {i}", model="new")
            old = store.add_response(prompt, f"an older answer {i}", model="old")
            pair = store.add_comparison(new, old)
            for person in people if votes else ():
                store.vote(pair, person, "b" if i % 4 == 0 else "a")
        # a control pair is no measure of a policy, and nobody needs to be asked about it
        prompt = store.add_prompt([{"role": "user", "content": "control"}])
        right = store.add_response(prompt, "good", model="new")
        wrong = store.add_response(prompt, "bad", model="old")
        store.add_comparison(right, wrong, kind="control", expected=right)
    return str(path)


def run(capsys, *words):
    main(["judge", "pairs", *words])
    return capsys.readouterr().out


def test_a_judge_of_a_store_is_reported_beside_its_people(serve, tmp_path, capsys):
    server = serve(good_wins)
    store = make_store(tmp_path / "votes.db", votes=True)
    out = tmp_path / "out"
    judge = f"{{openai: '{server.url}', model: new-7b, input_price: 1, output_price: 2}}"
    text = run(capsys, store, "--judge", judge, "--output_dir", str(out))
    report = json.loads((out / "judge.json").read_text())
    assert (out / "judge.md").read_text() == text.rstrip("\n") + "\n"
    assert (report["asked"], report["no_verdict"], report["usage"]["asked"]) == (16, 0, 32)
    # 32 questions of 100 and 5 tokens
    assert report["usage"]["cost"] == pytest.approx((3200 + 2 * 160) / 1e6)
    assert report["agreement"]["all"]["judge"]["estimate"] == pytest.approx(0.75)
    assert report["agreement"]["all"]["people"]["estimate"] == 1.0
    (rate,) = report["win_rates"]
    assert (rate["a"], rate["b"]) == ("new", "old") and rate["judge"]["estimate"] == 1.0
    assert rate["corrected"]["estimate"] == pytest.approx(0.75)
    # the judge is of the family of one of the policies
    assert report["self_preference"]["own"] == ["new"]
    assert report["self_preference"]["difference"]["estimate"] == pytest.approx(0.25)
    assert server.asked[0][0]["model"] == "new-7b" and "own answers win (new)" in text


def test_votes_that_come_later_need_no_further_question(serve, tmp_path, capsys):
    server = serve(good_wins)
    store = make_store(tmp_path / "early.db", votes=False)
    out = tmp_path / "out"
    judge = f"{{openai: '{server.url}', model: m}}"
    run(capsys, store, "--judge", judge, "--output_dir", str(out), "--n_prompts", "12")
    assert len(server.asked) == 24
    assert json.loads((out / "judge.json").read_text())["agreement"] is None
    later = make_store(tmp_path / "later.db", votes=True)
    again = tmp_path / "again"
    run(capsys, str(out / "judged.jsonl"), "--votes", later, "--output_dir", str(again))
    assert len(server.asked) == 24
    report = json.loads((again / "judge.json").read_text())
    assert (
        report["agreement"]["pairs"] == 12 and report["win_rates"][0]["corrected"]["labelled"] == 12
    )
    assert len(read_pairs(again / "judged.jsonl")) == 12


def test_policies_meet_the_first_with_other_noise(serve, tmp_path, capsys):
    server = serve(good_wins)
    rows = [
        {"policy": policy, "prompt": f"q{i}", "response": f"{word} {policy} {i} {k}"}
        for policy, word in (("sft", "an"), ("dpo", "good")) for i in range(3) for k in range(2)
    ]  # fmt: skip
    pairs = pairs_of_samples(rows, "here")
    assert [(p.answer_a[-3:], p.answer_b[-3:]) for p in pairs[:2]] == [
        ("0 0", "0 1"),
        ("0 1", "0 0"),
    ]
    source = tmp_path / "samples.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = f"{{openai: '{server.url}', model: m}}"
    run(capsys, str(source), "--judge", judge, "--output_dir", str(tmp_path / "out"))
    (rate,) = json.loads((tmp_path / "out" / "judge.json").read_text())["win_rates"]
    assert (rate["a"], rate["b"], rate["groups"]) == ("dpo", "sft", 3)
    assert rate["judge"]["estimate"] == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["votes.db"], "nobody has judged these pairs: give --judge"),
        (["none.jsonl"], "none.jsonl: no such file"),
        (["bad/judged.jsonl"], "row 1: not a judged pair"),
        (["one.jsonl", "--judge", "{function: 'm:f'}"], "there is no module 'm'"),
        (["one.jsonl"], "has answers of sft, expected two policies"),
    ],
)
def test_what_cannot_be_judged_is_refused(words, message, tmp_path, monkeypatch, capsys):
    make_store(tmp_path / "votes.db", votes=False)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "judged.jsonl").write_text('{"prompt": "x"}\n')
    row = {"policy": "sft", "prompt": "q", "response": "r"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["judge", "pairs", *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err
