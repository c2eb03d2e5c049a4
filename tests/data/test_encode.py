import json
from dataclasses import replace

import pytest

from rlhf.data.encode import (
    PLAIN_TEMPLATE,
    decode_response,
    encode,
    encode_prompt,
    encode_prompts,
    encode_response,
    sft_rows,
    tokenizer_fingerprint,
)
from rlhf.data.load import fingerprint, load
from rlhf.data.records import Instruction, Preference, Prompt
from rlhf.errors import UserError
from rlhf.options.shared import RunConfig
from rlhf.ranks.distributed import DistributedContext
from rlhf.runs.model_card import write_card
from rlhf.runs.run import Run
from tests.conftest import make_tokenizer

ASK = [{"role": "user", "content": "where is my parcel?"}]


def test_a_prompt_ends_where_the_assistant_begins(tokenizer):
    text = tokenizer.decode(encode_prompt(tokenizer, ASK))
    assert text == "<|im_start|>user\nwhere is my parcel?<|im_end|>\n<|im_start|>assistant\n"


def test_a_response_ends_with_eos_and_nothing_after(tokenizer):
    ids = encode_response(tokenizer, "on its way")
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert encode_response(tokenizer, "on its way", ended=False) == ids[:-1]
    assert decode_response(tokenizer, ids) == "on its way"


def test_special_tokens_typed_by_a_user_stay_text(tokenizer):
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "a<|im_end|>b"}])
    plain = encode_prompt(tokenizer, [{"role": "user", "content": "ab"}])
    assert ids.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id)
    assert encode_response(tokenizer, "x<|im_end|>y").count(tokenizer.eos_token_id) == 1


def test_the_template_of_a_whole_conversation_is_prompt_and_response(tokenizer):
    whole = tokenizer.apply_chat_template(
        [*ASK, {"role": "assistant", "content": "yes"}], return_dict=False
    )
    ids = encode_prompt(tokenizer, ASK) + encode_response(tokenizer, "yes")
    assert whole[: len(ids)] == ids


def test_labels_cover_the_response_and_its_eos_alone(tokenizer):
    encoded, _ = encode([Instruction(prompt=ASK, response="yes")], tokenizer, 99, 99)
    (row,) = sft_rows(encoded)
    prompt, response = encode_prompt(tokenizer, ASK), encode_response(tokenizer, "yes")
    assert row == {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}


def test_a_cut_off_answer_gets_no_eos_in_pairs(tokenizer):
    pair = Preference(prompt=ASK, chosen="yes", rejected="no no no", rejected_ended=False)
    ((row,), _) = encode([pair], tokenizer, 99, 99)
    assert row["chosen_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in row["rejected_ids"]


def test_rows_that_are_too_long_are_dropped_and_counted(tokenizer, capsys):
    records = [
        Instruction(prompt=ASK, response="yes"),
        Instruction(prompt=ASK, response="no " * 50),
    ]
    records += [Instruction(prompt=[{"role": "user", "content": "where " * 99}], response="no")]
    rows, dropped = encode(records, tokenizer, 99, 20)
    assert [row["record"] for row in rows] == records[:1]
    reasons = (
        "response longer than max_response_length 20 tokens",
        "prompt longer than max_prompt_length 99 tokens",
    )
    assert dropped == dict.fromkeys(reasons, 1)
    long = Prompt(prompt=records[2].prompt)
    assert len(encode_prompts([Prompt(prompt=ASK), long], tokenizer, 99)) == 1
    assert f"1 of 2 prompts dropped (1: {reasons[1]})" in capsys.readouterr().err
    with pytest.raises(
        UserError,
        match=r"all 1 prompts are dropped .1: prompt longer than max_prompt_length 3 tokens",
    ):
        encode_prompts([Prompt(prompt=ASK)], tokenizer, 3)


def made_run(tmp_path, long, short, split="train", bad=0, **options):
    """A run of SFT on so many instructions whose prompts are too long, and that fit, and bad rows."""
    rows = [
        {"prompt": f"{i} " + "where " * 99, "response": "a", "split": split} for i in range(long)
    ]
    rows += [{"prompt": f"q{i}", "response": "a", "split": split} for i in range(short)]
    rows += [{"prompt": "q", "response": "", "split": split}] * bad
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(
        model_name_or_path="x",
        data=[str(path)],
        output_dir=str(tmp_path / "run"),
        max_prompt_length=50,
    )
    config = replace(config, validation_fraction=0.0, **options)
    return Run("sft", config, DistributedContext(), None)


def test_dropped_rows_are_counted_by_split_and_reason_and_are_not_in_the_fingerprint(
    tmp_path, tokenizer, capsys
):
    run = made_run(tmp_path, long=1, short=8, bad=1, on_error="skip")
    rows = run.data.rows(Instruction, "train", tokenizer)
    assert len(rows) == 8
    reason = "prompt longer than max_prompt_length 50 tokens"
    assert run.data.row_counts == {
        "instruction/every split": {
            "read": 10,
            "used": 9,
            "dropped": {"field 'response': is empty": 1},
        },
        "instruction/train": {"read": 9, "used": 8, "dropped": {reason: 1}},
    }
    assert run.data.fingerprints == {
        "instruction/train": fingerprint([row["record"] for row in rows])
    }
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(
        "1 of 10 instruction rows of every split are dropped (1: field 'response': is empty)"
    )
    assert "WARNING" not in said[0]  # not more than a tenth
    assert said[1].startswith(
        f"sft: WARNING: {tmp_path}/rows.jsonl: 1 of 9 instruction rows of train are dropped (1: "
    )
    write_card(
        tmp_path, "sft", {}, {"data": run.data.fingerprints, "rows": run.data.row_counts}, {}
    )
    card = (tmp_path / "README.md").read_text()
    assert (
        f"| instruction/train | 9 | 8 | 1: {reason} | {run.data.fingerprints['instruction/train']} |"
        in card
    )


def test_more_dropped_rows_than_allowed_stop_training_but_not_evaluation(tmp_path, tokenizer):
    with pytest.raises(
        UserError,
        match=r"3 of 5 instruction rows of train .* more than max_dropped 0.5.*_dropped 1",
    ):
        made_run(tmp_path, long=3, short=2).data.rows(Instruction, "train", tokenizer)
    assert len(made_run(tmp_path, long=2, short=2).data.rows(Instruction, "train", tokenizer)) == 2
    assert (
        len(
            made_run(tmp_path, long=3, short=2, max_dropped=0.6).data.rows(
                Instruction, "train", tokenizer
            )
        )
        == 2
    )
    with pytest.raises(
        UserError, match=r"3 of 5 instruction rows of every split are dropped .3: field 'response'"
    ):
        made_run(tmp_path, long=0, short=2, bad=3, on_error="skip").data.rows(
            Instruction, "train", tokenizer
        )
    with pytest.raises(UserError, match="Nothing is left to train on"):
        made_run(tmp_path, long=3, short=0, max_dropped=1.0).data.rows(
            Instruction, "train", tokenizer
        )
    assert (
        made_run(tmp_path, long=3, short=0, split="validation").data.rows(
            Instruction, "validation", tokenizer
        )
        == []
    )


def test_the_share_of_unknown_tokens_is_said(capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "</s>": 1, "yes": 2, "no": 3}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    yes = [{"role": "user", "content": "yes yes yes"}]
    encode([Instruction(prompt=yes, response="no")], tokenizer, 99, 99)
    assert capsys.readouterr().err == ""
    # yes yes yes, no </s>, <unk> </s>: one of seven
    row = Preference(prompt=yes, chosen="no", rejected="perhaps")
    encode([row], tokenizer, 99, 99)
    assert (
        "14 % of the tokens of 1 preference rows are unknown to the tokenizer (<unk>)"
        in capsys.readouterr().err
    )
    encode_prompts(
        [Prompt(prompt=yes), Prompt(prompt=[{"role": "user", "content": "oh"}])], tokenizer, 99
    )
    assert "25 % of the tokens of 2 prompt rows" in capsys.readouterr().err


def test_a_model_without_template_gets_the_plain_one(tokenizer):
    other = make_tokenizer()
    other.chat_template = PLAIN_TEMPLATE
    text = other.decode(encode_prompt(other, [{"role": "system", "content": "Be kind."}, *ASK]))
    assert text == "Be kind.\nUser: where is my parcel?\nAssistant:"
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(make_tokenizer()) == tokenizer_fingerprint(tokenizer)


def test_a_prompt_that_the_template_refuses_is_a_bad_row(tokenizer, tmp_path):
    other = make_tokenizer()
    refuse = "{{ raise_exception('System role not supported') }}"
    other.chat_template = (
        "{% if messages[0]['role'] == 'system' %}"
        + refuse
        + "{% endif %}"
        + tokenizer.chat_template
    )
    system = [{"role": "system", "content": "Be kind."}, *ASK]
    answer = [{"role": "assistant", "content": "yes"}]
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "\n".join(json.dumps({"messages": [*asked, *answer]}) for asked in (ASK, system))
    )
    records = load(str(file), Instruction)
    with pytest.raises(
        UserError, match=r"rows.jsonl row 2: .*refused by the chat template \(System role not supp"
    ):
        encode(records, other, 99, 99)
    rows, dropped = encode(records, other, 99, 99, on_error="skip")
    assert len(rows) == 1 and dropped.total() == 1
    same = replace(records[0])  # read from nowhere
    assert records[0].place and not same.place and fingerprint(records[:1]) == fingerprint([same])
