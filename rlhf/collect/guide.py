"""A brand voice's specification as a page for those who judge; what its keys mean is explained in docs/voice.md."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import UserError, read_yaml

_PHRASES = (
    ("greeting", "forms", "Begins with"),
    ("closing", "forms", "Ends with"),
    ("use", "words", "Words we like"),
    ("avoid", "words", "Words we never use"),
    ("claims", "forbidden", "Claims we never make"),
)


@dataclass
class Guide:
    """name, the guide in prose, (title, phrases) of each list, and rules in a sentence each."""

    name: str
    text: str = ""
    lists: list[tuple[str, list[str]]] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)


def read_guide(path: str | Path) -> Guide:
    """The guide of a voice's YAML file; raises UserError if it cannot be read."""
    spec = read_yaml(path)
    if not spec.get("name"):
        raise UserError(f"{path}: has no 'name'; expected a brand voice, such as configs/voices/shop.yaml")
    guide = Guide(str(spec["name"]), " ".join(str(spec.get("guide") or "").split()))
    for section, key, title in _PHRASES:
        phrases = [_plain(p) for p in _in(spec, section, key, [])]
        if phrases:
            guide.lists.append((title, phrases))
    if longest := _in(spec, "sentences", "max_words", None):
        guide.rules.append(f"Sentences have at most {longest} words.")
    low, high = (_in(spec, "length", name, None) for name in ("min_words", "max_words"))
    if low and high:
        guide.rules.append(f"The whole has {low} to {high} words.")
    elif low or high:
        guide.rules.append(f"The whole has at {'least' if low else 'most'} {low or high} words.")
    return guide


def _in(spec: dict[str, Any], section: str, key: str, default: Any) -> Any:
    found = spec.get(section)
    return found.get(key, default) if isinstance(found, dict) else default


def _plain(phrase: Any) -> str:
    """A phrase as people write it; patterns between slashes lose their signs."""
    text = str(phrase)
    if len(text) > 2 and text.startswith("/") and text.endswith("/"):
        text = re.sub(r"\[[^\]]*\]\?|\w\?", "", text[1:-1].replace(" ?", " "))  # what may be missing is left out
        text = re.sub(r"\\b|[\\()?\[\]^$]", "", text).replace("|", " / ")
    return text
