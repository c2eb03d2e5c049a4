from rlhf.text import clip, escape_cell, markdown_table, short_names


def test_clip_makes_one_line_and_marks_a_cut():
    assert clip("a\n  b") == "a b"
    assert clip("abcdefgh", 8) == "abcdefgh"
    assert clip("abcdefghi", 8) == "abcde..."


def test_a_cell_cannot_end_itself_or_become_html():
    assert escape_cell("<b>|x|\ny & z") == "&lt;b>\\|x\\| y &amp; z"
    assert [escape_cell(None), escape_cell(0.123456), escape_cell(3)] == ["–", "0.1235", "3"]


def test_markdown_table():
    assert markdown_table(["a", "b"], [["x", 1.5]], right=[1]) == [
        "| a | b |",
        "| --- | ---: |",
        "| x | 1.5 |",
    ]


def test_names_are_as_short_as_tells_the_paths_apart():
    assert short_names(["runs/sft", "runs/ppo/"]) == ["sft", "ppo"]
    assert short_names(["x/a/ppo", "x/b/ppo", "x/b/dpo"]) == ["a/ppo", "b/ppo", "b/dpo"]
    assert short_names(["runs/a", "runs/spread"], taken=["spread"], joint="-") == [
        "runs-a",
        "runs-spread",
    ]
    # nothing tells them apart
    assert short_names(["runs/a", "runs/a"]) == ["runs/a", "runs/a"]
    assert short_names([]) == []
