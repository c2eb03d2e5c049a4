import pytest

from rlhf.data.records import Labelled, Preference, Prompt, RecordError, normalise, prompt_group

HI = [{"role": "user", "content": "Hi"}]


def test_normalise_folds_case_width_and_space():
    assert normalise("  Ｗhere\n is\tSTRASSE? ") == "where is strasse?"
    assert normalise("Straße") == "strasse"  # case folding, not lower()


def test_group_is_the_first_user_turn_whatever_surrounds_it():
    system = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": " hi "}]
    longer = [*HI, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "More"}]
    assert Prompt(prompt=HI).group == Prompt(prompt=system).group == Prompt(prompt=longer).group
    assert Prompt(prompt=HI).group == "8f434346648f6b96"  # sha256("hi"), first 16 hex digits
    assert prompt_group([{"role": "user", "content": "Ho"}]) != prompt_group(HI)


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("prompt", lambda: Prompt(prompt=[])),
        ("prompt", lambda: Prompt(prompt=[{"role": "robot", "content": "x"}])),
        ("prompt", lambda: Prompt(prompt=[*HI, {"role": "assistant", "content": "x"}])),
        ("prompt", lambda: Prompt(prompt=[{"role": "user", "content": "half \ud83d"}])),
        ("group", lambda: Prompt(prompt=HI, group="half \ud83d")),
        ("metadata", lambda: Prompt(prompt=HI, metadata={"a": [{"\ud83d": 1}]})),
        ("metadata", lambda: Prompt(prompt=HI, metadata={"a": ["x", ("\ud83d",)]})),
        ("split", lambda: Prompt(prompt=HI, split="dev")),
        ("weight", lambda: Prompt(prompt=HI, weight=-1.0)),
        ("weight", lambda: Prompt(prompt=HI, weight=True)),
        ("chosen", lambda: Preference(prompt=HI, chosen=" ", rejected="x")),
        ("chosen", lambda: Preference(prompt=HI, chosen="x", rejected="x")),
        ("margin", lambda: Preference(prompt=HI, chosen="x", rejected="y", margin="2")),
        ("label_prob", lambda: Preference(prompt=HI, chosen="x", rejected="y", label_prob=1.1)),
        (
            "label_prob",
            lambda: Preference(prompt=HI, chosen="x", rejected="y", label_prob=float("nan")),
        ),
        ("label", lambda: Labelled(prompt=HI, response="x", label=1)),
    ],
)
def test_a_bad_record_names_its_field(field, make):
    with pytest.raises(RecordError) as error:
        make()
    assert error.value.field == field
    assert f"'{field}'" in str(error.value)


def preference(**more):
    return Preference(prompt=[{"role": "user", "content": "q"}], chosen="a", rejected="b", **more)


def test_half_of_the_ties_is_in_label_prob():
    # of four votes two for chosen, one tie, one for rejected: (2 + 1/2) / 4
    pair = preference(label_prob=0.625, tie_prob=0.25)
    assert pair.has_winner
    # without a vote for rejected
    assert preference(tie_prob=0.5).label_prob == 0.75
    assert not preference(tie_prob=1.0).has_winner
    # as many for either side
    assert not preference(label_prob=0.5, tie_prob=0.0).has_winner
    # a soft label alone says nothing of votes
    assert preference(label_prob=0.5).has_winner


@pytest.mark.parametrize(
    ("label_prob", "tie_prob"), [(0.9, 0.25), (0.1, 0.25), (0.6, 1.0), (0.5, 1.5), (0.5, -0.1)]
)
def test_shares_that_contradict_each_other_are_refused(label_prob, tie_prob):
    with pytest.raises(RecordError, match="tie_prob"):
        preference(label_prob=label_prob, tie_prob=tie_prob)


def test_a_column_of_votes_becomes_shares():
    from rlhf.data.schemas import read_row

    row = {"prompt": "q", "chosen": "a", "rejected": "b"}

    def shares(votes, **more):
        record = read_row(row | {"votes": votes} | more, Preference).record
        return record.label_prob, record.tie_prob

    assert shares({"chosen": 5, "rejected": 1, "tie": 2}) == (0.75, 0.25)
    assert shares({"chosen": 1, "rejected": 1}) == (0.5, 0.0)
    # other votes are metadata, and a label_prob of its own wins
    assert shares([2, 2, 1]) == (None, None)
    assert shares({"a": 2}) == (None, None)
    assert shares({"chosen": 3, "tie": 1}, label_prob=0.9) == (0.9, None)
    with pytest.raises(RecordError, match="votes"):
        shares({"chosen": 0, "tie": 0})


def test_records_without_ties_keep_their_fingerprint():
    from rlhf.data.load import fingerprint

    # as it was before the field existed
    assert fingerprint([preference()]) == "e3ec38dd1cd9b865"
    assert fingerprint([preference(tie_prob=1.0)]) != fingerprint([preference(label_prob=0.5)])
