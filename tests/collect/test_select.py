"""Which pairs are put to a vote: rules on numbers worked by hand, and rounds of votes."""

import json
import math

import pytest

import rlhf.collect.select as select
from rlhf.collect.sample import SampleConfig, sample
from rlhf.config import parse
from rlhf.data.records import Scores
from rlhf.data.store import Store
from rlhf.errors import UserError

# two members, three answers
SCORES = [[0.0, 1.0, 5.0], [0.0, 2.0, 3.0]]
# differences by member     -1 -2     -5 -3     -4 -1
# mean, deviation        -1.5 0.5    -4 1.0  -2.5 1.5
PAIRS = [(0, 1), (0, 2), (1, 2)]


def order(rule):
    values = select.worth(rule, SCORES, PAIRS)
    return sorted(range(3), key=lambda number: -values[number])


def test_uncertainty_asks_first_where_the_chance_is_nearest_one_half():
    assert order("uncertainty") == [0, 2, 1]
    # sigmoid of -1.5, -4 and -2.5: 0.18, 0.02 and 0.08
    chances = [1 / (1 + math.exp(-m)) for m in (-1.5, -4.0, -2.5)]
    by_chance = sorted(range(3), key=lambda number: abs(chances[number] - 0.5))
    assert by_chance == order("uncertainty")


def test_disagreement_asks_first_where_members_differ_most():
    assert select.worth("disagreement", SCORES, PAIRS) == pytest.approx([0.5, 1.0, 1.5])
    assert order("disagreement") == [2, 1, 0]
    # members that are far apart and order two answers alike do not disagree
    assert select.worth("disagreement", [[1.0, 2.0], [101.0, 102.0]], [(0, 1)]) == [0.0]


def test_margin_asks_first_where_the_mean_difference_is_largest():
    assert select.worth("margin", SCORES, PAIRS) == pytest.approx([1.5, 4.0, 2.5])
    # whichever answer is called a
    assert select.worth("margin", SCORES, [(1, 0)]) == pytest.approx([1.5])


def test_every_prompt_has_a_pair_before_one_has_two():
    values, prompts = [5.0, 4.0, 3.0, 2.0], ["x", "x", "y", "z"]
    assert select.choose(values, prompts) == [0, 2, 3]
    assert select.choose(values, prompts, 2) == [0, 2]
    assert select.choose(values, prompts, 9) == [0, 2, 3, 1]
    # x was asked about before: its first is now its second
    assert select.choose(values, prompts, 3, {"x": 1}) == [2, 3, 0]
    assert select.choose(values, prompts, asked={"x": 1}) == [2, 3]
    assert select.choose([1.0, 1.0], ["x", "y"], 1) == [0]


QUESTIONS = ["where is my lamp", "where is my chair", "where is my order"]


def by_length(asked):
    """A scorer of two members, one of which likes long answers more; notes how many it scored."""

    def score(samples):
        asked.append(len(samples))
        lengths = [float(len(text)) for text in samples.responses]
        return Scores(lengths, {"one": lengths, "two": [3 * length for length in lengths]})

    return score


@pytest.fixture
def asked(tmp_path):
    """Options of `rlhf collect sample` with three answers to each of three prompts from a file."""
    rows = [
        {"prompt": question, "response": "x" * (1 + 2**length)}
        for question in QUESTIONS
        for length in range(3)
    ]
    for name, own in {"p": [{"prompt": q} for q in QUESTIONS], "a": rows}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return SampleConfig(
        model_name_or_path=str(tmp_path / "a.jsonl"),
        data=[str(tmp_path / "p.jsonl")],
        store=str(tmp_path / "s.db"),
        test_fraction=0.0,
        select="disagreement",
        select_by=["org/one", "org/two"],
    )


def stored(config):
    with Store.open(config.store) as store:
        pairs = store.at().pairs().values()
        return sorted(tuple(sorted((len(p["text_a"]), len(p["text_b"])))) for p in pairs)


def test_a_round_after_the_votes_asks_about_other_pairs_and_scores_nothing_again(asked, capsys):
    scored = []
    counts = sample(asked, by_length(scored))
    # answers of 2, 3 and 5 letters: members are 3 times apart, most about the longest difference
    assert stored(asked) == [(2, 5)] * 3 and scored == [9]
    assert (counts["prompts"], counts["responses"], counts["comparisons"]) == (3, 6, 3)
    assert "3 comparisons of 9 by disagreement" in capsys.readouterr().out
    assert sample(asked, by_length(scored)) == counts and stored(asked) == [(2, 5)] * 3

    with Store.open(asked.store) as store:
        people = {kind: store.add_annotator(kind, kind=kind) for kind in ("person", "model")}
        first, second, third = store.at().pairs()
        store.vote(first, people["person"], "a")
        # neither a skip nor a model's vote is a judgement
        store.vote(second, people["person"], "skip")
        store.vote(third, people["model"], "a")
    asked.pairs = 3
    again = sample(asked, by_length(scored))
    # the prompt with a vote comes last: the others have two pairs that nobody has judged, and one
    # of each is new
    assert again["candidates"] == 8 and scored == [9]
    assert stored(asked) == sorted([(2, 5)] * 3 + [(3, 5)])


def test_scoring_goes_on_where_it_was_cut_off_and_starts_again_for_other_models(
    asked, monkeypatch, capsys
):
    monkeypatch.setattr(select, "PART", 4)
    scored = []

    def fails(samples):
        if scored:
            raise KeyboardInterrupt
        return by_length(scored)(samples)

    with pytest.raises(KeyboardInterrupt):
        sample(asked, fails)
    sample(asked, by_length(scored))
    assert scored == [4, 4, 1] and stored(asked) == [(2, 5)] * 3
    asked.select_by = ["org/one", "org/three"]
    sample(asked, by_length(scored))
    assert scored == [4, 4, 1, 4, 4, 1]
    assert "all answers are scored again" in capsys.readouterr().out


def test_random_pairs_depend_on_the_seed_and_need_no_model(asked, tmp_path):
    asked.select, asked.select_by, asked.pairs = "random", [], 3
    found = set()
    for seed in range(8):
        asked.seed, asked.store = seed, str(tmp_path / f"{seed}.db")
        assert sample(asked)["comparisons"] == 3
        with Store.open(asked.store) as store:
            pairs = store.at().pairs().values()
        assert len({pair["messages"][0]["content"] for pair in pairs}) == 3
        found.add(tuple(stored(asked)))
    assert len(found) > 2


def test_where_every_pair_has_a_vote_more_answers_are_asked_for(asked):
    asked.pairs = 9
    sample(asked, by_length([]))
    with Store.open(asked.store) as store:
        ann = store.add_annotator("ann")
        for pair in store.at().pairs():
            store.vote(pair, ann, "tie")
    with pytest.raises(UserError, match="every pair of these answers has a vote"):
        sample(asked, by_length([]))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--select_by a,b", "'select_by' alone meant disagreement"),
        ("--pairs 9", "'pairs' needs a rule"),
        ("--select margin", "'select_by' is empty; margin takes reward models"),
        ("--select random --select_by a", "'select_by' is a; random takes none"),
        ("--select disagreement --select_by a", "disagreement takes two or more reward models"),
        (
            "--select margin --select_by a,b --select_reference c",
            "the reference of one policy: give that in 'select_by'",
        ),
        ("--select random --runs a,b --split test", "would bend the win rate"),
        ("--select wurst", "uncertainty"),
    ],
)
def test_options_that_do_not_fit_are_refused(flags, message):
    source = [] if "--runs" in flags else ["--model_name_or_path", "m"]
    with pytest.raises(UserError, match=message):
        parse(SampleConfig, [*source, "--data", "d", "--store", "s", *flags.split()])


def test_a_policy_and_its_reference_are_one_model(sft_path, base_path):
    """Against the sums of log-softmax over the whole vocabulary, one row at a time."""
    import torch

    from reward.implicit import implicit_reward
    from rlhf.data.encode import encode_prompt, encode_response
    from rlhf.data.records import Samples
    from rlhf.model.loading import load_model, trainable_policy

    prompts = [[{"role": "user", "content": text}] for text in QUESTIONS[:2]]
    answers, ended = ["on its way", "it is"], [True, False]
    samples = Samples(prompts, answers, [[], []], [[], []], ended, [{}, {}])
    wanted = []
    for path in (sft_path, base_path):
        initial = load_model(path, "float32")
        model, tokenizer = initial.model, initial.tokenizer
        if path == sft_path:
            model = trainable_policy(initial, None)
        sums = []
        for prompt, answer, end in zip(prompts, answers, ended, strict=True):
            before = encode_prompt(tokenizer, prompt)
            ids = before + encode_response(tokenizer, answer, end)
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logprobs[t - 1, ids[t]]) for t in range(len(before), len(ids))))
        wanted.append(sums)
    found = implicit_reward(sft_path, base_path, 64, 8)(samples)
    expected = [own - other for own, other in zip(*wanted, strict=True)]
    assert max(map(abs, expected)) > 1e-3
    assert found.total == pytest.approx(expected, abs=1e-5)
    assert list(found.breakdown.values()) == [found.total]
