"""Ollama's Modelfile: the GGUF file, its chat template in Go's template language, stop words."""

from __future__ import annotations

import sys
from typing import Any

from rlhf.export.gguf_file import adds_bos

ROLES = ("system", "user", "assistant")
# dialogues on which both templates have to give the same text
DIALOGUES = [
    ["user"],
    ["system", "user"],
    ["user", "assistant", "user"],
    [*ROLES, *ROLES[1:], "user"],
]


def modelfile(file_name: str, tokenizer: Any, stops: list[int]) -> str:
    """Return a Modelfile for the GGUF file beside it. A chat template that cannot be said in Go's
    language is left out, with a warning: Ollama then goes by the one in the GGUF file, if it knows it.
    """
    lines = [f"FROM ./{file_name}"]
    template = go_template(tokenizer)
    if template is None:
        print(
            "warning: the chat template is not one that a Modelfile can say; check what Ollama makes of it with: "
            "ollama show --template",
            file=sys.stderr,
        )
    else:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{tokenizer.decode([token])}"' for token in stops]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: Any) -> str | None:
    """Return the chat template as a Go template over .Messages, or None where it is not a text
    before and after each message.

    The texts are found by rendering dialogues; the result is compared with the original on others.
    """
    try:
        parts = _parts(tokenizer)
        same = all(
            _written(parts, dialogue) == _rendered(tokenizer, dialogue, prompt=True)
            for dialogue in map(_dialogue, DIALOGUES)
        )
    # a template may refuse a role, or begin with what was not rendered before
    except Exception:
        return None
    if not same:
        return None

    # llama.cpp writes it itself
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    parts["head"] = parts["head"].removeprefix(bos)
    before, after = parts["system"]
    parts["system"] = (before.removeprefix(bos), after)
    cases = []
    for role in ROLES:
        before, after = parts[role]
        cases.append(f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ ')
    each = "{{ " + "else ".join(cases) + "end }}"
    head = '{{ if ne (index .Messages 0).Role "system" }}' + parts["head"] + "{{ end }}"
    template = head + "{{ range .Messages }}" + each + "{{ end }}" + parts["end"]
    texts = [parts["head"], parts["end"]]
    for role in ROLES:
        texts += parts[role]
    # what would end the template, or begin an action in it
    is_plain = not any("{{" in text or '"""' in text for text in texts)
    return template if is_plain else None


def _dialogue(roles: list[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": f"Text{number}"} for number, role in enumerate(roles)]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)


def _parts(tokenizer: Any) -> dict[str, Any]:
    """Return the text before and after a message of each role; "head" before a dialogue without a
    system message, "end" where the answer begins.
    """
    user, answer = {"role": "user", "content": "USER"}, {"role": "assistant", "content": "ANSWER"}
    system = {"role": "system", "content": "SYSTEM"}
    once = _rendered(tokenizer, [user])
    answered = _rendered(tokenizer, [user, answer])
    twice = _rendered(tokenizer, [user, answer, user])
    parts: dict[str, Any] = {}
    parts["user"] = tuple(twice.removeprefix(answered).split("USER"))
    parts["assistant"] = tuple(answered.removeprefix(once).split("ANSWER"))
    as_user = "USER".join(parts["user"])
    parts["head"] = once.removesuffix(as_user)
    with_system = _rendered(tokenizer, [system, user]).removesuffix(as_user)
    parts["system"] = tuple(with_system.split("SYSTEM"))
    parts["end"] = _rendered(tokenizer, [user], prompt=True).removeprefix(once)
    return parts


def _written(parts: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """Return what the Go template of these parts writes."""
    text = "" if messages[0]["role"] == "system" else parts["head"]
    for message in messages:
        before, after = parts[message["role"]]
        text += before + message["content"] + after
    return text + parts["end"]
