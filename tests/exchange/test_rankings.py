"""Orders and marked passages, through the files of other programs and back."""

import json

import pytest

from rlhf.data.export import ExportConfig
from rlhf.data.store import Store
from rlhf.errors import UserError
from rlhf.exchange import argilla, argilla_rankings, label_studio, label_studio_rankings
from rlhf.exchange.commands import ImportConfig, export, import_votes
from rlhf.exchange.pairs import pairs_of_view
from rlhf.exchange.rankings import rankings_of_view
from tests.exchange.test_round_trips import written

TEXTS = ["One.\n\n*Two.*", "Zwei ☂", "\nDrei <b>", "Vier 👍 Fünf"]


@pytest.fixture
def store(tmp_path):
    """A ranking with orders of every kind, one of whose pairs was disputed, and a marked pair."""
    with Store.open(tmp_path / "votes.db", create=True) as opened:
        messages = [
            {"role": "system", "content": "Brief."},
            {"role": "user", "content": "Hi & <b>?"},
        ]
        prompt = opened.add_prompt(
            messages, group="g", voice="shop", split="test", metadata={"n": 1}
        )
        ids = []
        for number, text in enumerate(TEXTS):
            ended = (True, False, None, True)[number]
            ids.append(opened.add_response(prompt, text, model=f"runs/{number}", ended=ended))
        ranking = opened.add_ranking(ids)
        three = [
            opened.add_response(opened.add_prompt([{"role": "user", "content": "Q"}]), t)
            for t in "abc"
        ]
        opened.add_ranking(three)
        ann, cem = opened.add_annotator("Ann Öz"), opened.add_annotator("sim-cem")
        judge, dora = opened.add_annotator("gpt", "model"), opened.add_annotator("dora")
        opened.clock = lambda: 1.7e9
        w, x, y, z = ids
        spans = [
            {"answer": z, "start": 5, "end": 11, "label": "bad", "remark": "a\nb"},
            {"answer": z, "start": 5, "end": 6, "label": "good"},
            {"answer": y, "start": 0, "end": 5, "label": "good"},
        ]
        opened.rank(
            ranking,
            ann,
            [[z], [w, y], [x]],
            shown=[x, y, z, w],
            reason="Says\nit.",
            tags=["tone", "a & b"],
            duration_ms=12345,
            spans=spans,
        )
        opened.rank(ranking, cem, [], shown=[w, x, y, z], duration_ms=7)
        opened.rank(ranking, judge, [[x], [w], [y], [z]])
        opened.rank(2, ann, [list(three)])
        # the word on one pair of the ranking
        pair = next(v.comparison for v in opened.at().votes() if v.ranking == ranking)
        opened.vote(pair, dora, "b")
        other = opened.add_prompt([{"role": "user", "content": "Pair"}])
        pair = opened.add_comparison(
            *(opened.add_response(other, t) for t in ("Hello ☂ you", "What?"))
        )
        marks = [{"answer": "a", "start": 6, "end": 7, "label": "good", "remark": "it rains"}]
        marks.append({"answer": "b", "start": 0, "end": 4, "label": "bad"})
        opened.vote(pair, ann, "a", spans=marks)
        yield opened


def both(path):
    with Store.open(path) as opened:
        found = rankings_of_view(opened.at()), pairs_of_view(opened.at())
    for ranking in found[0]:
        ranking.orders.sort(key=lambda cast: cast.annotator)
    return found


@pytest.mark.parametrize("form", ["argilla", "label_studio"])
def test_orders_and_marks_come_back_whole(store, tmp_path, form):
    output, back = tmp_path / "out.json", tmp_path / "back.db"
    export(ExportConfig(source=[str(store.path)], output=str(output), form=form))
    files = [output.with_suffix(".rankings.json"), output]
    for _ in range(2):
        for file in files:
            import_votes(ImportConfig(source=str(file), store=str(back)))
    rankings, pairs = both(store.path)
    assert both(back) == (rankings, pairs)
    # of the pairs of a ranking the one that was voted on by itself
    assert [len(pair.votes) for pair in pairs] == [1, 1] and len(rankings[0].orders) == 3
    with Store.open(back) as opened:
        assert opened.last_event() == 6 and opened.at().stats()["rankings"] == 2


def test_a_store_is_copied_with_its_rankings(store, tmp_path, capsys):
    import_votes(ImportConfig(source=str(store.path), store=str(tmp_path / "copy.db")))
    assert "1 pairs, 2 rankings and 6 votes added" in capsys.readouterr().out
    assert both(tmp_path / "copy.db") == both(store.path)


def test_argilla_sees_orders_and_marks_in_its_own_form(store):
    records = written(argilla_rankings.to_record, rankings_of_view(store.at()), {"Ann Öz": "u1"})
    first = records[0]
    given = {name: answers[0] for name, answers in first["responses"].items()}
    order = ["answer_4", "answer_1", "answer_3", "answer_2"]
    assert given["ranking"] == {"value": order, "user_id": "u1"}
    assert given["marks_4"]["value"] == [
        {"start": 5, "end": 6, "label": "good"},
        {"start": 5, "end": 11, "label": "bad"},
    ]
    assert first["suggestions"]["ranking"]["agent"] == "gpt"
    settings = argilla_rankings.settings(rankings_of_view(store.at()))
    by_name = {question["name"]: question["settings"] for question in settings["questions"]}
    assert [option["value"] for option in by_name["ranking"]["options"]] == [
        f"answer_{i}" for i in (1, 2, 3, 4)
    ]
    assert by_name["marks_2"]["field"] == "answer_2"
    # a record of three answers has no fourth
    required = {field["name"]: field["required"] for field in settings["fields"]}
    assert required["answer_3"] and not required["answer_4"]
    pair = written(argilla.to_record, pairs_of_view(store.at()), {})[-1]
    assert pair["responses"]["marks_a"][0]["value"] == [{"start": 6, "end": 7, "label": "good"}]


def test_label_studio_sees_orders_and_marks_in_its_own_form(store):
    task = written(label_studio_rankings.to_task, rankings_of_view(store.at()), {})[0]
    ann, cem = task["annotations"]
    values = {region["from_name"]: region["value"] for region in ann["result"]}
    assert values["order"] == {
        "ranker": {"place1": ["answer4"], "place2": ["answer1", "answer3"], "place3": ["answer2"]}
    }
    assert cem["was_cancelled"] and cem["result"] == []
    assert '<Bucket name="place4"' in label_studio_rankings.labelling(rankings_of_view(store.at()))
    task = written(label_studio.to_task, pairs_of_view(store.at()), {})[-1]
    regions = task["annotations"][0]["result"]
    good, remark = (r for r in regions if r["from_name"] in ("marks1", "remark1"))
    assert good["value"] == {"start": 6, "end": 7, "text": "☂", "labels": ["good"]}
    assert remark["id"] == good["id"] and remark["value"]["text"] == ["it rains"]


def test_what_was_changed_there_keeps_nothing_of_the_old_one(store):
    rows = written(argilla_rankings.to_record, rankings_of_view(store.at()), {})
    rows[0]["responses"]["ranking"][0]["value"].reverse()
    found, _ = argilla_rankings.from_record(rows[0], "row 1", {})
    ann = next(cast for cast in found.orders if cast.annotator == "Ann Öz")
    assert (ann.order, ann.shown, ann.duration_ms) == ([[1], [2], [0], [3]], None, None)
    assert ann.reason == "Says\nit." and len(ann.spans) == 3
    # so does a passage
    rows = written(argilla_rankings.to_record, rankings_of_view(store.at()), {})
    rows[0]["responses"]["marks_3"][0]["value"][0]["label"] = "bad"
    found, _ = argilla_rankings.from_record(rows[0], "row 1", {})
    ann = next(cast for cast in found.orders if cast.annotator == "Ann Öz")
    assert (ann.spans[0]["answer"], ann.spans[0]["label"], ann.shown) == (2, "bad", None)
    rows = written(label_studio_rankings.to_task, rankings_of_view(store.at()), {})
    buckets = rows[0]["annotations"][0]["result"][0]["value"]["ranker"]
    buckets["place1"], buckets["place3"] = buckets["place3"], buckets["place1"]
    found, _ = label_studio_rankings.from_task(rows[0], "row 1", {})
    ann = next(cast for cast in found.orders if cast.annotator == "Ann Öz")
    assert ann.order == [[1], [0, 2], [3]] and ann.shown is None
    # ties are its own: two answers that share no place any more do not come back equally good
    buckets.update({f"place{i}": [f"answer{n}"] for i, n in enumerate((4, 1, 3, 2), 1)})
    found, _ = label_studio_rankings.from_task(rows[0], "row 1", {})
    ann = next(cast for cast in found.orders if cast.annotator == "Ann Öz")
    assert ann.order == [[3], [0], [2], [1]] and ann.shown is None
    del buckets["place1"]
    with pytest.raises(UserError, match="row 1: the annotation of Ann Öz does not place every"):
        label_studio_rankings.from_task(rows[0], "row 1", {})
    # a remark that was changed there is the new one
    rows = written(label_studio.to_task, pairs_of_view(store.at()), {})
    for region in rows[-1]["annotations"][0]["result"]:
        if region["from_name"] == "remark1":
            region["value"]["text"] = ["wet"]
    (found,) = label_studio.from_task(rows[-1], "row 2", {})
    assert found.votes[0].spans[0]["remark"] == "wet"
    for region in rows[-1]["annotations"][0]["result"]:
        if region["from_name"] == "marks1":
            region["value"]["text"] = "?"
    with pytest.raises(UserError, match=r"row 2: span from 6 to 7: the answer says '☂' there, not"):
        label_studio.from_task(rows[-1], "row 2", {})


def test_a_ranking_that_lost_an_answer_there_is_refused_with_its_place(store, tmp_path):
    rankings = rankings_of_view(store.at())
    record = argilla_rankings.to_record(rankings[0], {})
    del record["fields"]["answer_4"]
    less = label_studio_rankings.to_task(rankings[0], {})
    less["data"]["answers"].pop()
    number = label_studio_rankings.to_task(rankings[0], {})
    number["data"]["answers"][0]["body"] = 7
    path, back = tmp_path / "f.json", tmp_path / "back.db"
    for form, row in (("argilla", record), ("label_studio", less), ("label_studio", number)):
        path.write_text(json.dumps([row]))
        told = f"row 1: is not as {form} writes it .*expected the texts of 4 answers"
        with pytest.raises(UserError, match=told):
            import_votes(ImportConfig(source=str(path), store=str(back)))
    assert not back.exists()


def test_a_ranking_that_was_set_up_in_argilla_is_one_event(tmp_path, capsys):
    rank = [{"value": "r3", "rank": 1}, {"value": "r1", "rank": 2}, {"value": "r2", "rank": 2}]
    row = {
        "fields": {"prompt": "Say hi", "r1": "Hi", "r2": "No", "r3": "Hello"},
        "metadata": {"source": "web"},
        "responses": {
            "order": [
                {"value": rank, "user_id": "ann"},
                {"value": ["r2", "r1"], "user_id": "bob"},
            ],
        },
        "suggestions": {"order": {"value": ["r1", "r2", "r3"], "agent": "gpt"}},
    }
    path = tmp_path / "f.json"
    path.write_text(json.dumps([row]))
    about = {"source": str(path), "store": str(tmp_path / "s.db"), "answers": ["r1", "r2", "r3"]}
    import_votes(ImportConfig(**about))
    # the suggestion is read as an order alone
    assert "left out" not in capsys.readouterr().out
    with Store.open(tmp_path / "s.db") as opened:
        names = {r["id"]: r["text"] for r in opened.at().rankings()[1]["responses"]}
        found = {}
        for cast in opened.at().ranked():
            found[cast.annotator] = [[names[id] for id in equal] for equal in cast.order]
        # bob has placed two of three
        single = [v for v in opened.at().votes() if v.ranking is None]
        assert [(v.annotator, opened.at().pair(v.comparison)["ranking"]) for v in single] == [
            ("bob", 1)
        ]
    assert found == {"ann": [["Hello"], ["Hi", "No"]], "gpt": [["Hi"], ["No"], ["Hello"]]}
