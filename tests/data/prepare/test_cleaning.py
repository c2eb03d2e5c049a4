from rlhf.data.prepare.cleaning import clean


def test_clean_by_hand():
    # e + combining acute -> one letter; \r\n and U+2028 -> \n; zero-width space, BOM, soft hyphen,
    # override, NUL go
    assert (
        clean("\ufeffCafe\u0301\r\nso\u200bft\u00adly \u2028\u202eend\x00  ")
        == "Caf\u00e9\nsoftly\nend"
    )
    assert clean("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f468\u200d\U0001f469") == (
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f468\u200d\U0001f469"
    )  # joiners that make words and emoji stay
    assert clean("pass\u200dword") == "password"
