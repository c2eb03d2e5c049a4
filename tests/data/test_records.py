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
