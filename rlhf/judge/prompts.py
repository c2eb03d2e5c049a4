"""The prompt of a judge from a template file, and what its answer says.

A template is text with the places {prompt}, {guide}, {mark} and {format}, and {first} and {second}
of a pair or {response} and {highest} of a score. rlhf/judge/templates has the shipped ones.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.conversation import message_text
from rlhf.errors import UserError, did_you_mean
from rlhf.judge.spec import EndpointSpec, ScoreSpec
from rlhf.values import read_yaml

TEMPLATES = Path(__file__).parent / "templates"
NO_GUIDE = "(none)"
# what a template cannot do without, and what it may have besides
NEEDED = {"pair": ("prompt", "first", "second"), "score": ("prompt", "response")}
OPTIONAL = {"pair": ("guide", "mark", "format"), "score": ("guide", "mark", "format", "highest")}
_PLACE = re.compile(r"\{([a-z]+)\}")
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.S)
_FENCED = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\Z", re.S)
# P(the first answer is better)
VERDICTS = {"A": 1.0, "B": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Question:
    """The parts of a judge's prompt that its specification decides, and the form of its answer.

    schema: JSON schema of the answer. `value(answer)` is the number that an answer of that form
    stands for.
    """

    template: str
    guide: str
    schema: dict[str, Any]
    highest: int | None = None

    def text(self, prompt: Any, **answers: str) -> str:
        """Return the prompt about these answers. No text can end its own part: the mark is a hash
        of all of them.
        """
        given = {"prompt": conversation_text(prompt), **answers}
        content = json.dumps(given, ensure_ascii=False, sort_keys=True)
        # who writes an answer cannot know the hash of the whole
        mark = hashlib.sha256(content.encode()).hexdigest()[:8]
        values = {"guide": self.guide or NO_GUIDE, "mark": mark, "highest": str(self.highest)}
        values |= {"format": self.wanted(), **given}
        # in one pass, so that a place named in an answer stays text
        return _PLACE.sub(lambda found: values.get(found[1], found[0]), self.template)

    def wanted(self) -> str:
        """Return the sentence that asks for the answer's form, for servers without schemas too."""
        return f"Answer with one JSON object and nothing else: {self.example()}"

    def example(self) -> str:
        """Return an answer's form for people and models: {"better": "A" or "B" or "tie"}."""
        parts = []
        for name, kind in self.schema["properties"].items():
            allowed = " or ".join(map(json.dumps, kind.get("enum", [])))
            if name == "score":
                allowed = f"a whole number from 1 to {self.highest}"
            parts.append(f'"{name}": {allowed or "one sentence"}')
        return "{" + ", ".join(parts) + "}"

    def value(self, text: str) -> float:
        """Return the number that an answer stands for. Raises ValueError, saying what is wrong,
        unless it is exactly of the form that was asked for.
        """
        answer = json_object(text)
        for name in answer:
            if name not in self.schema["properties"]:
                raise ValueError(f"unknown key {name!r}")
        for name, kind in self.schema["properties"].items():
            if name not in answer:
                raise ValueError(f"{name!r} is missing")
            allowed = kind.get("enum")
            found = answer[name]
            # True == 1, and is no grade
            if allowed and (isinstance(found, bool) or found not in allowed):
                raise ValueError(f"{name!r} is {found!r}")
        return VERDICTS[answer["better"]] if "better" in answer else float(answer["score"])


def json_object(text: str) -> dict[str, Any]:
    """Return the JSON object that is the whole text, or stands in one fenced block; a thought before
    it is left out. Raises ValueError.
    """
    text = _THOUGHT.sub("", text).strip()
    fenced = _FENCED.fullmatch(text)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise ValueError("it is not one JSON object") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is {type(found).__name__}, not an object")
    return found


def question(spec: EndpointSpec) -> Question:
    """Return the question that a specification asks: of pairs, or of single answers for a
    ScoreSpec. Raises UserError for a template that cannot be filled.
    """
    kind = "score" if isinstance(spec, ScoreSpec) else "pair"
    file = Path(spec.template or TEMPLATES / f"{kind}.txt")
    template = file.read_text(encoding="utf-8")
    # a misspelt place would stand in the prompt as it is
    known = (*NEEDED[kind], *OPTIONAL[kind])
    places = set(_PLACE.findall(template))
    for place in sorted(places - set(known)):
        raise UserError(
            f"{file}: unknown place {{{place}}}.{did_you_mean(place, known)} Places of a {kind} "
            f"template: {', '.join(known)}"
        )
    for place in NEEDED[kind]:
        if place not in places:
            raise UserError(f"{file}: the place {{{place}}} is missing")

    # reasons come before the verdict, which then follows from them
    properties: dict[str, Any] = {"explanation": {"type": "string"}} if spec.explain else {}
    highest = None
    if isinstance(spec, ScoreSpec):
        highest = spec.highest
        properties["score"] = {"type": "integer", "enum": list(range(1, highest + 1))}
    else:
        properties["better"] = {"type": "string", "enum": list(VERDICTS)}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return Question(template, guide_text(spec.guide), schema, highest)


def guide_text(file: str | None) -> str:
    """Return the text of a guide: a file's, or the `guide` of a brand voice (.yaml)."""
    if file is None:
        return ""
    if Path(file).suffix not in (".yaml", ".yml"):
        return Path(file).read_text(encoding="utf-8").strip()
    text = read_yaml(file).get("guide")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{file}: has no text under 'guide' for the judge to go by")
    return text.strip()


def conversation_text(prompt: Any) -> str:
    """Return a prompt, text or messages, as text; roles are named where there is more than the
    user's one message.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message_text(message)}" for message in prompt)
