"""`rlhf data prepare` as a whole."""

import json
import random

import pytest

from rlhf.cli import main
from rlhf.data.load import fingerprint, load
from rlhf.data.prepare.run import PrepareConfig, prepare
from rlhf.data.records import Labelled, Preference, digest, normalise
from rlhf.data.split import split_of
from rlhf.data.store import Store
from rlhf.errors import UserError

LONG = (
    "the parcel left our warehouse on Monday morning and should reach you within three working days"
)
WORDS = f"{LONG} lamp chair table order refund invoice colour green delivery address courier depot sofa".split()


def sentence(rng, n=14):
    return " ".join(rng.choices(WORDS, k=n))


def clean_rows(n=60, seed=0):
    rng = random.Random(seed)
    return [
        {"prompt": sentence(rng), "chosen": sentence(rng), "rejected": sentence(rng)}
        for _ in range(n)
    ]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def run(tmp_path, rows, name="out.jsonl", **options):
    source = write(tmp_path / "in.jsonl", rows)
    return prepare(PrepareConfig(source=[source], output=str(tmp_path / name), **options))


def left_out(report):
    return {step.name: step.dropped for step in report["steps"] if step.dropped}


def test_clean_rows_pass_untouched_and_the_file_is_the_same_each_time(tmp_path):
    rows = clean_rows()
    report = run(tmp_path, rows)
    assert left_out(report) == {} and report["rows"] == 60
    records = load(str(tmp_path / "out.jsonl"), Preference)
    assert [(r.prompt[0]["content"], r.chosen, r.rejected) for r in records] == [
        tuple(row.values()) for row in rows
    ]
    # as other stages have it
    assert {r.group for r in records} == {digest(normalise(row["prompt"])) for row in rows}
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    run(tmp_path, rows)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first
    for record in records:
        record.split = None
    assert report["fingerprint"] == fingerprint(records)


def test_every_fault_is_found_once(tmp_path):
    rows = clean_rows()
    test = {"prompt": sentence(random.Random(7)), "chosen": "a", "rejected": "b"}
    faults = [
        {
            "prompt": "identical",
            "chosen": "one and  the same",
            "rejected": "one and the\u200b same",
        },
        {"prompt": "identical", "chosen": "x", "rejected": "x"},
        {"prompt": "empty", "chosen": "\u200b", "rejected": "x"},
        {
            "prompt": rows[0]["prompt"] + " ",
            "chosen": rows[0]["chosen"],
            "rejected": rows[0]["rejected"] + "\r\n",
        },
        {"prompt": rows[1]["prompt"], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]},
        rows[2] | {"chosen": rows[2]["chosen"] + "!"},
        {
            "prompt": rows[3]["prompt"],
            "chosen": rows[3]["rejected"] + "!",
            "rejected": rows[3]["chosen"],
        },
        test | {"chosen": sentence(random.Random(8)), "rejected": sentence(random.Random(9))},
        {"prompt": "write to", "chosen": "jane@mail.example", "rejected": "joe@mail.example"},
        {
            "prompt": "Who are you",
            "chosen": "I am jane@mail.example of this shop",
            "rejected": "I am a robot of this shop",
        },
    ]
    report = run(tmp_path, rows + faults, against=[write(tmp_path / "test.jsonl", [test])])
    assert left_out(report) == {
        "read": 1,  # the same text as it stands
        "text": 2,
        "personal data": 1,
        "exact duplicates": 1,
        "contradictions": 2,
        "near duplicates": 1,
        "near contradictions": 2,
        "contamination": 1,
    }
    records = load(str(tmp_path / "out.jsonl"), Preference)
    assert len(records) == 60 - 2 + 1 and records[-1].chosen == "I am [EMAIL] of this shop"
    steps = {step.name: step for step in report["steps"]}
    assert steps["personal data"].found == "3 places in 2 rows: email 3"
    card = (tmp_path / "data_card.md").read_text()
    assert "jane@mail" not in card and "[EMAIL]" in card and str(tmp_path) not in card
    for step in report["steps"]:
        assert f"| {step.name} |" in card, step.name


@pytest.mark.parametrize(
    ("action", "rows", "text"), [("drop", 3, None), ("keep", 4, "call +49 30 901820 now")]
)
def test_personal_data_can_be_dropped_or_kept(tmp_path, action, rows, text):
    data = [
        *clean_rows(3),
        {"prompt": "number?", "chosen": "call +49 30 901820 now", "rejected": "no"},
    ]
    report = run(tmp_path, data, personal=action)
    assert report["rows"] == rows
    assert text is None or load(str(tmp_path / "out.jsonl"), Preference)[-1].chosen == text


SECRET = "jane.doe@mail.example"


@pytest.mark.parametrize("action", ["mask", "drop", "keep"])
def test_no_example_shows_personal_data(tmp_path, capsys, action):
    rows = [
        *clean_rows(3),
        {"prompt": f"Mail \u200b{SECRET} ", "chosen": "same", "rejected": "same "},
        # changed by the text step
        {"prompt": f"Mail {SECRET} about it ", "chosen": "one", "rejected": "two"},
        {"prompt": "q", "chosen": "x", "rejected": "y", "weight": SECRET},
        {"prompt": [{"role": SECRET, "content": "q"}], "chosen": "x", "rejected": "y"},
        {
            "prompt": [{"role": "user", "content": {"x" * 30: SECRET}}],
            "chosen": "x",
            "rejected": "y",
        },
        {
            "prompt": "Who?",
            "chosen": f"I am {SECRET}, of this shop",
            "rejected": f"I am {SECRET}, and of that shop",
        },
        {
            "prompt": "Who?",
            "chosen": f"I am {SECRET}, and of that shop",
            "rejected": f"I am {SECRET}, of this shop",
        },
    ]
    test = write(
        tmp_path / "test.jsonl",
        [{"prompt": f"Mail {SECRET} about it", "chosen": "x", "rejected": "y"}],
    )
    (tmp_path / "sub").mkdir()
    run(tmp_path, rows, "sub/out.jsonl", personal=action, examples=9, against=[test])
    said = "".join(capsys.readouterr()) + (tmp_path / "sub" / "data_card.md").read_text()
    assert (
        "doe@" not in said
        and "jane" not in said
        and "[EMAIL]" in said
        and "Mail [EMAIL] about it" in said
    )
    # with keep, they leave as contradictions
    assert "jane" not in (tmp_path / "sub" / "out.jsonl").read_text()


def test_metadata_is_searched_too(tmp_path):
    rows = [row | {"user": {"mail": [SECRET]}, "n": 1} for row in clean_rows(2)]
    assert run(tmp_path, [*rows, *clean_rows(3, seed=1)], personal="drop")["rows"] == 3
    run(tmp_path, rows)
    found = load(str(tmp_path / "out.jsonl"), Preference)
    assert [r.metadata for r in found] == [{"user": {"mail": ["[EMAIL]"]}, "n": 1}] * 2


def test_tool_calls_are_searched_and_told_apart(tmp_path):
    def asked(city):
        call = {
            "type": "function",
            "function": {"name": "find", "arguments": {"who": SECRET, "where": city}},
        }
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "content": "it is there, as it should be"}
        return [{"role": "user", "content": f"{LONG}?"}, calling, result]

    answers = {"chosen": f"{LONG}, yes", "rejected": "no"}
    run(
        tmp_path, [{"prompt": asked(city)} | answers for city in ("Rome", "Rome", "Oslo")], near=1.0
    )
    found = load(str(tmp_path / "out.jsonl"), Preference)
    assert [r.prompt[1]["tool_calls"][0]["function"]["arguments"]["who"] for r in found] == [
        "[EMAIL]"
    ] * 2


def test_contamination_is_looked_for_before_masking(tmp_path):
    leak = {"prompt": f"Mail {SECRET} now", "chosen": sentence(random.Random(3)), "rejected": "no"}
    test = write(tmp_path / "t.jsonl", [leak | {"chosen": "a", "rejected": "b"}])
    report = run(tmp_path, [*clean_rows(3), leak], against=[test], near=1.0)
    assert left_out(report) == {"contamination": 1}


def test_the_card_shows_examples_as_they_are_and_no_markdown(tmp_path):
    rows = [
        *clean_rows(3),
        {"prompt": "q ", "chosen": "![x](http://evil.example/a.png) ``b``", "rejected": "c"},
    ]
    run(tmp_path, rows)
    card = (tmp_path / "data_card.md").read_text()
    assert "- text: ``` in.jsonl row 4: q | ![x](http://evil.example/a.png) ``b`` | c ```" in card


def test_a_card_that_cannot_be_written_stops_before_anything_is(tmp_path):
    (tmp_path / "data_card.md").write_bytes(b"\xff not UTF-8")
    run(tmp_path, clean_rows(3))
    assert (tmp_path / "out_card.md").is_file() and (
        tmp_path / "data_card.md"
    ).read_bytes() == b"\xff not UTF-8"
    for name in ("data_card.md", "two_card.md"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"two_card\.md: is a folder"):
        run(tmp_path, clean_rows(3), "two.jsonl")
    assert not (tmp_path / "two.jsonl").exists()
    with pytest.raises(UserError, match="is a folder; expected a file"):
        (tmp_path / "three.jsonl").mkdir()
        run(tmp_path, clean_rows(3), "three.jsonl")


def test_a_region_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"found UK, expected .* GB"):
        PrepareConfig(source=["x"], output="y", phone_regions=["US", "UK"]).validate()


def test_similar_prompts_and_answer_pairs_share_a_group_that_is_written(tmp_path):
    rows = clean_rows(20)
    # nearly the same prompt
    rows += [rows[0] | {"prompt": rows[0]["prompt"] + "?", "chosen": "other words entirely"}]
    # the same pair
    rows += [
        {"prompt": "something new", "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}
    ]
    rows += [
        rows[2] | {"prompt": rows[2]["prompt"] + "?", "chosen": "also other words", "group": "mine"}
    ]
    told = f"A customer writes: {rows[3]['prompt']}. What do we say to that, and who should say it in the end?"
    rows += [{"prompt": told, "chosen": "nothing", "rejected": "much"}]  # the prompt inside another
    report = run(tmp_path, rows)
    assert "; 1 rows have a text inside another's prompt" in report["steps"][-1].found
    groups = [r.group for r in load(str(tmp_path / "out.jsonl"), Preference)]
    assert groups[20] == groups[0] and groups[21] == groups[1] and groups[23] == groups[3]
    # a group that the data names stays
    assert groups[22] == "mine" != groups[2] and len(set(groups)) == 21


def test_a_row_that_gives_another_split_away_goes(tmp_path):
    rows = [row | {"split": "train"} for row in clean_rows(20)]
    rows += [
        rows[0]
        | {"prompt": rows[0]["prompt"] + "?", "chosen": "other words entirely", "split": "test"}
    ]
    report = run(tmp_path, rows)
    assert left_out(report) == {"groups": 1}
    found = load(str(tmp_path / "out.jsonl"), Preference)
    assert found[-1].split == "test" and rows[0]["prompt"] not in [
        r.prompt[0]["content"] for r in found
    ]


def test_unpaired_parquet_for_kto_keeps_groups(tmp_path):
    report = run(tmp_path, clean_rows(10), "kto.parquet", form="unpaired")
    found = load(str(tmp_path / "kto.parquet"), Labelled)
    assert report["rows"] == len(found) == 20 and sum(r.label for r in found) == 10
    assert [split_of(r.group) for r in found] == [r.split for r in found]


def test_labelled_rows_and_instructions_are_prepared_too(tmp_path):
    rows = [
        {"prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 > 0}
        for i, r in enumerate(clean_rows(12))
    ]
    report = run(tmp_path, [*rows, rows[0], rows[1] | {"label": not rows[1]["label"]}])
    assert left_out(report) == {"exact duplicates": 1, "contradictions": 2}
    assert "true in" in report["summary"]["label"] and "label by length" in report["summary"]
    report = run(
        tmp_path,
        [{"prompt": r["prompt"], "response": r["chosen"]} for r in clean_rows(12)],
        "i.jsonl",
    )
    assert report["kind"] == "Instruction" and report["rows"] == 12


def store_with(tmp_path, pairs=80, seed=0):
    """Three honest annotators, one who votes at random, and one who likes the left."""
    rng = random.Random(seed)
    path = tmp_path / "votes.db"
    with Store.open(path, create=True) as store, store.transaction():
        ids = {
            name: store.add_annotator(name) for name in ("ann", "bob", "cem", "careless", "leftist")
        }
        for _ in range(pairs):
            prompt = store.add_prompt([{"role": "user", "content": sentence(rng)}])
            pair = store.add_comparison(*(store.add_response(prompt, sentence(rng)) for _ in "ab"))
            good = rng.choice("ab")
            for name, id in ids.items():
                left = rng.choice("ab")
                says = good if rng.random() < 0.9 else "ba"["ab".index(good)]
                says = (
                    rng.choice("ab")
                    if name == "careless"
                    else left
                    if name == "leftist" and rng.random() < 0.6
                    else says
                )
                fast = 400 if name == "careless" else 6000
                store.vote(
                    pair, id, says, left=left, strength=rng.choice((1, 2, 3)), duration_ms=fast
                )
    return path


@pytest.mark.parametrize("aggregate", ["each", "majority", "skill"])
def test_a_store_is_read_at_an_event_and_its_annotators_judged(tmp_path, aggregate, capsys):
    path = store_with(tmp_path)
    with Store.open(path) as store:
        event = store.last_event()
        expected = len(store.at(event).rows(aggregate))
    report = prepare(
        PrepareConfig(source=[str(path)], output=str(tmp_path / "out.jsonl"), aggregate=aggregate)
    )
    assert (
        report["rows"] == expected and f"event {event}" in (tmp_path / "data_card.md").read_text()
    )
    (summary,) = report["annotators"].values()
    flags = {p["annotator"]: " ".join(p["flags"]) for p in summary["annotators"]}
    assert "agrees less" in flags["careless"] and "faster than one can read" in flags["careless"]
    assert (
        "prefers the left side" in flags["leftist"]
        and not flags["ann"] + flags["bob"] + flags["cem"]
    )
    said = capsys.readouterr().out
    assert "careless: agrees less with the rest" in said and "Krippendorff's alpha" in said
    assert len(summary["kappa"]) == 10 and all(
        k["low"] < k["kappa"] < k["high"] for k in summary["kappa"]
    )
    worst = min(summary["kappa"], key=lambda k: k["kappa"])
    between = f"{worst['kappa']:.2f} [{worst['low']:.2f}, {worst['high']:.2f}]"
    line = f"{worst['one']} and {worst['other']} {between} on 80 pairs"
    assert f"Cohen's kappa: {line}" in said and line in (tmp_path / "data_card.md").read_text()
    found = load(str(tmp_path / "out.jsonl"), Preference)
    if aggregate == "each":
        assert {r.annotator for r in found} == set(flags)
    else:
        assert all(0.5 < r.label_prob <= 1 and r.margin is not None for r in found)


def test_rows_that_name_their_annotators_are_judged_too(tmp_path):
    path = store_with(tmp_path)
    prepare(
        PrepareConfig(source=[str(path)], output=str(tmp_path / "each.jsonl"), aggregate="each")
    )
    config = PrepareConfig(
        source=[str(tmp_path / "each.jsonl")], output=str(tmp_path / "out.jsonl")
    )
    (summary,) = prepare(config)["annotators"].values()
    assert summary["pairs_judged_twice"] == 80
    assert any(
        "agrees less" in flag
        for p in summary["annotators"]
        if p["annotator"] == "careless"
        for flag in p["flags"]
    )


def test_the_command_refuses_to_touch_what_it_reads(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", clean_rows(3))
    with pytest.raises(SystemExit):
        main(["data", "prepare", source, "--output", source])
    assert "those are never changed" in capsys.readouterr().err
    test = write(tmp_path / "test.jsonl", clean_rows(3))
    with pytest.raises(UserError, match="no row is left; left out by contamination 3"):
        prepare(PrepareConfig(source=[source], output=str(tmp_path / "out.jsonl"), against=[test]))
    with pytest.raises(UserError, match="those are never changed"):
        prepare(PrepareConfig(source=[source], output=test, against=[test]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "test.jsonl"]


def test_the_card_of_another_file_stays(tmp_path):
    run(tmp_path, clean_rows(3), "one.jsonl", licence=["CC0"])
    run(tmp_path, clean_rows(3), "two.jsonl")
    assert (tmp_path / "data_card.md").read_text().startswith("# Data card of one.jsonl\n")
    assert "CC0" in (tmp_path / "data_card.md").read_text()
    assert (tmp_path / "two_card.md").read_text().startswith("# Data card of two.jsonl\n")


@pytest.mark.parametrize("flag", ["near=0.1", "leak_overlap=0", "leak_ngram=1", "licence=a,b"])
def test_options_out_of_range_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        main(["data", "prepare", "x.jsonl", "--output", "y.jsonl", f"--{flag}"])
    assert f"'{flag.split('=')[0]}'" in capsys.readouterr().err
