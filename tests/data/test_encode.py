import pytest

from rlhf.config import UserError
from rlhf.data.encode import (
    PLAIN_TEMPLATE,
    decode_response,
    encode_instructions,
    encode_preferences,
    encode_prompt,
    encode_prompts,
    encode_response,
    tokenizer_fingerprint,
)
from rlhf.data.records import Instruction, Preference, Prompt
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
    whole = tokenizer.apply_chat_template([*ASK, {"role": "assistant", "content": "yes"}], return_dict=False)
    ids = encode_prompt(tokenizer, ASK) + encode_response(tokenizer, "yes")
    assert whole[: len(ids)] == ids


def test_labels_cover_the_response_and_its_eos_alone(tokenizer):
    (row,) = encode_instructions([Instruction(prompt=ASK, response="yes")], tokenizer, 99, 99)
    prompt, response = encode_prompt(tokenizer, ASK), encode_response(tokenizer, "yes")
    assert row == {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}


def test_a_cut_off_answer_gets_no_eos_in_pairs(tokenizer):
    pair = Preference(prompt=ASK, chosen="yes", rejected="no no no", rejected_ended=False)
    (row,) = encode_preferences([pair], tokenizer, 99, 99)
    assert row["chosen_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in row["rejected_ids"]


def test_rows_that_are_too_long_are_dropped_and_counted(tokenizer, capsys):
    rows = [Instruction(prompt=ASK, response="yes"), Instruction(prompt=ASK, response="no " * 50)]
    assert len(encode_instructions(rows, tokenizer, 99, 20)) == 1
    assert "1 of 2 instructions dropped: longer than max_prompt_length 99" in capsys.readouterr().err
    with pytest.raises(UserError, match="all 1 prompts are longer than max_prompt_length 3"):
        encode_prompts([Prompt(prompt=ASK)], tokenizer, 3)


def test_a_model_without_template_gets_the_plain_one(tokenizer):
    other = make_tokenizer()
    other.chat_template = PLAIN_TEMPLATE
    text = other.decode(encode_prompt(other, [{"role": "system", "content": "Be kind."}, *ASK]))
    assert text == "Be kind.\nUser: where is my parcel?\nAssistant:"
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(make_tokenizer()) == tokenizer_fingerprint(tokenizer)
