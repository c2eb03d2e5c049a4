import pytest

from rlhf.data.store import Store
from rlhf.report.markdown import markdown
from rlhf.voting.page import sentences, stop_text, votes_markdown
from rlhf.voting.rates import votes_of_store
from tests.compare.report_example import example


@pytest.fixture
def votes(tmp_path):
    """A store with ten prompts, of which ann and bob prefer dpo at nine."""
    path = tmp_path / "votes.db"
    with Store.open(path, create=True) as store:
        people = [store.add_annotator("sim-ann"), store.add_annotator("sim-bob")]
        for i in range(10):
            prompt = store.add_prompt([{"role": "user", "content": f"question {i}"}])
            one = store.add_response(prompt, "x", model="runs/<b>dpo")
            other = store.add_response(prompt, "y", model="runs/ppo")
            pair = store.add_comparison(one, other)
            for person in people:
                store.vote(pair, person, "b" if i == 0 else "a")
    return str(path)


def test_a_verdict_begins_with_whose_votes_they_are(votes):
    (sentence,) = sentences(votes_of_store(votes)["votes"])
    assert sentence.startswith("Simulated votes: <b>dpo is preferred to ppo: it wins 90.0 % [")
    text = "\n".join(votes_markdown(votes_of_store(votes)["votes"]))
    assert "20 votes of these 2 annotators on 10 pairs, up to event 20." in text


def test_a_policy_that_loses_is_named_second(votes):
    with Store.open(votes) as store:
        for vote in store.at().votes():
            store.undo(vote.event)
            store.vote(vote.comparison, 1 + (vote.annotator == "sim-bob"), "b")
    (sentence,) = sentences(votes_of_store(votes)["votes"])
    assert sentence.startswith("Simulated votes: ppo is preferred to <b>dpo: it wins 100.0 % [")


def test_of_several_pairs_of_policies_the_adjusted_p_decides():
    rate = {"estimate": 0.6, "low": 0.51, "high": 0.69}
    pair = {"one": "dpo", "other": "ppo", "rate": rate, "p_adjusted": 0.031}
    (sentence,) = sentences({"source": "human", "pairs": [pair]})
    assert "dpo is preferred to ppo" in sentence
    pair["p_adjusted"] = 0.093
    (sentence,) = sentences({"source": "human", "pairs": [pair]})
    assert (
        "no difference" in sentence
        and "(p adjusted 0.093): dpo wins 60.0 % [51.0, 69.0]" in sentence
    )


def test_the_report_shows_the_votes_and_no_html_of_a_name(votes):
    report = {**example(), **votes_of_store(votes)}
    text = markdown(report)
    section = text[text.index("## Votes") : text.index("## Annotators")]
    assert r"Simulated votes: \<b\>dpo is preferred" in section and "<b>" not in section
    assert "## Votes" not in markdown(example())


def test_the_rule_says_who_is_ahead_or_how_many_are_missing():
    stop = {"state": "open", "more": 40, "margin": 0.1}
    pair = {"one": "dpo", "other": "ppo", "stop": stop}
    assert stop_text(pair) == "no: about 40 more prompts if it stays so"
    stop["more"] = None
    assert stop_text(pair) == "no, and not in sight"
    stop["state"] = "other"
    assert stop_text(pair) == "yes: ppo is ahead"
    stop["state"] = "equal"
    assert stop_text(pair) == "yes: no difference beyond 10 points"
