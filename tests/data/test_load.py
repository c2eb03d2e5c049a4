import csv
import gzip
import json
import os
from pathlib import Path

import pytest

from rlhf.config import parse
from rlhf.data.describe import DescribeConfig, describe
from rlhf.data.freeze import freeze
from rlhf.data.load import fingerprint, load
from rlhf.data.records import Instruction, Labelled, Preference, Prompt, prompt_group
from rlhf.data.store import Store
from rlhf.errors import UserError
from rlhf.options.shared import RunConfig
from rlhf.ranks.distributed import DistributedContext
from rlhf.runs.run import Run

DATA = os.environ.get("RLHF_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="RLHF_DATA is not set")
PAIR = {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}
ASK = {"role": "user", "content": "Hi"}
SAY = {"role": "assistant", "content": "Hello!"}
HUH = {"role": "assistant", "content": "What?"}
HH = "\n\nHuman: Hi\n\nAssistant:"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def one(tmp_path, row, kind):
    [record] = load(
        write(tmp_path / "one.jsonl", [row]), kind, validation_fraction=0, test_fraction=0
    )
    return record


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": [ASK], "chosen": [SAY], "rejected": [HUH]},
        # UltraFeedback repeats the prompt
        {"prompt": "Hi", "chosen": [ASK, SAY], "rejected": [ASK, HUH]},
        {"chosen": [ASK, SAY], "rejected": [ASK, HUH]},
        {"chosen": HH + " Hello!", "rejected": HH + " What?"},  # HH-RLHF
        {"prompt": HH, "chosen": " Hello!", "rejected": " What?"},
        {"prompt": HH, "chosen": HH + " Hello!", "rejected": HH + " What?"},
        {"instruction": "Hi", "input": "", "chosen": "Hello!", "rejected": "What?"},
    ],
)
def test_every_form_of_a_pair_is_the_same_record(tmp_path, row):
    pair = one(tmp_path, row, Preference)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([ASK], "Hello!", "What?")
    assert pair.metadata == {} and pair.group == prompt_group([ASK])
    assert one(tmp_path, row, Prompt).prompt == [ASK]
    assert one(tmp_path, row, Instruction).response == "Hello!"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "response": "Hello!"},
        {"prompt": "Hi", "completion": "Hello!"},
        {"prompt": [ASK], "completion": [SAY]},
        {"messages": [ASK, SAY]},
        {"instruction": "Hi", "output": "Hello!"},
        {"prompt": "Hi", "completion": "Hello!", "label": True},
        {"completion": HH + " Hello!"},
    ],
)
def test_every_form_of_an_instruction_is_the_same_record(tmp_path, row):
    record = one(tmp_path, row, Instruction)
    assert (record.prompt, record.response) == ([ASK], "Hello!")
    assert one(tmp_path, row, Prompt).prompt == [ASK]


def test_prompts_alone(tmp_path):
    for row in (
        {"prompt": "Hi"},
        {"prompt": [ASK]},
        {"messages": [ASK]},
        {"instruction": "Hi"},
        {"prompt": HH},
    ):
        assert one(tmp_path, row, Prompt).prompt == [ASK]
    alpaca = one(tmp_path, {"instruction": "Add", "input": "1 2", "output": "3"}, Instruction)
    assert alpaca.prompt == [{"role": "user", "content": "Add\n\n1 2"}] and alpaca.metadata == {}


def test_longer_conversations_keep_their_turns(tmp_path):
    text = (
        "\n\nHuman: A\n\nHuman: B\n\nAssistant: C:\n\n1. Human: no turn\n\nHuman: D\n\nAssistant:"
    )
    pair = one(tmp_path, {"chosen": text + " E", "rejected": text + " F"}, Preference)
    assert pair.prompt == [
        {"role": "user", "content": "A\n\nB"},
        {"role": "assistant", "content": "C:\n\n1. Human: no turn"},
        {"role": "user", "content": "D"},
    ]
    assert (pair.chosen, pair.rejected) == ("E", "F")


def test_system_column_comes_first_once(tmp_path):
    system = {"role": "system", "content": "Be brief"}
    row = PAIR | {"system": "Be brief"}
    assert one(tmp_path, row, Preference).prompt == [system, ASK]
    assert one(tmp_path, row | {"prompt": [system, ASK]}, Preference).prompt == [system, ASK]
    with pytest.raises(UserError, match="'system': differs"):
        one(tmp_path, row | {"prompt": [{"role": "system", "content": "Ramble"}, ASK]}, Preference)


def test_columns_become_fields_and_the_rest_metadata(tmp_path):
    about = {
        "group": 7,
        "split": "val",
        "margin": 1,
        "label_prob": 0.9,
        "weight": 2,
        "source": "s",
        "annotator": "ann",
    }
    pair = one(
        tmp_path,
        PAIR | about | {"voice": "v", "id": 3, "item": "lamp", "metadata": {"remedy": "x"}},
        Preference,
    )
    found = (
        pair.group,
        pair.split,
        pair.margin,
        pair.label_prob,
        pair.weight,
        pair.source,
        pair.annotator,
        pair.voice,
    )
    assert found == ("7", "validation", 1, 0.9, 2, "s", "ann", "v")
    assert pair.metadata == {"id": 3, "item": "lamp", "remedy": "x"}
    # no answers, no margin
    assert one(tmp_path, PAIR | about | {"id": 3}, Prompt).metadata == {"id": 3}


def test_labels(tmp_path):
    row = {"prompt": "Hi", "completion": "Hello!"}
    for label, expected in ((True, True), (0, False), ("false", False), ("1", True)):
        assert one(tmp_path, row | {"label": label}, Labelled).label is expected
    with pytest.raises(UserError, match="'label': found 'spam', expected true or false"):
        one(tmp_path, row | {"label": "spam"}, Labelled)
    with pytest.raises(UserError, match="'label': is false"):  # a bad answer must not be imitated
        one(tmp_path, row | {"label": False}, Instruction)


def test_all_file_types_give_the_same_records(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [PAIR | {"id": str(i), "prompt": f"Hi, {i}\nthere"} for i in range(5)]
    paths = [tmp_path / name for name in ("p.jsonl", "p.json", "p.csv", "p.parquet")]
    write(paths[0], rows)
    paths[1].write_text(json.dumps(rows))
    # with a byte order mark, as Excel writes it
    with open(paths[2], "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), paths[3])
    for path in paths[0], paths[2]:
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        paths.append(Path(f"{path}.gz"))
    expected = fingerprint(load(str(paths[0]), Preference))
    assert [fingerprint(load(str(path), Preference)) for path in paths] == [expected] * 6
    assert [r.metadata["id"] for r in load(str(paths[2]), Preference)] == list("01234")


def test_messages_in_csv_are_json_and_other_text_stays_text(tmp_path):
    path = tmp_path / "m.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["prompt", "response", "weight"], [json.dumps([ASK]), '{"role": "[{"}', ""]]
        )
    [record] = load(str(path), Instruction, validation_fraction=0, test_fraction=0)
    assert (record.prompt, record.response, record.weight) == ([ASK], '{"role": "[{"}', 1.0)


def test_rows_that_share_an_answer_pair_share_a_group_in_every_kind(tmp_path):
    rows = [
        {"prompt": "p1", "chosen": "Yes", "rejected": "No"},
        {"prompt": "p2", "chosen": " no", "rejected": "YES"},  # the same pair, turned round
        {"prompt": "P2 ", "chosen": "A", "rejected": "B"},  # the same prompt as p2
        {"prompt": "p3", "chosen": "Yes", "rejected": "B"},  # shares single answers only
        {"prompt": "p4", "chosen": "Yes", "rejected": "No", "group": "mine"},
    ]
    path = write(tmp_path / "pairs.jsonl", rows)
    hashes = [prompt_group([{"role": "user", "content": p}]) for p in ("p1", "p2", "p3")]
    joint = min(hashes[:2])
    for kind in (Preference, Prompt, Instruction):
        assert [r.group for r in load(path, kind)] == [joint, joint, joint, hashes[2], "mine"]
    backwards = load(write(tmp_path / "back.jsonl", rows[::-1]), Preference)
    assert [r.group for r in backwards] == ["mine", hashes[2], joint, joint, joint]


def test_bad_pairs_join_nothing_whatever_they_are_read_as(tmp_path):
    same = [{"prompt": p, "chosen": "x", "rejected": "x"} for p in ("p1", "p2")]
    prompts = load(write(tmp_path / "same.jsonl", same), Prompt)
    assert prompts[0].group != prompts[1].group


def test_groups_are_joined_over_all_sources_before_anything_is_left_out(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"prompt": "p1", "chosen": "a", "rejected": "b"}])
    two = write(tmp_path / "two.jsonl", [{"prompt": "p2", "chosen": "b", "rejected": "a"}])
    both = load([one, two], Preference)
    assert both[0].group == both[1].group and [r.source for r in both] == [one, two]
    assert load([one, two], Preference, limit=1)[0].group == both[1].group


def test_a_limit_takes_groups_of_every_kind_and_keeps_their_order(tmp_path):
    # 60 groups called a-.. and then 60 called b-..: 40 by the hash of the group, sd sqrt(40 / 4 *
    # 80 / 119) = 2.6
    rows = [
        {"prompt": f"q{i}", "response": "x", "group": f"{'ab'[i // 60]}-{i}"} for i in range(120)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    every, few = load(path, Instruction), load(path, Instruction, limit=40)
    assert len(few) == 40 and few == [r for r in every if r in few]
    assert 10 < sum(r.group.startswith("a") for r in few) < 30


def test_the_same_prompts_are_held_out_as_pairs_and_as_prompts(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": f"a{i // 2}", "rejected": "b"} for i in range(300)]
    path = write(tmp_path / "p.jsonl", rows)
    for split in ("train", "validation", "test"):
        pairs, prompts = load(path, Preference, split=split), load(path, Prompt, split=split)
        assert [r.prompt for r in pairs] == [r.prompt for r in prompts]
        assert 0 < len(pairs) < 300
    a, b = load(path, Preference, half="a"), load(path, Preference, half="b")
    assert len(a) + len(b) == 300 and not {r.group for r in a} & {r.group for r in b}


def test_prompts_come_once_in_order(tmp_path):
    rows = [{"prompt": p, "voice": v} for p, v in (("b", "x"), ("a", "x"), ("b", "x"), ("b", "y"))]
    found = load(write(tmp_path / "p.jsonl", rows), Prompt)
    assert [(p.prompt[0]["content"], p.voice) for p in found] == [
        ("b", "x"),
        ("a", "x"),
        ("b", "y"),
    ]


def test_bad_rows_are_named_counted_and_skipped_on_request(tmp_path, capsys):
    same = {"prompt": "x", "chosen": "x", "rejected": "x"}
    path = write(
        tmp_path / "prefs.jsonl",
        [PAIR, same, PAIR | {"weight": "heavy"}, same, PAIR | {"chosen": ""}],
    )
    with pytest.raises(UserError) as error:
        load(path, Preference)
    assert str(error.value) == (
        f"{path} row 2: 'chosen' and 'rejected' are the same text (2 such rows). Drop them with: --on_error skip"
    )
    assert len(load(path, Preference, on_error="skip")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"skipped 2 rows: 'chosen' and 'rejected' are the same text (first: {path} row 2)",
        f"skipped 1 row: field 'weight': found ..., expected a number (first: {path} row 3)",
        f"skipped 1 row: field 'chosen': is empty (first: {path} row 5)",
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "chosen": "a"}, "'rejected': is missing"),
        (
            {"chosen": "a", "rejected": "b"},
            "'prompt': is missing, and 'chosen' is not a whole conversation",
        ),
        (
            {"chosen": [ASK, SAY], "rejected": [{**ASK, "content": "Ho"}, HUH]},
            "'rejected': its conversation differs",
        ),
        (
            {"prompt": "Ho", "chosen": [ASK, SAY], "rejected": "b"},
            "'chosen': its conversation before the last answer",
        ),
        ({"prompt": "Hi", "chosen": [ASK], "rejected": "b"}, "'chosen': ends with a user message"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "'prompt': found 5, expected text"),
        (
            PAIR | {"split": "half"},
            "'split': found 'half', expected one of train, validation, test",
        ),
        (PAIR | {"label_prob": 2}, "'label_prob': found 2, expected a probability"),
        ([1], "found list, expected an object with columns"),
    ],
)
def test_what_can_be_wrong_with_a_pair(tmp_path, row, reason):
    with pytest.raises(UserError) as error:
        load(write(tmp_path / "bad.jsonl", [PAIR, row]), Preference)
    assert "bad.jsonl row 2: " in str(error.value) and reason in str(error.value)


def test_broken_json_names_line_and_column(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(PAIR) + '\n\n{"prompt": "Hi" "chosen"}\n')
    with pytest.raises(
        UserError, match=r"bad\.jsonl line 3 column 17: not valid JSON: Expecting ',' delimiter"
    ):
        load(str(path), Preference)
    assert len(load(str(path), Preference, on_error="skip")) == 1


def test_the_wrong_kind_of_file_says_what_it_holds(tmp_path):
    path = write(tmp_path / "sft.jsonl", [{"messages": [ASK, SAY], "id": 1}])
    with pytest.raises(UserError) as error:
        load(path, Preference, on_error="skip")
    text = str(error.value)
    assert text.startswith(
        f"{path}: found columns messages, id; expected for Preference: {{prompt, chosen, rejected}}"
    )
    assert "look like Instruction" in text


def test_files_that_cannot_be_read_are_said_plainly(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("the Hub was asked"))
    write(tmp_path / "prefs.jsonl", [PAIR])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIR).encode())[:-12])
    (tmp_path / "one.json").write_text(json.dumps(PAIR))
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "wide.csv").write_text("prompt\nHi,there\n")
    (tmp_path / "quote.csv").write_text('prompt\n"Hi\n')
    (tmp_path / "notes.txt").write_text("Hi")
    expected = {
        "pref.jsonl": r"no such file\. Did you mean .*prefs\.jsonl",
        "empty.jsonl": "no row to read",
        "latin.jsonl": "is not UTF-8 text",
        "cut.jsonl.gz": r"is not a whole \.gz file",
        "one.json": "found dict, expected a list of rows",
        "bad.parquet": "cannot be read as Parquet",
        "wide.csv": "row 1: found 1 cells more than the header has",
        "quote.csv": "row 1 .*not valid CSV",
        "notes.txt": "cannot read '.txt' files",
        "": "is a folder",
    }
    for name, reason in expected.items():
        with pytest.raises(UserError, match=reason):
            load(f"{tmp_path}/{name}", Prompt)
    monkeypatch.chdir(tmp_path)
    for name in ("pref.csv", "./prefs", "data/train.jsonl", "a/b/c"):
        with pytest.raises(UserError, match="no such file"):
            load(name, Prompt)


def test_hub_names(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split=None):
        asked.append((name, config, split))
        rows = {
            "train": [PAIR | {"prompt": f"p{i}", "chosen": f"a{i}"} for i in range(50)],
            "test": [PAIR],
        }
        parts = {name: datasets.Dataset.from_list(r) for name, r in rows.items()}
        return parts[split.split("_")[0]] if split else datasets.DatasetDict(parts)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    both = load("org/name:conf", Preference, validation_fraction=0.2)
    # the set's own test split wins
    assert [r.split for r in both].count("test") == 1 and both[-1].split == "test"
    assert "validation" in [r.split for r in both]
    # cut by hash
    assert "test" in {r.split for r in load("org/name@train_prefs", Preference, test_fraction=0.4)}
    assert {r.split for r in load("org/name@test_prefs", Preference)} == {"test"}
    assert asked == [
        ("org/name", "conf", None),
        ("org/name", None, "train_prefs"),
        ("org/name", None, "test_prefs"),
    ]

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"org/name: neither a file here nor .*ConnectionError: no route"
    ):
        load("org/name", Preference)


def test_stores_are_sources_at_an_event(tmp_path):
    path = tmp_path / "votes.db"
    with Store.open(path, create=True) as store:
        prompt = store.add_prompt([ASK])
        pair = store.add_comparison(
            store.add_response(prompt, "Hello!"), store.add_response(prompt, "What?")
        )
        store.add_prompt([{"role": "user", "content": "alone"}])
        event = store.vote(pair, store.add_annotator("ann"), "a")
        store.vote(pair, store.add_annotator("bob"), "b")
    assert [(r.chosen, r.annotator) for r in load(str(path), Preference)] == [
        ("Hello!", "ann"),
        ("What?", "bob"),
    ]
    assert [r.annotator for r in load(f"{path}@{event}", Preference)] == ["ann"]
    assert [p.prompt[0]["content"] for p in load(str(path), Prompt)] == ["Hi", "alone"]
    with pytest.raises(UserError, match="there is no event 99; the newest is 2"):
        load(f"{path}@99", Preference)
    with pytest.raises(UserError, match="no row to read"):
        load(str(path), Preference, aggregate="majority")  # one vote each: no winner


def test_a_prompt_from_a_file_joins_the_group_that_a_store_gave_it(tmp_path):
    # the store has joined p1 and p2 over their answers under the smaller hash; the file knows each
    # prompt alone
    path = tmp_path / "votes.db"
    with Store.open(path, create=True) as store:
        for text in ("p1", "p2"):
            prompt = store.add_prompt([{"role": "user", "content": text}])
            pair = store.add_comparison(
                store.add_response(prompt, "a"), store.add_response(prompt, "b")
            )
            store.vote(pair, store.add_annotator("ann"), "a")
    rows = [{"prompt": text, "chosen": text + "x", "rejected": "y"} for text in ("p1", "p2")]
    assert (
        len({r.group for r in load([str(path), write(tmp_path / "more.jsonl", rows)], Preference)})
        == 1
    )


def test_fingerprint_changes_with_all_that_counts_and_nothing_else(tmp_path):
    rows = [PAIR, PAIR | {"prompt": "Ho", "weight": 2}]
    records = load(write(tmp_path / "a.jsonl", rows), Preference)
    known = fingerprint(records)
    assert len(known) == 16
    # order and file name
    assert fingerprint(load(write(tmp_path / "b.jsonl", rows[::-1]), Preference)) == known
    seen = {known, fingerprint(records[:1]), fingerprint([*records, records[0]]), fingerprint([])}
    new = {
        "chosen": "x",
        "group": "x",
        "split": "x",
        "prompt": [SAY],
        "margin": 1.0,
        "metadata": {"x": 1},
        "voice": "x",
    }
    for name, value in new.items():
        old = getattr(records[0], name)
        setattr(records[0], name, value)
        seen.add(fingerprint(records))
        setattr(records[0], name, old)
    assert len(seen) == 4 + len(new) and fingerprint(records) == known


def test_nothing_left_to_train_on_is_an_error_and_an_empty_holdout_is_not(tmp_path):
    path = write(tmp_path / "p.jsonl", [PAIR | {"split": "test"}])
    with pytest.raises(UserError, match="no record is left of 1 with split=train"):
        load(path, Preference, split="train")
    assert load(path, Preference, split="validation") == []
    with pytest.raises(UserError, match="limit: found 0"):
        load(path, Preference, limit=0)


def test_describe_shows_what_load_would_make_of_it(tmp_path, capsys):
    rows = [
        PAIR,
        PAIR | {"id": 1},
        PAIR | {"chosen": "What?"},
        {"prompt": "Ho", "chosen": "a b c", "rejected": "d"},
    ]
    path = write(tmp_path / "p.jsonl", rows)
    config = parse(DescribeConfig, ["--source", path, "--examples", "1"], prog="rlhf data show")
    summary = describe(config)
    assert summary["rows"] == "3 read, 1 bad" and summary["groups"] == "2, the largest of 2 rows"
    assert summary["duplicates"] == "1 rows repeat another's texts; 2 different prompts"
    assert summary["words"][1] == "chosen: median 1, 95 % up to 3, longest 3"
    assert summary["chosen"] == "longer than rejected in 33% of rows, as long in 67%"  # in words
    printed = capsys.readouterr().out
    assert (
        "p.jsonl: Preference" in printed
        and "same text" in printed
        and printed.count("p.jsonl row 1") == 1
    )


def test_the_examples_of_the_documentation(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    pairs, instructions = (block.split("```")[0] for block in text.split("```json\n")[1:])
    for name, block, kind, count in (
        ("p", pairs, Preference, 4),
        ("i", instructions, Instruction, 4),
    ):
        (tmp_path / f"{name}.jsonl").write_text(block)
        assert len(load(f"{tmp_path}/{name}.jsonl", kind)) == count
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": "b"} for i in range(50)]
    write(tmp_path / "data" / "prefs.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    for block in text.split("```python\n")[1:]:
        exec(block.split("```")[0], {})
    assert (tmp_path / "runs" / "dpo" / "pairs.jsonl").exists()


@needs_data
def test_real_pairs_with_equal_sides():
    path = f"{DATA}/pref_rasbt_polite.jsonl"
    with pytest.raises(
        UserError, match=r"row \d+: 'chosen' and 'rejected' are the same text \(6 such rows\)"
    ):
        load(path, Preference)
    assert len(load(path, Preference, on_error="skip")) == 1094


@needs_data
def test_real_voices_share_88_answer_pairs_and_keep_their_split():
    pairs = load(f"{DATA}/pref_voice_professional_over_witty.jsonl", Preference)
    assert len(pairs) == 1752 and len({r.group for r in pairs}) == 88
    test = [r for r in pairs if r.split == "test"]
    assert len(test) == 360 and len({r.group for r in test}) == 18
    assert not {r.group for r in test} & {r.group for r in pairs if r.split != "test"}


@needs_data
def test_real_human_votes_repeat_prompts_within_groups():
    pairs = load(f"{DATA}/pref_pandalm_human.jsonl", Preference, on_error="skip")
    assert len(pairs) == 894 - 52
    splits = {}
    for pair in pairs:
        splits.setdefault(pair.prompt[0]["content"], set()).add(pair.split)
    assert all(len(s) == 1 for s in splits.values())


def show(path, *more):
    return describe(parse(DescribeConfig, ["--source", str(path), *more], prog="rlhf data show"))


def test_why_no_row_can_be_read_is_said(tmp_path):
    row = json.dumps(PAIR)
    digits = '{"prompt": "Hi", "chosen": "a", "rejected": "b", "n": ' + 5000 * "1" + "}\n"
    texts = {
        "pretty": json.dumps(PAIR, indent=1),
        "comma": row + ",\n",
        "two": row + row,
        "digits": digits,
    }
    reasons = {"pretty": "line 1 column 2: not valid JSON", "comma": "not valid JSON: Extra data"}
    reasons |= {
        "two": "not valid JSON: Extra data",
        "digits": "row 1: not valid JSON: a number of too many digits",
    }
    for name, text in texts.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text)
        with pytest.raises(
            UserError, match=rf"{name}\.jsonl: no row to read \(\d bad\)\n  .*{reasons[name]}"
        ):
            show(path)
    # the kind goes by the first row that is one
    (tmp_path / "late.jsonl").write_text("{\n" + row + "\n")
    assert show(tmp_path / "late.jsonl")["rows"] == "1 read, 1 bad"


def test_packed_files_go_by_what_is_in_them(tmp_path):
    packed = gzip.compress((json.dumps(PAIR) + "\n").encode())
    files = {"A.JSONL.GZ": packed, "twice.jsonl.gz": gzip.compress(packed), "once.jsonl": packed}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert show(tmp_path / "A.JSONL.GZ")["rows"] == "1 read, 0 bad"
    with pytest.raises(UserError, match="is compressed twice; unpack it once"):
        show(tmp_path / "twice.jsonl.gz")
    with pytest.raises(UserError, match=r"is compressed; name it once\.jsonl\.gz, or unpack it"):
        show(tmp_path / "once.jsonl")


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    loop, lost = tmp_path / "loop.jsonl", tmp_path / "lost.jsonl"
    loop.symlink_to(loop)
    lost.symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"loop\.jsonl: is a symbolic link to .*, which leads to no file$"
    ):
        load(str(loop), Prompt)
    with pytest.raises(UserError, match=r"is a symbolic link to .*nowhere, which leads to no file"):
        load(str(lost), Prompt)
    for name, reason in (("pipe.jsonl", "is a pipe or a device"), ("pipe.db", "is not a file")):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=reason):
            load(str(tmp_path / name), Prompt)


def test_a_group_in_two_splits_is_shown_and_not_loaded(tmp_path, capsys):
    path = write(
        tmp_path / "p.jsonl", [PAIR | {"split": "train"}, PAIR | {"chosen": "Ho", "split": "test"}]
    )
    with pytest.raises(UserError, match="is given more than one split"):
        load(path, Preference)
    found = show(path)
    assert (
        found["splits"][0].startswith("CANNOT BE USED: group ") and found["rows"] == "2 read, 0 bad"
    )
    assert found["splits"][2:] == ["train: 1 rows, 1 groups", "test: 1 rows, 1 groups"]
    assert "Ho" in capsys.readouterr().out


def test_a_store_whose_votes_make_no_pair_says_what_they_were(tmp_path, capsys):
    path = tmp_path / "votes.db"
    with Store.open(path, create=True) as store:
        prompt = store.add_prompt([ASK])
        pair = store.add_comparison(
            store.add_response(prompt, "Hello!"), store.add_response(prompt, "What?")
        )
        with pytest.raises(UserError, match=r"no row to read.*nobody has voted"):
            load(str(path), Preference)
        for name, choice in (("ann", "tie"), ("bob", "tie"), ("cem", "skip")):
            store.vote(pair, store.add_annotator(name), choice)
    reason = r"no row to read[\s\S]*none of its 3 votes prefers an answer \(tie 2, skip 1\)"
    freeze(path, tmp_path / "frozen.jsonl")
    # beside data with pairs it is a warning
    other = write(tmp_path / "pairs.jsonl", [PAIR])
    assert len(load([str(path), other], Preference)) == 1
    assert f"WARNING: {path}: none of its 3 votes prefers an answer" in capsys.readouterr().err
    for source in (path, tmp_path / "frozen.jsonl"):
        for read in (show, lambda path: load(str(path), Preference)):
            with pytest.raises(UserError, match=reason):
                read(source)
    assert show(path, "--kind", "prompt")["rows"] == "1 read, 0 bad"


def test_names_are_one_in_whatever_form_their_letters_come(tmp_path):
    rows = [
        PAIR | {"annotator": name, "prompt": str(i)}
        for i, name in enumerate(("Zoë", "Zoe\u0308", " Zoë "))
    ]
    assert {r.annotator for r in load(write(tmp_path / "p.jsonl", rows), Preference)} == {"Zoë"}
    with Store.open(tmp_path / "votes.db", create=True) as store:
        assert (
            len({store.add_annotator(name) for name in ("Zoë", "Zoe\u0308", " Zoë ", "Zoe")}) == 2
        )
        # as older versions wrote it
        store._db.execute("UPDATE annotators SET name = 'Zoe\u0308' WHERE name = 'Zoë'")
        assert store.add_annotator("Zoë") == 1 and len(store.annotators()) == 2


def test_data_in_the_output_folder_is_refused(tmp_path):
    rows = write(tmp_path / "metrics.jsonl", [{"prompt": "a", "response": "b"}])
    config = RunConfig(model_name_or_path="x", data=[rows], output_dir=str(tmp_path))
    with pytest.raises(UserError, match="is inside output_dir"):
        Run("sft", config, DistributedContext(), None).data.load(Instruction, "train")
