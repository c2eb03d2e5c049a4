"""Text that is handed out while tokens are drawn."""

import pytest

from rlhf.data.encode import decode_response
from rlhf.serve.worker import StreamedText


class Bytes:
    """A tokenizer whose ids are bytes; id 0 is special."""

    def decode(self, ids, skip_special_tokens=False):
        kept = [i for i in ids if i or not skip_special_tokens]
        return bytes(kept).decode("utf-8", errors="replace")


def pieces(text: bytes, stops=()):
    stream = StreamedText(Bytes(), list(stops))
    found = []
    for token in text:
        found.append(stream.add(token))
        if stream.is_stopped:
            break
    found.append(stream.end())
    return found, stream


def test_white_space_around_the_answer_is_not_handed_out():
    found, stream = pieces(b" a b \n")
    # the space waits for b, and the end is left out
    assert found == ["", "a", "", " b", "", "", ""]
    assert stream.text == "a b" == decode_response(Bytes(), b" a b \n")


def test_half_a_character_waits_for_the_rest():
    # é is two bytes, the euro sign three
    found, _ = pieces("é€".encode())
    assert found == ["", "é", "", "", "€", ""]
    # what stays incomplete comes at the end, as the decoder writes it
    found, stream = pieces("a€".encode()[:3])
    assert found == ["a", "", "", "\ufffd"]
    assert stream.text == decode_response(Bytes(), "a€".encode()[:3])


def test_an_answer_ends_before_a_stop_text():
    found, stream = pieces(b"ab ENDING", ["END", "b E"])
    # "b E" comes first; its b waits as the beginning of a stop text
    assert found == ["a", "", "", "", ""] and stream.text == "a"
    assert stream.is_stopped and len(stream.ids) == 4

    # a beginning that does not go on is handed out
    found, stream = pieces(b"ENa", ["END"])
    assert found == ["", "", "ENa", ""] and not stream.is_stopped
    # and one that the answer ends with
    assert pieces(b"aEN", ["END"])[0] == ["a", "", "", "EN"]


def test_special_tokens_are_no_text():
    found, stream = pieces(b"a\x00")
    assert found == ["a", "", ""] and stream.ids == [97, 0]


@pytest.mark.parametrize("stops", [(), ("zz",), ("our", "parcel is")])
def test_pieces_are_the_whole_text_of_a_real_tokenizer(tokenizer, stops):
    text = "  Grüße 🙂 your parcel is on its way\n\nbye  "
    ids = tokenizer(text, add_special_tokens=False).input_ids
    stream = StreamedText(tokenizer, list(stops))
    found = ""
    for token in ids:
        found += stream.add(token)
        if stream.is_stopped:
            break
    found += stream.end()
    whole = decode_response(tokenizer, ids)
    cut = min((whole.index(stop) for stop in stops if stop in whole), default=len(whole))
    assert found == stream.text == whole[:cut].rstrip()
