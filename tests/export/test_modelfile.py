"""Chat templates in Go's language, interpreted here as Ollama would."""

import copy
import re

import pytest

from rlhf.export.gguf_file import go_template, modelfile

QUEER = "{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}"
WITH_DEFAULT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe it<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
TALKS = [
    ["user"],
    ["system", "user"],
    ["user", "assistant", "user", "assistant", "user"],
    ["system", "user", "assistant", "user"],
]


def interpret(template, messages):
    """Write the few Go constructs that are used; fails on any other."""
    found = re.fullmatch(
        r'\{\{ if ne \(index \.Messages 0\)\.Role "system" \}\}(.*?)\{\{ end \}\}'
        r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)",
        template,
        re.DOTALL,
    )
    head, cases, end = found.groups()
    pattern = (
        r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)\{\{ \.Content \}\}(.*?)(?=\{\{ else|\Z)'
    )
    around = {role: texts for role, *texts in re.findall(pattern, cases, re.DOTALL)}
    text = "" if messages[0]["role"] == "system" else head
    for message in messages:
        before, after = around[message["role"]]
        text += before + message["content"] + after
    return text + end


@pytest.mark.parametrize("template", [None, WITH_DEFAULT, LLAMA3])
def test_a_go_template_writes_what_the_chat_template_writes(template, tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = template or made.chat_template
    for roles in TALKS:
        talk = [{"role": role, "content": f"say {n}"} for n, role in enumerate(roles)]
        expected = made.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert interpret(go_template(made), talk) == expected


def test_a_bos_token_that_llama_cpp_adds_is_left_out(tokenizer):
    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(tokenizer)
    made.bos_token = "<|im_start|>"
    made.chat_template = LLAMA3
    assert "<|im_start|>" in go_template(made)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", made.bos_token_id)]
    )
    assert "<|im_start|>" not in go_template(made)


def test_a_template_of_another_kind_is_left_out_with_a_warning(tokenizer, capsys):
    made = copy.deepcopy(tokenizer)
    made.chat_template = QUEER
    assert go_template(made) is None
    text = modelfile("a.gguf", made, [made.eos_token_id])
    assert text == 'FROM ./a.gguf\nPARAMETER stop "<|im_end|>"\n'
    assert "not one that a Modelfile can say" in capsys.readouterr().err


def test_a_template_that_refuses_system_messages_is_left_out(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = "{{ raise_exception('no') if messages[0]['role'] == 'system' }}" + QUEER
    assert go_template(made) is None
