import math
import pickle
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml

from reward.compose import build_scorer
from reward.specs import KINDS, VoiceSpec, parse_specs
from rlhf.data.records import BadScore, Samples, Scores
from rlhf.errors import UserError


def samples(*responses):
    n = len(responses)
    prompts = [[{"role": "user", "content": f"question {i}"}] for i in range(n)]
    return Samples(
        prompts, list(responses), [[1]] * n, [[2]] * n, [True] * n, [{} for _ in range(n)]
    )


def fixed(values, **breakdown):
    """A builder whose scorer always returns the same."""
    return lambda spec, tokenizer: lambda s: Scores(values, breakdown) if breakdown else values


def test_total_is_the_weighted_sum_and_the_breakdown_is_unweighted():
    # sample 0 "a b" : length(low 4) = 2/4, must_match 1 -> 2 * 0.5 - 0.5 * 1 = 0.5
    # sample 1 "x y z w.": 1, 0 -> 2.0
    score = build_scorer(
        [
            {"rule": "length", "low": 4, "high": 9, "weight": 2.0},
            {"rule": "must_match", "pattern": "^a", "weight": -0.5},
        ]
    )
    scores = score(samples("a b", "x y z w."))
    assert scores.total == pytest.approx([0.5, 2.0])
    assert scores.breakdown == {"length": [0.5, 1.0], "must_match": [1.0, 0.0]}


def test_parts_of_a_scorer_stand_under_its_name():
    builders = {VoiceSpec: fixed([1.0, 3.0], greeting=[0.0, 1.0])}
    scores = build_scorer(
        [{"voice": "configs/voices/shop.yaml", "weight": 0.5}], builders=builders
    )(samples("a", "b"))
    assert scores.total == [0.5, 1.5]
    assert scores.breakdown == {"shop": [1.0, 3.0], "shop/greeting": [0.0, 1.0]}


def test_default_names():
    specs = [
        {"model": "runs/reward/"},
        {"voice": "a/shop.yaml"},
        {"function": "math:floor"},
        {"rule": "length"},
    ]
    specs += [
        {"http": "http://localhost:80/v1/tone/?n=1"},
        {"http": "https://tone"},
        {"ensemble": ["runs/a", "b"]},
    ]
    names = ["reward", "shop", "floor", "length", "tone", "ensemble"]
    assert [spec.name for spec in parse_specs([s for i, s in enumerate(specs) if i != 5])] == names
    assert parse_specs([specs[5]])[0].name == "tone"


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(
        textwrap.dedent("""
        import numpy as np
        from rlhf.data.records import Scores
        def shout(samples, mark="!"): return np.array([r.count(mark) for r in samples.responses])
        def detailed(samples): return Scores([1.0] * len(samples), {"part": [2.0] * len(samples)})
        def broken(samples): return [1 / 0]
        """)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere", *__import__("sys").path])
    yield
    __import__("sys").modules.pop("my_scores", None)


def test_a_function_of_the_users_own_folder(user_module):
    specs = [
        {"function": "my_scores:shout", "mark": "?"},
        {"function": "my_scores:detailed", "weight": 10},
    ]
    scores = build_scorer(specs)(samples("a?", "??"))
    assert scores.total == [11.0, 12.0]
    assert scores.breakdown == {
        "shout": [1.0, 2.0],
        "detailed": [1.0, 1.0],
        "detailed/part": [2.0, 2.0],
    }


def test_every_example_of_the_docs_is_right(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "def shout" in block
    )
    (tmp_path / "my_scores.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TONE_TOKEN", "token")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.S)]
    blocks = [block["reward"] for block in blocks if "reward" in block]
    found = {type(spec) for specs in blocks for spec in parse_specs(specs)}
    assert found == set(KINDS.values())
    assert [spec.name for spec in parse_specs(blocks[0]) if not spec.weight] == ["length"]
    assert build_scorer([{"function": "my_scores:shout"}])(samples("a!!", "b")).total == [2.0, 0.0]
    sys.modules.pop("my_scores", None)


def test_an_exception_inside_a_function_names_the_scorer(user_module):
    with pytest.raises(ZeroDivisionError) as caught:
        build_scorer([{"function": "my_scores:broken"}])(samples("a"))
    assert "scorer 'broken'" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"modle": "runs/reward"}, "Did you mean 'model'"),
        ({"model": "runs/reward", "wieght": 2}, "unknown key 'wieght'. Did you mean 'weight'"),
        ({"rule": "lenght"}, "unknown rule 'lenght'. Did you mean 'length'"),
        ({"rule": "length", "hihg": 3}, "Did you mean 'high'"),
        ({"rule": "must_match"}, "needs 'pattern'"),
        ({"rule": "length", "voice": "x.yaml"}, "exactly one of"),
        ({"rule": "length", "weight": "heavy"}, "weight: found 'heavy', expected a number"),
        ({"rule": "length", "weight": math.inf}, "weight: found inf, expected a finite number"),
        ({"rule": "length", "name": "total"}, "cannot be used"),
        ({"rule": ["length"]}, "expected text"),
        ({"ensemble": "runs/a"}, "expected two or more reward models"),
        ({"ensemble": ["runs/a"]}, "expected two or more reward models"),
        ({"ensemble": ["runs/a", "./runs/a/"]}, "names a reward model twice"),
        ({"ensemble": ["a", "b"], "how": "wurst"}, "Did you mean 'worst'"),
        ({"ensemble": ["a", "b"], "how": "worst", "penalty": 1}, "Set how: uncertainty"),
        ({"ensemble": ["a", "b"], "how": "uncertainty", "penalty": -1}, "penalty: found -1"),
        ({"http": "localhost:8000/score"}, "expected http://HOST"),
        ({"http": "ftp://localhost/score"}, "expected http://HOST"),
        ({"http": "http://:8000/score"}, "expected http://HOST"),
        ({"http": "http://localhost:port/score"}, "expected http://HOST"),
        ({"http": "http://localhost/score", "timeout": 0}, "timeout: found 0"),
        ({"http": "http://localhost/score", "retries": -1}, "retries: found -1"),
        ({"http": "http://localhost/score", "batch_size": 0}, "batch_size: found 0"),
        ({"http": "http://localhost/score", "retrys": 1}, "Did you mean 'retries'"),
        (
            {"http": "http://localhost/score", "token_env": "NO_SUCH_TOKEN_HERE"},
            "NO_SUCH_TOKEN_HERE is not set",
        ),
        ({"function": "my_scores"}, "module:function"),
        ({"function": "no_such_module:f"}, "no module 'no_such_module'"),
        ({"function": "my_scores:shuot"}, "Did you mean 'shout'"),
        ({"function": "my_scores:shout", "marc": "?"}, "Did you mean 'mark'"),
        ("runs/reward", "expected a mapping"),
    ],
)
def test_a_bad_specification_says_what_is_right(spec, words, user_module):
    with pytest.raises(UserError, match="scorer") as caught:
        build_scorer([spec])
    assert words in str(caught.value)


def test_two_scorers_may_not_share_a_name():
    with pytest.raises(
        UserError, match=r"second scorer is called 'length', as entry 1 is.*name: length-2"
    ):
        build_scorer([{"rule": "length"}, {"rule": "length", "low": 3}])
    with pytest.raises(
        UserError,
        match=r"entry 3: a second scorer is called 'b', as entry 2 is.*{model: ..., name: b-3",
    ):
        parse_specs([{"model": "runs/a"}, {"model": "old/b"}, {"model": "runs/b"}])
    with pytest.raises(UserError, match="expected a list"):
        build_scorer([])


def test_a_wrong_entry_is_named_with_its_option():
    with pytest.raises(
        UserError, match=r"^eval_scorers, entry 2.*unknown key 'wieght'. Did you mean 'weight'\?"
    ):
        parse_specs([{"rule": "length"}, {"model": "runs/a", "wieght": 2}], "eval_scorers")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([0.0, math.nan], ["scorer 'bad'", "question 1", "'second'"]),
        ([math.inf, 0.0], ["scorer 'bad'", "question 0"]),
        ([0.0, None], ["returned None for sample 1", "question 1"]),
        ([0.0, "1"], ["returned '1' for sample 1"]),
        ([0.0], ["scorer 'bad'", "1 scores for 2 samples", "question 0"]),
        (0.5, ["scorer 'bad'", "returned float", "question 0"]),
        (np.zeros((2, 1)), ["scorer 'bad'", "question 0"]),
        ([0.0, 10**400], ["returned 1000", "000... for sample 1, expected a finite number"]),
    ],
)
def test_a_scorer_that_misbehaves_is_named_with_the_prompt(returned, words):
    score = build_scorer([{"voice": "bad.yaml"}], builders={VoiceSpec: fixed(returned)})
    with pytest.raises(UserError) as caught:
        score(samples("first", "second"))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_can_be_told_from_other_mistakes(value):
    score = build_scorer(
        [{"rule": "length"}, {"voice": "bad.yaml"}], builders={VoiceSpec: fixed([0.0, value, 1.0])}
    )
    with pytest.raises(BadScore) as caught:
        score(samples("a", "b", "c"))
    error = pickle.loads(pickle.dumps(caught.value))  # as it goes from one rank to another
    assert (error.scorer, error.index, repr(error.value), str(error)) == (
        "bad",
        1,
        repr(value),
        str(caught.value),
    )
    score = build_scorer([{"voice": "bad.yaml"}], builders={VoiceSpec: fixed([0.0, None, 1.0])})
    with pytest.raises(UserError) as caught:
        score(samples("a", "b", "c"))
    assert not isinstance(caught.value, BadScore)


def test_a_scorer_of_weight_0_is_watched():
    # total = 2 * length; "a b" has 2 of 4 words
    specs = [
        {"rule": "length", "low": 4, "high": 9, "weight": 2.0},
        {"voice": "shop.yaml", "weight": 0},
    ]
    scores = build_scorer(specs, builders={VoiceSpec: fixed([7.0], item=[3.0])})(samples("a b"))
    assert scores.total == pytest.approx([1.0])
    assert scores.breakdown == {"length": [0.5], "shop": [7.0], "shop/item": [3.0]}
    with pytest.raises(BadScore, match="scorer 'shop'"):  # a watcher that fails is said too
        build_scorer(specs, builders={VoiceSpec: fixed([math.nan])})(samples("a b"))
    with pytest.raises(UserError, match="every weight is 0 \\(shop\\)"):
        build_scorer(specs[1:])


def test_a_bad_part_of_the_breakdown_is_caught_too():
    score = build_scorer(
        [{"voice": "bad.yaml"}], builders={VoiceSpec: fixed([0.0, 0.0], greeting=[0.0])}
    )
    with pytest.raises(
        UserError, match="scorer 'bad', part 'greeting' returned 1 scores for 2 samples"
    ):
        score(samples("a", "b"))


def test_nan_in_a_part_says_that_it_does_not_apply():
    builders = {VoiceSpec: fixed([0.0, 1.0], **{"shop/item": [math.nan, 1.0]})}
    scores = build_scorer([{"voice": "shop.yaml"}], builders=builders)(samples("a", "b"))
    assert scores.total == [0.0, 1.0]
    # already under its name: not shop/shop/item
    assert math.isnan(scores.breakdown["shop/item"][0])
    builders = {VoiceSpec: fixed([0.0, 1.0], item=[math.inf, 1.0])}
    with pytest.raises(BadScore, match="scorer 'shop', part 'item'") as caught:
        build_scorer([{"voice": "shop.yaml"}], builders=builders)(samples("a", "b"))
    assert (caught.value.scorer, caught.value.index, caught.value.value) == ("shop", 0, math.inf)
