"""What the app shows of a brand voice beside the answers."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Guide:
    """A voice for those who judge by it: prose, lists of phrases as (title, phrases), and rules of
    a sentence each.
    """

    name: str
    text: str = ""
    lists: list[tuple[str, list[str]]] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
