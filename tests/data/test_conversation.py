import csv
import json

import numpy as np
import pytest

from rlhf.data.conversation import conversation, parse_turns
from rlhf.data.describe import DescribeConfig, describe
from rlhf.data.encode import PLAIN_TEMPLATE, encode, encode_prompt
from rlhf.data.export import rows_of, write_rows
from rlhf.data.load import load, read_table, unique_prompts
from rlhf.data.records import Instruction, Preference, Prompt, RecordError, prompt_group, tools_of
from rlhf.errors import UserError
from tests.conftest import make_tokenizer

ASK = {"role": "user", "content": "Hi"}
# what a repr and NumPy's blanks could break
SAY = {"role": "assistant", "content": 'It\'s {a} {b}\n"so"'}
HUH = {"role": "assistant", "content": "What?"}
SYSTEM = {"role": "system", "content": "Be brief"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def one(tmp_path, row, kind):
    [record] = load(
        write(tmp_path / "one.jsonl", [row]), kind, validation_fraction=0, test_fraction=0
    )
    return record


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (
            "User: Hi\nAssistant: Yes?\nUser: Go\nAssistant:",
            ["user Hi", "assistant Yes?", "user Go", "assistant "],
        ),
        ("USER: Hi\nASSISTANT: Yes?\nUSER: Go", ["user Hi", "assistant Yes?", "user Go"]),
        ("### Human: Hi\n### Assistant: Yes?", ["user Hi", "assistant Yes?"]),
        (
            "\n\nHuman: Hi\n\nAI: a\nHuman: b\n\nHuman: Go",
            ["user Hi", "assistant a\nHuman: b", "user Go"],
        ),
        # two fixed speakers
        ("User: Hi\nBot: a\nAI: b\nUser: Go", ["user Hi", "assistant a\nAI: b", "user Go"]),
        ("Assistant: Welcome!\nUser: Hi", ["assistant Welcome!", "user Hi"]),
        (
            "System: Be brief\nUser: Hi\nAssistant: Yes?",
            ["system Be brief", "user Hi", "assistant Yes?"],
        ),
        ("Be brief.\n\nUser: Hi\nAssistant:", ["system Be brief.", "user Hi", "assistant "]),
        ("Rate this chat.\nUser: Hi\nAssistant: Yes?", None),  # no conversation to go on with
        ("User: Hi", None),
        ("What does a User: and an Assistant: do?", None),
        ("English: Hi\nFrench: Salut\nEnglish: Go\nFrench:", None),
    ],
)
def test_transcripts_of_two_known_speakers_are_turns(text, turns):
    found = parse_turns(text)
    assert (found and [f"{m['role']} {m['content']}" for m in found]) == turns


def test_transcripts_of_one_conversation_stay_in_one_split(tmp_path):
    # each question alone, and each with a second turn: one group by the first user turn
    short = [{"prompt": f"question {i}", "response": "a"} for i in range(100)]
    long = [
        {"prompt": f"User: question {i}\nAssistant: a\nUser: more?\nAssistant:", "response": "b"}
        for i in range(100)
    ]
    records = load(write(tmp_path / "t.jsonl", short + long), Instruction)
    assert sum(a.split != b.split for a, b in zip(records[:100], records[100:], strict=True)) == 0
    assert len({r.split for r in records}) == 3
    assert [m["content"] for m in records[100].prompt] == ["question 0", "a", "more?"]
    assert records[100].group == prompt_group([{"role": "user", "content": "question 0"}])


def as_numpy(messages):
    array = np.empty(len(messages), object)
    array[:] = messages
    return array


FORMS = {
    "JSON": json.dumps,
    "repr": repr,
    "NumPy": lambda messages: str(as_numpy(messages)),
    "NumPy's repr": lambda messages: repr(as_numpy(messages)),
    "columns": lambda messages: {key: [m[key] for m in messages] for key in messages[0]},
    "ShareGPT": lambda messages: [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
        for m in messages
    ],
    "one dict": lambda messages: messages[0] if len(messages) == 1 else messages,
}


@pytest.mark.parametrize("form", FORMS)
def test_lists_of_messages_are_read_however_they_are_written(form):
    for messages in ([ASK], [ASK, SAY], [SAY, ASK, HUH]):
        assert conversation("prompt", FORMS[form](messages)) == messages


def test_lists_as_text_are_read_in_every_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"prompt": form([ASK]), "chosen": form([ASK, SAY]), "rejected": form([HUH])}
        for form in (FORMS["JSON"], FORMS["repr"], FORMS["NumPy"])
    ]
    write(tmp_path / "p.jsonl", rows)
    with open(tmp_path / "p.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    for name in ("p.jsonl", "p.csv", "p.parquet"):
        pairs = load(f"{tmp_path}/{name}", Preference)
        assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [
            ([ASK], SAY["content"], "What?")
        ] * 3
    messages = [
        {"messages": form([ASK, HUH])} for form in (FORMS["JSON"], FORMS["repr"], FORMS["NumPy"])
    ]
    found = load(write(tmp_path / "m.jsonl", messages), Instruction)
    assert [(r.prompt, r.response) for r in found] == [([ASK], "What?")] * 3


def test_a_list_that_is_cut_off_is_a_bad_row_and_other_text_stays_text(tmp_path):
    for text in (
        json.dumps([ASK, HUH])[:-5],
        repr([ASK, HUH])[:-5],
        "[{'role': 'user', 'content': open('x')}]",
    ):
        with pytest.raises(RecordError, match="list of messages as text, but neither whole JSON"):
            conversation("response", text)
    answers = [
        '{"role": "user", "name": "Ann"}',
        '[{"from": "Rome", "value": 3}]',
        '[{"role": "admin"}]',
        "[{}",
    ]
    answers += [
        '{"messages": [{"role": "user", "content": "x"}]}',
        "User: Hi\nAssistant: Hello",
        "{'role': 'user', ",
    ]
    for answer in answers:  # one that is asked for such things
        assert (
            one(tmp_path, {"prompt": "Write it", "response": answer}, Instruction).response
            == answer
        )


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
def test_columns_of_conversations_under_their_usual_names(tmp_path, column):
    turns = FORMS["ShareGPT"]([ASK, HUH])
    record = one(
        tmp_path, {column: [{"from": "system", "value": "Be brief"}, *turns], "id": 1}, Instruction
    )
    assert (record.prompt, record.response, record.metadata) == ([SYSTEM, ASK], "What?", {"id": 1})
    assert one(tmp_path, {column: turns}, Prompt).prompt == [ASK]


def test_sharegpt_pairs_and_the_history_of_alpaca(tmp_path):
    human, gpt = (
        {"from": name, "value": text} for name, text in (("human", "Hi"), ("gpt", "What?"))
    )
    row = {"conversations": [human], "chosen": {"from": "gpt", "value": "Hello!"}, "rejected": gpt}
    pair = one(tmp_path, row, Preference)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.metadata) == (
        [ASK],
        "Hello!",
        "What?",
        {},
    )
    row = {"instruction": "And", "input": "", "output": "x", "history": [["Hi", "What?"]]}
    record = one(tmp_path, row, Instruction)
    assert record.prompt == [ASK, HUH, {"role": "user", "content": "And"}] and record.metadata == {}
    with pytest.raises(UserError, match="'history': expected a list"):
        one(tmp_path, row | {"history": ["Hi"]}, Instruction)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALLED = [
    ASK,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "21 C", "name": "weather"},
]
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}{{ t['function']['name'] }};{% endfor %}"
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['arguments'] | tojson }}{% endfor %}|{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_tools_calls_and_results_go_to_the_chat_template(tmp_path):
    # OpenAI's text
    call = {"function": CALL["function"] | {"arguments": '{"city": "Rome"}'}, "type": "function"}
    messages = [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}, CALLED[2], HUH]
    for tools in ([TOOL], json.dumps([TOOL]), [TOOL["function"]]):
        record = one(tmp_path, {"messages": messages, "tools": tools}, Instruction)
        assert record.prompt == CALLED and record.metadata == {"tools": [TOOL]} == {
            "tools": tools_of(record)
        }
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    text = tokenizer.decode(encode_prompt(tokenizer, record.prompt, tools_of(record)))
    assert text == 'weather;user:Hi|assistant:{"city": "Rome"}|tool:21 C|assistant:'
    other = Instruction(
        prompt=record.prompt, response="x", metadata={"tools": [{"function": {"name": "else"}}]}
    )
    assert len(unique_prompts([record, other])) == 2  # the same messages, another question
    lamp = [
        *CALLED[:1],
        {**CALLED[1], "tool_calls": [{"function": {"name": "lamp", "arguments": {}}}]},
        CALLED[2],
    ]
    both = [{"messages": [*prompt, HUH]} for prompt in (CALLED, lamp)]
    summary = describe(DescribeConfig(source=[write(tmp_path / "two.jsonl", both)]))
    assert summary["duplicates"] == "0 rows repeat another's texts; 2 different prompts"
    for form, name in (("rows", "r.jsonl"), ("rows", "r.parquet"), ("openai", "o.jsonl")):
        write_rows(rows_of([record], form), tmp_path / name)
        (again,) = load(f"{tmp_path}/{name}", Instruction, validation_fraction=0, test_fraction=0)
        assert (again.prompt, tools_of(again)) == (record.prompt, [TOOL])


@pytest.mark.parametrize(
    ("prompt", "tools", "what"),
    [
        ([ASK], [TOOL], "tools"),
        ([*CALLED[:2], ASK], None, "tool calls"),
        ([ASK, CALLED[2]], None, "tool results"),
    ],
)
def test_a_template_without_a_place_for_them_is_no_way_to_read_the_row(prompt, tools, what):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    records = [
        Prompt(prompt=prompt, metadata={"tools": tools} if tools else {}),
        Prompt(prompt=[ASK]),
    ]
    with pytest.raises(
        UserError, match=f"begins 'Hi'.* has {what}, for which this model's chat template has"
    ):
        encode(records, tokenizer, 99)
    rows, dropped = encode(records, tokenizer, 99, on_error="skip")
    assert [row["record"] for row in rows] == records[1:] and sum(dropped.values()) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [ASK, HUH | {"tool_calls": [CALL]}]}, "an answer that calls a tool"),
        (
            {"messages": [ASK, HUH | {"reasoning_content": "hm"}]},
            "an answer that has 'reasoning_content'",
        ),
        ({"messages": [ASK, HUH | {"thinking": "hm"}]}, "an answer that has 'thinking'"),
        (
            {"messages": [ASK | {"images": ["a.png"]}, HUH]},
            "message 0 has 'images', which cannot be read",
        ),
        (
            {"messages": [ASK, HUH | {"function_call": {"name": "f"}}]},
            "message 1 has 'function_call'",
        ),
        (
            {"messages": [ASK | {"content": [{"type": "image_url"}]}, HUH]},
            "message 0 has content .*, expected text",
        ),
        (
            {"messages": [ASK, HUH | {"tool_calls": [{}]}, HUH]},
            "message 1 has a tool call without a function's name",
        ),
        ({"messages": [ASK, HUH | {"role": "narrator"}]}, "role 'narrator', expected"),
        (
            {"prompt": "<image>What is it?", "response": "x", "images": ["a.png"]},
            "'images': cannot be read here",
        ),
        (
            {"prompt": "<image>What is it?", "response": "x", "image": "a.png"},
            "'image': cannot be read here",
        ),
        (
            {"prompt": "Hi", "response": "x", "tools": '[{"name": '},
            "'tools': is a list that is not whole JSON",
        ),
        (
            {"prompt": "Hi", "response": "x", "tools": [{"x": 1}]},
            "'tools': has an entry without a function's name",
        ),
        (
            {"prompt": "Hi", "response": "x", "functions": [{"name": "f"}]},
            "'functions': is not read",
        ),
    ],
)
def test_what_cannot_be_read_is_a_bad_row(tmp_path, row, reason):
    with pytest.raises(UserError, match=reason):
        one(tmp_path, row, Instruction)


def test_columns_that_only_have_the_name_are_metadata(tmp_path):
    about = {"tools": "hammer, saw", "image": "a.png", "history": "old"}
    assert one(tmp_path, {"prompt": "Hi", "response": "x"} | about, Instruction).metadata == about


def test_what_may_be_meant_otherwise_is_counted_aloud(tmp_path, capsys):
    rows = [
        {"prompt": "Customer: Hi\nAgent: Yes?\nCustomer: Go\nAgent: ok", "response": "x"},
        {"prompt": "Rate this.\nUser: Hi\nAssistant: Yes?\nUser: Go", "response": "x"},
        # worked examples
        {"prompt": "Input: Hi\nOutput: Yes?\nInput: Go\nOutput:", "response": "x"},
        {"prompt": "<|im_start|>user\nHi", "response": "x"},
        {"prompt": "Hi", "response": "x", "earlier": [ASK, HUH]},
        {"prompt": "Hi", "response": "x", "earlier": json.dumps([ASK, HUH])},
        {"messages": [ASK | {"name": "ann"}, HUH | {"reasoning": "hm"}, ASK, HUH]},
    ]
    path = write(tmp_path / "n.jsonl", rows)
    found = {
        "a prompt looks like a transcript, and is read as one turn": 2,
        "a text holds control tokens of a chat template, which are read as plain text": 1,
        "column 'earlier' looks like a conversation and is not read; it stays in the metadata": 2,
        "'name' of messages is not read": 1,
        "reasoning of an earlier turn goes to the chat template, which may leave it out": 1,
    }
    assert read_table(path, Instruction).notes == found
    load(path, Instruction)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and lines[0].startswith(f"{path}: WARNING: 2 rows: a prompt looks like")
