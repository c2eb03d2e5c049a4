import json
import uuid

import pytest

from rlhf.data.export import ExportConfig
from rlhf.data.store import Store
from rlhf.errors import UserError
from rlhf.exchange import argilla, label_studio
from rlhf.exchange.commands import ImportConfig, export, import_votes
from rlhf.exchange.pairs import Added, add_pairs, pairs_of_view

SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi & <b>?"}]
TOOLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]},
    {"role": "tool", "content": "rain", "tool_call_id": "1"},
]

# of Label Studio
REASON = {"from_name": "reason", "type": "textarea", "value": {"text": ["so"]}}
LEFT = {"from_name": "comparison", "type": "pairwise", "value": {"selected": "left"}}
TIE = {"from_name": "equal", "type": "choices", "value": {"choices": ["tie"]}}


def written(to_row, judged, users):
    """The rows of pairs or rankings in another program."""
    return [to_row(one, users) for one in judged]


@pytest.fixture
def store(tmp_path):
    """Three pairs, one of them a control, with a vote of every kind."""
    with Store.open(tmp_path / "votes.db", create=True) as opened:
        first = opened.add_prompt(
            SYSTEM, group="g", voice="shop", split="test", metadata={"n": [1, {"x": None}]}
        )
        second = opened.add_prompt(TOOLS)
        a = opened.add_response(first, "One.\n\n*Two.*", model="runs/dpo", ended=False)
        b = opened.add_response(first, "Zwei ☂", model="runs/ppo", ended=True)
        c = opened.add_response(second, "It rains.")
        d = opened.add_response(second, "Sun.")
        pair, other = opened.add_comparison(a, b), opened.add_comparison(c, d)
        control = opened.add_comparison(c, d, kind="control", expected=c)
        ann, cem = opened.add_annotator("Ann Öz"), opened.add_annotator("sim-cem")
        judge = opened.add_annotator("gpt", "model")
        rule = opened.add_annotator("longer", "rule")
        opened.clock = lambda: 1.7e9
        opened.vote(
            pair,
            ann,
            "b",
            left="b",
            strength=3,
            reason="Says\nit.",
            tags=["tone", "a & b"],
            duration_ms=12345,
            corrected="Zwei\n\nand more",
            criteria={"clear": {"a": 1, "b": 5}, "on brand": {"b": 3}},
        )
        opened.vote(pair, cem, "tie", left="a", duration_ms=1)
        opened.vote(pair, judge, "a", strength=1)
        opened.vote(pair, rule, "both_bad", reason="both too long")
        opened.vote(other, ann, "both_bad", left="a")
        opened.vote(other, judge, "skip", reason="no idea")
        opened.vote(other, cem, "skip", duration_ms=700, reason="?")
        undone = opened.vote(control, cem, "b")
        opened.undo(undone)
        opened.vote(control, cem, "a", left="b", strength=2)
        yield opened


@pytest.mark.parametrize("form", ["argilla", "label_studio"])
def test_a_store_comes_back_whole_from_another_program(store, tmp_path, form):
    output = tmp_path / "out.json"
    export(ExportConfig(source=[str(store.path)], output=str(output), form=form))
    import_votes(ImportConfig(source=str(output), store=str(tmp_path / "back.db")))
    with Store.open(tmp_path / "back.db") as back:
        found, expected = pairs_of_view(back.at()), pairs_of_view(store.at())
        for pair in (*found, *expected):
            pair.votes.sort(key=lambda vote: vote.annotator)
        assert found == expected
        assert [len(pair.votes) for pair in found] == [4, 3, 1]
        sources = {row["name"]: row["source"] for row in back.annotators()}
        assert sources == {row["name"]: row["source"] for row in store.annotators()}
        events = back.last_event()
    # again: nothing is added
    import_votes(ImportConfig(source=str(output), store=str(tmp_path / "back.db")))
    with Store.open(tmp_path / "back.db") as back:
        assert back.last_event() == events and back.last_comparison() == 3


def test_argilla_sees_the_votes_in_its_own_form(store):
    ann = str(uuid.uuid4())
    records = written(argilla.to_record, pairs_of_view(store.at()), {"Ann Öz": ann})
    first = records[0]
    assert first["fields"]["prompt"] == SYSTEM and first["fields"]["answer_b"] == "Zwei ☂"
    cem = str(uuid.uuid5(uuid.NAMESPACE_URL, "sim-cem"))
    assert first["responses"]["preference"] == [
        {"value": "b", "user_id": ann},
        {"value": "tie", "user_id": cem},
    ]
    assert first["responses"]["strength"] == [{"value": 3, "user_id": ann}]
    assert first["responses"]["tags"] == [{"value": ["tone", "a & b"], "user_id": ann}]
    assert first["suggestions"]["preference"] == {"value": "a", "score": None, "agent": "gpt"}
    assert first["metadata"]["model_a"] == "runs/dpo" and first["metadata"]["split"] == "test"
    # a chat field has no place for tool calls
    assert [set(message) for message in records[1]["fields"]["prompt"]] == 3 * [{"role", "content"}]


def test_label_studio_sees_the_votes_in_its_own_form(store):
    task = written(label_studio.to_task, pairs_of_view(store.at()), {"Ann Öz": "ann@example.org"})[
        0
    ]
    ann, cem = task["annotations"]
    assert ann["completed_by"]["email"] == "ann@example.org" and ann["lead_time"] == 12.345
    values = {region["from_name"]: (region["type"], region["value"]) for region in ann["result"]}
    assert values == {
        "comparison": ("pairwise", {"selected": "right"}),
        "strength": ("rating", {"rating": 3}),
        "tags": ("choices", {"choices": ["tone", "a & b"]}),
        "reason": ("textarea", {"text": ["Says\nit."]}),
        "corrected": ("textarea", {"text": ["Zwei\n\nand more"]}),
    }
    assert cem["result"][0]["value"] == {"choices": ["tie"]}
    assert [p["model_version"] for p in task["predictions"]] == ["gpt", "longer"]
    skipped = written(label_studio.to_task, pairs_of_view(store.at()), {})[1]["annotations"][1]
    assert skipped["was_cancelled"]


@pytest.mark.parametrize(
    ("module", "write"), [(argilla, argilla.to_record), (label_studio, label_studio.to_task)]
)
def test_a_vote_that_was_changed_there_keeps_nothing_of_the_old_one(store, module, write):
    rows = written(write, pairs_of_view(store.at()), {})
    if module is argilla:
        rows[0]["responses"]["preference"][0]["value"] = "a"
        (first,) = argilla.from_record(rows[0], "row 1", {})
    else:
        rows[0]["annotations"][0]["result"][0]["value"]["selected"] = "left"
        (first,) = label_studio.from_task(rows[0], "row 1", {})
    vote = next(vote for vote in first.votes if vote.annotator == "Ann Öz")
    # shown left was b: of this vote nobody knows it
    assert (vote.choice, vote.left) == ("a", None)
    assert module is label_studio or vote.duration_ms is None
    # a vote that was taken back there is gone here
    if module is argilla:
        for given in rows[0]["responses"].values():
            given[:] = [answer for answer in given if "Ann" not in str(answer)][1:]
        (first,) = argilla.from_record(rows[0], "row 1", {})
        assert len(first.votes) == 3


def test_datasets_that_were_set_up_in_argilla_are_read():
    ann = "11111111-1111-1111-1111-111111111111"
    row = {
        "id": "1",
        "fields": {"instruction": "Say hi", "response-1": "Hi", "response-2": "No"},
        "metadata": {"source": "web"},
        "suggestions": {"ranking": {"value": ["response-1", "response-2"], "agent": "ultra"}},
        "responses": {
            "ranking": [
                {"value": ["response-2", "response-1"], "user_id": ann},
                {
                    "value": [
                        {"value": "response-1", "rank": 1},
                        {"value": "response-2", "rank": 1},
                    ],
                    "user_id": "2",
                },
            ],
            "quality": [{"value": 4, "user_id": "2"}],
        },
    }
    (pair,) = argilla.from_record(row, "row 1", {ann: "ann"})
    assert pair.prompt == [{"role": "user", "content": "Say hi"}] and pair.a.text == "Hi"
    assert [(v.annotator, v.choice, v.kind) for v in pair.votes] == [
        ("ann", "b", "person"),
        ("2", "tie", "person"),
        ("ultra", "a", "model"),
    ]
    assert pair.metadata == {"source": "web"}


def test_a_ranking_of_more_than_two_answers_becomes_every_two(tmp_path):
    row = {
        "fields": {"prompt": "Say hi", "r1": "Hi", "r2": "No", "r3": "Hello"},
        "responses": {
            "ranking": [{"value": ["r3", "r1", "r2"], "user_id": "ann"}],
            "preference": [{"value": "r2", "user_id": "bob"}],
        },
    }
    path = tmp_path / "f.json"
    path.write_text(json.dumps([row]))
    import_votes(
        ImportConfig(source=str(path), store=str(tmp_path / "s.db"), answers=["r1", "r2", "r3"])
    )
    with Store.open(tmp_path / "s.db") as store:
        assert store.at().stats()["prompts"] == 1 and store.at().stats()["responses"] == 3
        found = [(r.chosen, r.rejected, r.annotator) for r in store.at().preferences()]
    # ann: Hello, Hi, No; bob only says that No is the best
    assert sorted(found) == [
        ("Hello", "Hi", "ann"),
        ("Hello", "No", "ann"),
        ("Hi", "No", "ann"),
        ("No", "Hello", "bob"),
        ("No", "Hi", "bob"),
    ]
    with pytest.raises(UserError, match="two answers, 3 are named"):
        label_studio.from_task({}, "row 1", {}, ("a", "b", "c"))
    with pytest.raises(UserError, match="'answers' has 1 names"):
        ImportConfig(source="x", store="y", answers=["one"]).validate()


def test_projects_that_were_set_up_in_label_studio_are_read():
    def annotation(selected, **about):
        region = {"from_name": "pw", "to_name": "pw", "type": "pairwise"}
        return {"result": [region | {"value": {"selected": selected}}], **about}

    row = {
        "id": 7,
        "data": {"prompt": "Say hi", "text1": "Hi", "text2": "No", "page": 3},
        "annotations": [
            annotation("right", completed_by=3, lead_time=4.288, created_at="2021-03-09T22:16:08Z"),
            annotation("left", completed_by={"id": 4, "email": "b@example.org"}),
            {"result": [], "was_cancelled": True, "completed_by": 5},
        ],
        "predictions": [annotation("left", model_version="m1")],
    }
    (pair,) = label_studio.from_task(row, "row 1", {"3": "ann"})
    assert (pair.a.text, pair.b.text, pair.metadata) == ("Hi", "No", {"page": 3})
    # the first text stands left for everybody
    assert [(v.annotator, v.choice, v.left, v.duration_ms, v.kind) for v in pair.votes] == [
        ("ann", "b", "a", 4288, "person"),
        ("b@example.org", "a", "a", None, "person"),
        ("user 5", "skip", None, None, "person"),
        ("m1", "a", None, None, "model"),
    ]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"data": {"text": "x"}}, "row 1: found fields text, expected one with the prompt"),
        ({"data": {"prompt": "x", "one": "y"}}, "name them: --answers ONE,TWO"),
        (
            {
                "data": {"prompt": "x", "answer1": "y", "answer2": "z"},
                "annotations": [{"completed_by": 1, "result": [REASON]}],
            },
            r"row 1: the annotation of user 1 chooses \[\]",
        ),
        (
            {
                "data": {"prompt": "x", "answer1": "y", "answer2": "z"},
                "annotations": [{"completed_by": 1, "result": [LEFT, TIE]}],
            },
            r"row 1: the annotation of user 1 chooses \['left', 'tie'\]",
        ),
        ({"fields": {"prompt": "x", "answer_a": "y"}}, "name them"),
        (
            {
                "fields": {"prompt": "x", "answer_a": "y", "answer_b": "z"},
                "responses": {"preference": [{"value": "dunno", "user_id": "1"}]},
            },
            "row 1: 'preference' is 'dunno', expected one of a, b, tie",
        ),
        (
            {
                "fields": {"prompt": "x", "answer_a": "y", "answer_b": "z"},
                "responses": {"preference": [{"value": "a"}]},
            },
            "row 1: is not as argilla writes it .KeyError: 'user_id'",
        ),
        (
            {"data": {"prompt": "x", "answer1": "y", "answer2": "z"}, "annotations": [7]},
            "row 1: is not as label_studio writes it .AttributeError",
        ),
        (
            {"fields": {"prompt": "x", "answer_a": "y", "answer_b": "y"}},
            "pair 1: two answers are the same text. Leave such pairs out",
        ),
    ],
)
def test_what_cannot_be_read_is_said_with_its_place_and_adds_nothing(tmp_path, row, told):
    path = tmp_path / "f.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(UserError, match=told):
        import_votes(ImportConfig(source=str(path), store=str(tmp_path / "new.db")))
    if (tmp_path / "new.db").exists():
        with Store.open(tmp_path / "new.db") as store:
            assert not store.at().pairs() and not store.at().stats()["prompts"]


def test_labelled_pairs_become_votes(tmp_path):
    rows = [
        {
            "prompt": "q",
            "chosen": "z",
            "rejected": "a",
            "annotator": "ann",
            "margin": 2 / 3,
            "x": 1,
        },
        {"prompt": "q", "chosen": "a", "rejected": "z", "annotator": "sim-bob", "x": 2},
        {"prompt": "q", "chosen": "z", "rejected": "a", "split": "test", "group": "g"},
        {"prompt": "q", "chosen": "a", "rejected": "z", "annotator": "ann"},
        {"prompt": "p", "chosen": "y", "rejected": "w", "label_prob": 0.5, "tie_prob": 0.5},
    ]
    path = tmp_path / "old-labels.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    import_votes(ImportConfig(source=str(path), store=str(tmp_path / "votes.db")))
    with Store.open(tmp_path / "votes.db") as store:
        first, second = pairs_of_view(store.at())
        assert [(v.annotator, v.choice, v.kind, v.strength) for v in first.votes] == [
            ("ann", "b", "person", 2),
            ("sim-bob", "a", "person", None),
            ("old-labels", "b", "rule", None),
        ]
        # "a" sorts before "z", whoever won
        assert (first.a.text, first.b.text) == ("a", "z") and first.metadata == {"x": 1}
        assert second.votes[0].choice == "tie"
        assert {row["name"]: row["source"] for row in store.annotators()} == {
            "ann": "human",
            "sim-bob": "simulated",
            "old-labels": "judge",
        }
        assert {(r.chosen, r.annotator) for r in store.at().preferences()} == {
            ("z", "ann"),
            ("a", "sim-bob"),
            ("z", "old-labels"),
        }


def test_rows_of_a_store_and_a_store_itself_are_read(store, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in store.at().rows()))
    import_votes(ImportConfig(source=str(rows), store=str(tmp_path / "from-rows.db")))
    with Store.open(tmp_path / "from-rows.db") as back:
        vote = next(v for v in back.at().votes() if v.annotator == "Ann Öz")
        pair = back.at().pair(vote.comparison)
        assert pair[f"text_{vote.choice}"] == "Zwei ☂"
        assert (vote.strength, vote.reason, vote.tags) == (3, "Says\nit.", ["tone", "a & b"])
        # it was shown left, whichever letter it has now
        assert vote.left == vote.choice
    import_votes(ImportConfig(source=str(store.path), store=str(tmp_path / "copy.db")))
    with Store.open(tmp_path / "copy.db") as copy:
        assert pairs_of_view(copy.at()) == pairs_of_view(store.at())


def test_answers_that_the_store_has_in_the_other_order_keep_their_votes(store, tmp_path):
    with Store.open(tmp_path / "other.db", create=True) as other, other.transaction():
        prompt = other.add_prompt(
            SYSTEM, group="g", voice="shop", split="test", metadata={"n": [1, {"x": None}]}
        )
        other.add_response(prompt, "Zwei ☂", model="runs/ppo", ended=True)
        other.add_response(prompt, "One.\n\n*Two.*", model="runs/dpo", ended=False)
        add_pairs(other, pairs_of_view(store.at()), Added())
    with Store.open(tmp_path / "other.db") as other:
        vote = next(v for v in other.at().votes() if v.annotator == "Ann Öz")
        assert other.at().pair(vote.comparison)["text_a"] == "Zwei ☂"
        assert (vote.choice, vote.left) == ("a", "a")
        assert vote.criteria == {"clear": {"b": 1, "a": 5}, "on brand": {"a": 3}}


def test_pairs_that_were_sampled_here_come_back_as_themselves(tmp_path):
    """A store is sampled, judged in the other program, and its file is imported into that store."""
    name, output = tmp_path / "votes.db", tmp_path / "records.json"
    with Store.open(name, create=True) as store:
        prompt = store.add_prompt([{"role": "user", "content": "Hi?"}])
        one = store.add_response(prompt, "One.", model="runs/dpo", sampling={"seed": 0}, ended=True)
        two = store.add_response(prompt, "Two.", model="runs/ppo", sampling={"seed": 0}, ended=True)
        store.add_comparison(one, two)
    export(ExportConfig([str(name)], str(output), form="argilla"))
    records = json.loads(output.read_text())
    user = str(uuid.uuid4())
    records[0]["responses"] = {"preference": [{"value": "b", "user_id": user}]}
    output.write_text(json.dumps(records))

    import_votes(ImportConfig(source=str(output), store=str(name)))

    with Store.open(name) as store:
        (pair,) = pairs_of_view(store.at())
        assert [vote.choice for vote in pair.votes] == ["b"]
