import json
import math
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from rlhf.data.export import ExportConfig, check_output, export, rows_of, write_rows
from rlhf.data.load import load
from rlhf.data.records import Instruction, Labelled, Preference, Prompt, RecordError
from rlhf.errors import UserError

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Where is\nmy parcel? ☂"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]


def pairs(prompt=TURNS):
    return [
        Preference(prompt=prompt, chosen="On Monday.", rejected="No \"idea\".", margin=0.5, label_prob=0.75, weight=2.0,
                   voice="v", annotator="ann", group="g", split="test", source="s", chosen_ended=False,
                   metadata={"a": {"b": [1]}}),
        Preference(prompt=prompt[-1:], chosen="x\n\ny", rejected="z", group="h", split="train", metadata={"c": 1}),
    ]  # fmt: skip


def texts(records):
    return [(r.prompt, r.chosen, r.rejected) for r in records]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_come_back_whole(tmp_path, suffix):
    path = tmp_path / f"pairs{suffix}"
    write_rows(rows_of(pairs(SYSTEM)), path)
    found = load(str(path), Preference)
    expected = pairs(SYSTEM)
    expected[1].source = str(path)
    assert found == expected


@pytest.mark.parametrize(("form", "prompt"), [("hh", TURNS), ("openai", SYSTEM)])
def test_texts_come_back_from_other_forms(tmp_path, form, prompt):
    path = tmp_path / "pairs.jsonl"
    write_rows(rows_of(pairs(prompt), form), path)
    assert texts(load(str(path), Preference)) == texts(pairs(prompt))


def test_the_forms_are_those_of_the_others():
    (row, _) = rows_of(pairs(SYSTEM), "openai")
    assert (
        set(row) == {"input", "preferred_output", "non_preferred_output"}
        and row["input"]["messages"] == SYSTEM
    )
    assert row["preferred_output"] == [{"role": "assistant", "content": "On Monday."}]
    (row, _) = rows_of(pairs(), "hh")
    expected = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Where is\nmy parcel? ☂\n\nAssistant: On Monday."
    assert set(row) == {"chosen", "rejected"} and row["chosen"] == expected
    (row, _) = rows_of(pairs())
    assert row["prompt"] == TURNS and row["chosen"] == [
        {"role": "assistant", "content": "On Monday."}
    ]


def test_a_pair_becomes_two_unpaired_rows(tmp_path):
    path = tmp_path / "kto.parquet"
    write_rows(rows_of(pairs(), "unpaired"), path)
    found = load(str(path), Labelled)
    assert [(r.response, r.label, r.group) for r in found] == [
        ("On Monday.", True, "g"),
        ('No "idea".', False, "g"),
        ("x\n\ny", True, "h"),
        ("z", False, "h"),
    ]
    assert rows_of(found, "unpaired")[0]["completion"] == [
        {"role": "assistant", "content": "On Monday."}
    ]


def test_instructions_prompts_and_labelled_rows_come_back(tmp_path):
    records = [Instruction(prompt=SYSTEM, response="On Monday.", group="g", split="train")]
    for form in ("rows", "openai"):
        write_rows(rows_of(records, form), tmp_path / "i.jsonl")
        (found,) = load(str(tmp_path / "i.jsonl"), Instruction)
        assert (found.prompt, found.response) == (SYSTEM, "On Monday.")
    write_rows(rows_of([Prompt(prompt=SYSTEM)]), tmp_path / "p.jsonl")
    assert load(str(tmp_path / "p.jsonl"), Prompt)[0].prompt == SYSTEM


@pytest.mark.parametrize(
    "prompt",
    [
        SYSTEM,
        [{"role": "user", "content": "a"}, *TURNS],
        [{"role": "user", "content": "a\n\nAssistant: b"}],
    ],
)
def test_hh_refuses_what_it_cannot_hold(prompt):
    with pytest.raises(UserError, match="Use another form"):
        rows_of(pairs(prompt)[:1], "hh")


def test_hh_holds_texts_but_for_white_space_around_them(tmp_path):
    rows = rows_of([Preference(prompt=TURNS[:1], chosen=" On Monday.\n", rejected="No.\n")], "hh")
    assert rows == [
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: On Monday.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
        }
    ]


def test_what_parquet_brings_is_written_as_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    row = {
        "prompt": "q",
        "chosen": "x",
        "rejected": "y",
        "when": datetime(2026, 1, 2, 3, tzinfo=UTC),
        "cost": Decimal("1.50"),
        "raw": b"hi",
        "score": math.nan,
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "in.parquet")
    for suffix in (".jsonl", ".parquet"):
        output = tmp_path / f"out{suffix}"
        export(ExportConfig(source=[str(tmp_path / "in.parquet")], output=str(output)))
        (found,) = load(str(output), Preference)
        assert found.metadata == {
            "when": "2026-01-02T03:00:00+00:00",
            "cost": "1.50",
            "raw": "aGk=",
            "score": None,
        }
    assert "NaN" not in (tmp_path / "out.jsonl").read_text()


def test_numbers_of_too_many_digits(tmp_path):
    row = '{"prompt": "q", "chosen": "x", "rejected": "y"%s}'
    (tmp_path / "a.jsonl").write_text(row % "" + "\n" + row % (', "n": 1' + "0" * 5000) + "\n")
    with pytest.raises(UserError, match="row 2: not valid JSON: a number of too many digits"):
        load(str(tmp_path / "a.jsonl"), Preference)
    (tmp_path / "a.json").write_text("[" + row % (', "n": 1' + "0" * 5000) + "]")
    with pytest.raises(UserError, match="not valid JSON: a number of too many digits"):
        load(str(tmp_path / "a.json"), Preference)


def test_openai_chat_as_it_comes(tmp_path):
    rows = [
        {"messages": [{"role": "developer", "content": "Be brief."},
                      {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]},
                      {"role": "assistant", "content": "Hello!", "weight": 1}]},
        {"input": {"messages": [{"role": "user", "content": "Hi"}], "tools": [], "parallel_tool_calls": True},
         "preferred_output": [{"role": "assistant", "content": "Hello!"}],
         "non_preferred_output": [{"role": "assistant", "content": "What?"}]},
    ]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text(json.dumps(rows[0]))
    (chat,) = load(str(tmp_path / "chat.jsonl"), Instruction)
    assert [m["role"] for m in chat.prompt] == ["system", "user"] and chat.prompt[1][
        "content"
    ] == "Hi you"
    (tmp_path / "dpo.jsonl").write_text(json.dumps(rows[1]))
    (pair,) = load(str(tmp_path / "dpo.jsonl"), Preference)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.metadata) == (
        TURNS[:1],
        "Hello!",
        "What?",
        {},
    )
    assert load(str(tmp_path / "dpo.jsonl"), Prompt)[0].prompt == TURNS[:1]
    assert load(str(tmp_path / "dpo.jsonl"), Instruction)[0].response == "Hello!"


def test_an_answer_of_weight_zero_is_not_imitated():
    from rlhf.data.schemas import read_row

    answer = [{"role": "assistant", "content": "x", "weight": 0}]
    for row in (
        {"messages": TURNS[:1] + answer},
        {"completion": TURNS[:1] + answer},
        {"prompt": TURNS[:1], "completion": answer},
        {"prompt": TURNS[:1], "chosen": answer, "rejected": [{**answer[0], "content": "y"}]},
    ):
        with pytest.raises(RecordError, match="weight 0"):
            read_row(row, Instruction)


def test_the_command_and_what_it_refuses(tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    write_rows(rows_of(pairs()), data)
    (tmp_path / "folder.jsonl").mkdir()
    before = data.read_bytes()
    export(ExportConfig(source=[str(data)], output=str(tmp_path / "kto.jsonl"), form="unpaired"))
    assert "4 rows (unpaired) of 2 Preference records" in capsys.readouterr().out
    for output, message in (
        (data, "one of the files that are read"),
        (tmp_path / "folder.jsonl", "is a folder"),
        (tmp_path / "x.csv", "expected a file that ends in .jsonl or .parquet"),
        (tmp_path / "none" / "x.jsonl", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            check_output(str(output), [str(data)])
    (tmp_path / "link.jsonl").symlink_to(data)
    with pytest.raises(UserError, match="one of the files that are read"):
        check_output(str(tmp_path / "link.jsonl"), [str(data)])
    assert data.read_bytes() == before
    # an error of the system, as on a full disk
    for name in ("x" * 246 + ".jsonl", "x" * 246 + ".parquet"):
        with pytest.raises(UserError, match=r"cannot be written (?s:.*)File name too long"):
            export(ExportConfig(source=[str(data)], output=str(tmp_path / name)))
