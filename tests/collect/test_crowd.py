"""The benchmark in small: many at once, the server killed in the middle, every event checked
afterwards.
"""

import pytest

from benchmarks.votes import collect_load


def test_a_crowd_loses_nothing_though_the_server_is_killed(tmp_path):
    path = tmp_path / "votes.db"
    load, _ = collect_load.run(path, 40, 4, overlap=2, people=8, think=0.1, kills=1, limit=90)
    counts = collect_load.check(path, load, 40, overlap=2)
    assert counts["normal"] == 80 and counts["cast"] == counts["standing"] + counts["undone"]
    assert len(load.votes) == counts["cast"]


def test_the_check_notices_a_lost_vote(tmp_path):
    path = tmp_path / "votes.db"
    load, _ = collect_load.run(path, 3, 0, overlap=1, people=2, think=0.01, kills=0, limit=60)
    load.votes.add("p00 a-click-that-was-answered")
    with pytest.raises(AssertionError, match="1 answered votes are lost"):
        collect_load.check(path, load, 3, overlap=1)
