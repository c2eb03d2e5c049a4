"""The text of an answer while its tokens are drawn."""

from __future__ import annotations

from typing import Any

# what a decoder writes for bytes that are not yet a character
INCOMPLETE = "\ufffd"


class StreamedText:
    """Text that grows by tokens; it ends before the first of the texts in `stops`.

    What is handed out is never taken back: white space at the end, half a character, and the
    beginning of a stop text wait for what follows. All that is handed out, and `text`, is what
    `rlhf.data.encode.decode_response` gives for the same tokens, as far as the stop text.
    """

    def __init__(self, tokenizer: Any, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.text = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Return the text that is certain with one more token."""
        self.ids.append(token)
        return self._advance(is_last=False)

    def end(self) -> str:
        """Return the rest, when no more tokens come."""
        return self._advance(is_last=True)

    def _advance(self, *, is_last: bool) -> str:
        whole = self.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()
        places = [place for stop in self.stops if (place := whole.find(stop)) >= 0]
        self.is_stopped = bool(places)
        if places:
            whole = whole[: min(places)]
        elif not is_last:
            whole = whole[: len(whole) - self._open_end(whole)]
        whole = whole.rstrip()
        # the decoders of a few tokenizers change what they wrote before
        if not whole.startswith(self.text):
            return ""
        new, self.text = whole[len(self.text) :], whole
        return new

    def _open_end(self, text: str) -> int:
        """Return how many characters at the end of `text` may become others, or a stop text."""
        longest = len(text) - len(text.rstrip(INCOMPLETE))
        for stop in self.stops:
            for length in range(longest + 1, min(len(stop), len(text) + 1)):
                if text.endswith(stop[:length]):
                    longest = length
        return longest
