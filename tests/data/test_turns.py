"""Which tokens of a conversation are learnt: by hand, against TRL, and against one row a turn."""

import json
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from rlhf.data.encode import PLAIN_TEMPLATE, encode, encode_prompt, encode_response, sft_rows
from rlhf.data.load import load
from rlhf.data.records import Instruction
from rlhf.data.turns import turn_rows
from tests.conftest import make_model, make_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# roles and ends as tokens of their own, and no marks of what is generated
WORDS = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)
IDS = {"<pad>": 0, "</s>": 1, "<s>": 2, "<turn>": 3, "system": 4, "user": 5, "assistant": 6,
       "kind": 7, "hi": 8, "hello": 9, "lamp": 10, "red": 11, "yes": 12}  # fmt: skip
# SmolLM2's beginning: a system prompt where the conversation has none
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nthank you<|im_end|>\n' }}{% endif %}"
)


def words(template=WORDS):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel(IDS, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, **special, additional_special_tokens=["<turn>"]
    )
    tokenizer.chat_template = template
    return tokenizer


def with_template(template):
    """The tests' tokenizer under another template: a name of TRL's, or the text."""
    file = TEMPLATES / f"{template}.jinja"
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = file.read_text() if len(template) < 40 else template
    return tokenizer


def said(*texts, system=None):
    """Messages in which a user and the assistant take turns."""
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def instruction(messages):
    return Instruction(prompt=messages[:-1], response=messages[-1]["content"])


def learn(tokenizer, *conversations, prompt=500, response=60, train_on="all"):
    records = list(map(instruction, conversations))
    rows, dropped = encode(records, tokenizer, prompt, response, train_on=train_on)
    assert not dropped
    return turn_rows(rows, tokenizer, prompt, response, train_on)


def one_row_a_turn(tokenizer, messages):
    rows = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_prompt(tokenizer, messages[:number])
            answer = encode_response(tokenizer, message["content"])
            rows.append({"prompt_ids": prompt, "response_ids": answer})
    return sft_rows(rows)


DIALOGUE = said("hi", "hello", "red lamp", "yes yes", system="kind")


def test_every_turn_and_its_end_are_learnt_and_nothing_else():
    (row,) = learn(words(), DIALOGUE).rows
    # <s>system kind</s> <s>user hi</s> <s>assistant hello</s> <s>user red lamp</s> <s>assistant ...
    ids = [2, 4, 7, 1, 2, 5, 8, 1, 2, 6, 9, 1, 2, 5, 11, 10, 1, 2, 6, 12, 12, 1]
    labels = [-100] * 10 + [9, 1] + [-100] * 7 + [12, 12, 1]
    assert row == {"input_ids": ids, "labels": labels}


def test_the_last_turn_alone_is_learnt_where_that_is_asked_for():
    turns = learn(words(), DIALOGUE, train_on="last")
    assert turns.rows[0]["labels"] == [-100] * 19 + [12, 12, 1]
    assert (turns.learnt, dict(turns.left_out)) == (1, {"train_on is last": 1})


def test_where_a_turn_ends_otherwise_eos_is_learnt():
    """As in Gemma and Phi, whose turns do not end with the tokenizer's EOS."""
    other = words(WORDS.replace("'</s>'", "'<turn>'"))
    (row,) = learn(other, DIALOGUE[1:]).rows
    assert row["input_ids"] == [2, 5, 8, 3, 2, 6, 9, 3, 2, 5, 11, 10, 3, 2, 6, 12, 12, 1]
    assert row["labels"] == [-100] * 6 + [9, 1] + [-100] * 7 + [12, 12, 1]


def test_a_turn_that_is_shown_otherwise_later_gets_a_row_of_its_own():
    """Here the template drops from earlier turns all but their last word."""
    content = "(m['content'] if loop.last else m['content'].split()[-1])"
    other = words(WORDS.replace("m['content']", content))
    turns = learn(other, said("hi", "red lamp", "hi", "yes", "hi", "hello"))
    whole, own = turns.rows
    ids = [2, 5, 8, 1, 2, 6, 10, 1, 2, 5, 8, 1, 2, 6, 12, 1, 2, 5, 8, 1, 2, 6, 9, 1]
    assert whole["input_ids"] == ids
    assert whole["labels"] == [-100] * 14 + [12, 1] + [-100] * 6 + [9, 1]
    assert own == {
        "input_ids": [2, 5, 8, 1, 2, 6, 11, 10, 1],
        "labels": [-100] * 6 + [11, 10, 1],
    }
    assert (turns.learnt, turns.apart) == (3, 1)


THINKING = said("hi", "<think>\nlamp?\n</think>\n\nhello", "where?", "today", "help", "thank you")
PLAIN = said("where is it?", "on its way", "when?", "today. ", "ok", "thank you", system="be kind")


@pytest.mark.parametrize(
    ("template", "messages", "apart"),
    [
        (make_tokenizer().chat_template, PLAIN, 0),
        (DEFAULT_SYSTEM + make_tokenizer().chat_template, PLAIN[1:], 0),
        ("qwen2_5", PLAIN[1:], 0),  # a system prompt of its own
        ("qwen3", PLAIN, 0),
        ("qwen3", THINKING, 1),  # of earlier turns it leaves out what they thought
        ("llama3", PLAIN, 1),  # it strips the answer that ends with a space
        (PLAIN_TEMPLATE, PLAIN, 0),
    ],
)
def test_a_conversation_has_the_loss_of_one_row_a_turn(template, messages, apart):
    tokenizer = with_template(template)
    turns = learn(tokenizer, messages)
    assert (turns.learnt, turns.apart, turns.left_out.total()) == (3, apart, 0)
    assert len(turns.rows) == 1 + apart
    model = make_model(len(tokenizer), 0, 2).double()

    def loss(rows):
        total, tokens = 0.0, 0
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            tokens += int((labels != -100).sum())
        return total, tokens

    with torch.no_grad():
        ours, theirs = loss(turns.rows), loss(one_row_a_turn(tokenizer, messages))
    assert ours[1] == theirs[1] and ours[0] == pytest.approx(theirs[0], abs=1e-9)


def test_the_mask_is_trls_where_the_template_marks_what_is_generated(tmp_path):
    """TRL's rows go on to the line break after the last turn, which nobody learns."""
    tokenizer = make_tokenizer()
    arguments = SFTConfig(
        str(tmp_path), assistant_only_loss=True, max_length=None, use_cpu=True, bf16=False,
        report_to="none",
    )  # fmt: skip
    conversations = [PLAIN, said("hi", "hello"), said("help me", "yes", "how?", "today")]
    trainer = SFTTrainer(
        make_model(len(tokenizer), 0, 2),
        arguments,
        train_dataset=Dataset.from_list([{"messages": c} for c in conversations]),
        processing_class=tokenizer,
    )
    theirs, ours = trainer.train_dataset, learn(tokenizer, *conversations).rows
    assert len(theirs) == len(ours) == 3
    for their, our in zip(theirs, ours, strict=True):
        length = len(our["labels"])
        assert their["labels"][:length] == our["labels"]
        assert set(their["labels"][length:]) == {-100}
        assert their["input_ids"][:length] == our["input_ids"]


def test_a_special_token_that_somebody_types_ends_no_turn():
    tokenizer = make_tokenizer()
    (row,) = learn(tokenizer, said("a<|im_end|>b", "c<|im_end|>d", "e", "f")).rows
    assert sum(label == tokenizer.eos_token_id for label in row["labels"]) == 2
    assert tokenizer.decode([i for i in row["labels"] if i != -100]).startswith("c<|im_end|>d")


def test_tool_calls_are_learnt_as_the_template_writes_them():
    tokenizer = with_template("qwen2_5")
    call = {"type": "function", "function": {"name": "find", "arguments": {"id": 7}}}
    tool = {"type": "function", "function": {"name": "find", "parameters": {}}}
    messages = [
        {"role": "user", "content": "where is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "on its way"},
        {"role": "assistant", "content": "today"},
    ]
    record = Instruction(prompt=messages[:-1], response="today", metadata={"tools": [tool]})
    rows, _ = encode([record], tokenizer, 999, 99)
    turns = turn_rows(rows, tokenizer, 999, 99)
    (row,) = turns.rows
    learnt = tokenizer.decode([label for label in row["labels"] if label != -100])
    wanted = '<tool_call>\n{"name": "find", "arguments": {"id": 7}}\n</tool_call><|im_end|>'
    assert learnt == wanted + "today<|im_end|>" and turns.learnt == 2


def test_turns_of_weight_0_and_empty_ones_are_not_learnt(tmp_path):
    messages = said("hi", "hello", "lamp", "red", "lamp", "", "lamp", "yes")
    messages[1]["weight"], messages[3]["weight"] = 0, 1
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    rows, _ = encode(load(str(file), Instruction), words(), 99, 99)
    turns = turn_rows(rows, words(), 99, 99)
    assert [label for label in turns.rows[0]["labels"] if label != -100] == [11, 1, 12, 1]


def test_what_cannot_be_learnt_is_counted():
    greeting = [{"role": "assistant", "content": "hello"}, *said("hi", "yes yes yes", "hi", "yes")]
    turns = learn(words(), greeting, response=3)
    assert turns.learnt == 1 and turns.left_out == {
        "field 'messages': begins with the assistant, which has no prompt to answer": 1,
        "response longer than max_response_length 3 tokens": 1,
    }


def test_a_conversation_that_is_too_long_ends_with_the_last_turn_that_fits():
    messages = said("hi", "hello", "lamp", "yes", "hi", "red red red")
    # prompts of 6, 14 and 22 tokens
    (row,) = learn(words(), messages, prompt=21).rows
    assert row["input_ids"] == [2, 5, 8, 1, 2, 6, 9, 1, 2, 5, 10, 1, 2, 6, 12, 1]
    assert row["labels"] == [-100] * 6 + [9, 1] + [-100] * 6 + [12, 1]
    assert learn(words(), messages, prompt=13).rows[0]["input_ids"] == [2, 5, 8, 1, 2, 6, 9, 1]
    rows, dropped = encode([instruction(messages)], words(), 21, 60)
    assert not rows and dropped == {"prompt longer than max_prompt_length 21 tokens": 1}


def test_rows_that_are_beginnings_of_others_are_counted():
    long = said("hi", "hello", "lamp", "yes", "hi", "red")
    turns = learn(words(), long, long[:4], long[:2], said("lamp", "hello"))
    assert (turns.learnt, turns.repeated) == (7, 2)
