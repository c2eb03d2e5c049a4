import json
import math
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

import rlhf.http_client
from rlhf.compare.results import Point, Results
from rlhf.compare.wins import win_rate
from rlhf.errors import UserError
from rlhf.judge import policies
from rlhf.judge.judges import Judge, load_judge
from rlhf.judge.pairs import share_of_both_orders
from rlhf.judge.policies import one_partner_each
from rlhf.sandbox.annotators import ANNOTATORS, preference_logit, sigmoid


def point(method):
    """Sample k of the one and sample k of the other share no noise here, those beside each other
    do.
    """
    values, noise = {"length": np.ones((2, 2))}, [range(0, 1), range(1, 2)]
    noise = noise if method == "ppo" else noise[::-1]
    return Point(method=method, swept=None, seed=0, step=1, last=True, values=values, noise=noise)


A, B = point("ppo"), point("dpo")


def judge_wins(judge, results, a, b, cache):
    texts = {point.method: point.responses for point in results.points}
    a, b = (replace(point, responses=texts[point.method]) for point in (a, b))
    verdicts, _ = policies.judge_wins(judge, results, a, b, cache)
    return verdicts


def results_of(own, other):
    prompts = [[{"role": "user", "content": f"prompt {i}"}] for i in range(len(own))]
    return Results(
        points=[replace(A, responses=own), replace(B, responses=other)],
        groups=[str(i) for i in range(len(own))], prompts=prompts, score_kinds={},
        judge=None, methods={}, shared_budget={}, meta={},
    )  # fmt: skip


RESULTS = results_of(
    [["good one", "bad a"], ["good two", "good three"]],
    [["bad b", "good four"], ["bad c", "bad d"]],
)


def recording(ask, seen):
    def asked(prompts, first, second):
        seen.extend((p[0]["content"], x, y) for p, x, y in zip(prompts, first, second, strict=True))
        return ask(prompts, first, second)

    return asked


def good_wins(prompts, first, second):
    return [
        0.9 if x.startswith("good") and not y.startswith("good") else 0.1
        for x, y in zip(first, second, strict=True)
    ]


def first_wins(prompts, first, second):
    return [0.8] * len(prompts)


def annotators_favour_left(prompts, first, second):
    """The sandbox's "sim-favours-left": a logit of 0.6 for the left side, 0.2 of gold worth one
    logit.
    """
    judge = next(a for a in ANNOTATORS if a.name == "sim-favours-left")
    gold = [
        [1.0 if text.startswith("good") else 0.4 for text in texts] for texts in (first, second)
    ]
    return [
        sigmoid(preference_logit(judge, pair, (2, 2), "a", 0.2)) for pair in zip(*gold, strict=True)
    ]


def test_the_better_answers_win_in_both_orders(tmp_path):
    # A is good at (0,0), (1,0), (1,1) and bad at (0,1): (0.9 + 1 - 0.1) / 2 = 0.9 and 0.1
    seen = []
    found = judge_wins(
        Judge("j", recording(good_wins, seen)), RESULTS, A, B, tmp_path / "judge.jsonl"
    )
    np.testing.assert_allclose(found.wins, [[0.9, 0.1], [0.9, 0.9]], atol=1e-12)
    assert (found.consistency, found.asked) == (1.0, 4) and found.prefers_first == pytest.approx(
        0.5
    )
    assert (
        ("prompt 0", "good one", "bad b") in seen
        and ("prompt 0", "bad b", "good one") in seen
        and len(seen) == 8
    )
    back = judge_wins(Judge("j", good_wins), RESULTS, B, A, tmp_path / "judge.jsonl")
    np.testing.assert_allclose(back.wins, 1 - found.wins, atol=1e-12)


def test_a_judge_that_always_prefers_the_first_decides_nothing(tmp_path):
    # 0.8 in both orders: (0.8 + 1 - 0.8) / 2 = 0.5
    found = judge_wins(Judge("first", first_wins), RESULTS, A, B, tmp_path / "judge.jsonl")
    np.testing.assert_allclose(found.wins, np.full((2, 2), 0.5), atol=1e-12)
    assert found.consistency == 0.0 and found.prefers_first == pytest.approx(0.8)
    rate = win_rate([A], [B], RESULTS, [found])
    assert rate.raw.estimate == pytest.approx(0.5) and rate.consistency == 0.0 and rate.ties == 1.0


def test_a_contradiction_is_a_tie_however_sure_each_order_was():
    # .9 and .6 both prefer the first: a tie, where the average alone would say .65; .2 and .4 both
    # prefer the second
    found = share_of_both_orders(
        np.array([0.9, 0.2, 0.9, 0.5, 0.7]), np.array([0.6, 0.4, 0.2, 0.5, 0.5])
    )
    np.testing.assert_allclose(found, [0.5, 0.5, 0.85, 0.5, 0.6], atol=1e-12)


def test_an_annotator_of_the_sandbox_judges_and_the_swap_takes_its_side_away(tmp_path):
    # good against bad: sigmoid(.6/.2 +- .6) -> p1 = sigmoid(3.6) = .973403, p2 = sigmoid(-2.4) =
    # .083173 -> .945115 two equally good ones: sigmoid(.6) in both orders, a contradiction
    results = results_of([["good one", "good two"]], [["bad b", "good four"]])
    found = judge_wins(
        Judge("left", annotators_favour_left), results, A, B, tmp_path / "judge.jsonl"
    )
    np.testing.assert_allclose(found.wins, [[0.945115, 0.5]], atol=1e-6)
    assert found.consistency == 0.5 and found.prefers_first > 0.55


def test_equal_answers_are_a_tie_and_not_asked_about(tmp_path):
    seen = []
    results = results_of([["same", "good x"]], [["same", "bad y"]])
    found = judge_wins(
        Judge("j", recording(good_wins, seen)), results, A, B, tmp_path / "judge.jsonl"
    )
    np.testing.assert_allclose(found.wins, [[0.5, 0.9]], atol=1e-12)
    assert found.asked == 1 and len(seen) == 2
    equal = results_of([["same", "s"]], [["same", "s"]])
    none = judge_wins(Judge("j", good_wins), equal, A, B, tmp_path / "judge.jsonl")
    assert none.wins.tolist() == [[0.5, 0.5]] and math.isnan(none.consistency) and none.asked == 0


def test_a_killed_judge_goes_on_where_it_was(tmp_path):
    cache, seen = tmp_path / "cache" / "judge.jsonl", []

    def dies(prompts, first, second):
        if len(seen) >= 4:
            raise KeyboardInterrupt
        return recording(good_wins, seen)(prompts, first, second)

    with pytest.raises(KeyboardInterrupt):
        judge_wins(Judge("j", dies, batch_size=2), RESULTS, A, B, cache)
    assert len(cache.read_text().splitlines()) == 4
    with open(cache, "a") as file:
        file.write('{"key": "half a li')
    again = []
    found = judge_wins(Judge("j", recording(good_wins, again)), RESULTS, A, B, cache)
    np.testing.assert_allclose(found.wins, [[0.9, 0.1], [0.9, 0.9]], atol=1e-12)
    assert len(again) == 4 and not set(again) & set(seen)
    # the half line was ended, and not taken for an answer
    lines = cache.read_text().splitlines()
    assert lines[4] == '{"key": "half a li' and all(map(json.loads, lines[:4] + lines[5:]))
    assert len(lines) == 9
    judge_wins(Judge("j", recording(good_wins, again)), RESULTS, A, B, cache)
    assert len(again) == 4  # nothing is asked twice
    judge_wins(Judge("another", recording(good_wins, again)), RESULTS, A, B, cache)
    assert len(again) == 12  # but another judge has its own say


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([0.5], "1 answers for 8 pairs"),
        (None, "NoneType for 8 pairs"),
        ([0.5] * 7 + [1.5], "answered 1.5, expected the probability"),
        ([0.5] * 7 + [math.nan], "answered nan"),
        ([0.5] * 7 + ["yes"], "answered 'yes'"),
    ],
)
def test_answers_that_are_no_probabilities_are_refused(tmp_path, answer, message):
    with pytest.raises(UserError, match=message):
        judge_wins(Judge("j", lambda *_: answer), RESULTS, A, B, tmp_path / "judge.jsonl")


def test_null_is_no_verdict_and_is_not_asked_for_again(tmp_path):
    def unsure(prompts, first, second):
        return [None if "bad b" in (x, y) else 1.0 for x, y in zip(first, second, strict=True)]

    seen = []
    for _ in range(2):
        judge = Judge("j", recording(unsure, seen))
        found = judge_wins(judge, RESULTS, A, B, tmp_path / "judge.jsonl")
        # the rest prefer the first in both orders: ties
        np.testing.assert_array_equal(found.wins, [[np.nan, 0.5], [0.5, 0.5]])
        assert found.consistency == 0.0 and found.prefers_first == 1.0
    assert len(seen) == 8


def test_numpy_answers_are_answers(tmp_path):
    found = judge_wins(
        Judge("j", lambda p, *_: np.full(len(p), 0.25)), RESULTS, A, B, tmp_path / "judge.jsonl"
    )
    assert found.wins.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_answers_that_share_their_noise_are_not_compared(tmp_path):
    # sample k of each has draw k: each sample of A is asked about with the next one of B, and with
    # no other
    a, b = (replace(p, noise=None) for p in (A, B))
    seen = []
    found = judge_wins(
        Judge("j", recording(good_wins, seen)), RESULTS, a, b, tmp_path / "judge.jsonl"
    )
    # good one - good four: a tie of .1 and .1 in both orders; bad a - bad b; good two - bad d; good
    # three - bad c
    assert found.pairs == [(0, 1), (1, 0)] and len(seen) == 8
    np.testing.assert_allclose(found.wins, [[0.5, 0.5], [0.9, 0.9]], atol=1e-12)
    assert ("prompt 0", "good one", "good four") in seen and (
        "prompt 0",
        "good one",
        "bad b",
    ) not in seen
    assert one_partner_each([(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]) == [
        (0, 1),
        (1, 2),
        (2, 0),
    ]
    # 5, 9 and 4, 4 against 1 and 1
    lengths = replace(a, values={"length": np.array([[5.0, 9.0], [4.0, 4.0]])})
    assert win_rate([lengths], [b], RESULTS, [found]).length_difference == pytest.approx(
        (6 + 3) / 2
    )


def test_with_one_sample_a_prompt_nothing_is_asked(tmp_path):
    one = replace(A, values={"length": np.ones((2, 1))}, noise=None)
    found = judge_wins(Judge("j", good_wins), RESULTS, one, one, tmp_path / "judge.jsonl")
    assert (
        found.pairs == [] and found.asked == 0 and win_rate([one], [one], RESULTS, [found]) is None
    )


def test_a_spoilt_cache_is_refused(tmp_path):
    (tmp_path / "judge.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match="line 1: not an answer of a judge"):
        judge_wins(Judge("j", good_wins), RESULTS, A, B, tmp_path / "judge.jsonl")


def test_judges_are_loaded_by_what_the_file_says(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(
        "def prefer(prompts, first, second):\n    return [1.0] * len(prompts)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    judge = load_judge({"function": "my_judges:prefer", "batch_size": 7})
    assert (judge.name, judge.batch_size, judge.ask([1], ["a"], ["b"])) == (
        "my_judges:prefer",
        7,
        [1.0],
    )
    for spec, message in (
        ({"function": "my_judges:prefers"}, "has no function 'prefers'. Did you mean 'prefer'"),
        ({"function": "my_judge_s:prefer"}, "there is no module 'my_judge_s'"),
        ({"function": "prefer"}, "should be written module:function"),
        ({"http": "judge.example.com"}, "the URL is"),
        ({"http": "https://me:secret@judge.example.com"}, "holds a user name or a password"),
        (
            {"http": "https://judge.example.com", "timout": 3},
            "unknown key 'timout'. Did you mean 'timeout'",
        ),
        ({"http": "https://judge.example.com", "batch_size": 0}, "judge.batch_size: found 0"),
        (
            {"http": "https://judge.example.com", "token_env": "NO_SUCH_TOKEN"},
            "NO_SUCH_TOKEN is not set",
        ),
        (
            {"model": "runs/x"},
            "expected {function: module:function}, {http: URL} or {openai: URL, model: NAME}",
        ),
    ):
        with pytest.raises(UserError) as error:
            load_judge(spec)
        assert message in str(error.value)
        assert "secret" not in str(error.value)


@pytest.fixture()
def service():
    """A judge behind a URL: first an error that passes, then answers; `asked` holds what came in."""
    asked, plan = [], [503]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = plan.pop(0) if plan else 200
            asked.append((status, self.headers.get("Authorization"), body))
            content = {"probabilities": good_wins(body["prompts"], body["first"], body["second"])}
            text = json.dumps(
                content
                if status == 200
                else {"error": f"not today, {self.headers.get('Authorization')}"}
            )
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/pairs", asked, plan
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_service_is_asked_again_after_an_error_that_passes(service, tmp_path, monkeypatch):
    url, asked, plan = service
    monkeypatch.setenv("JUDGE_TOKEN", "hush")
    monkeypatch.setenv("JUDGE_KEY", "k9")
    monkeypatch.setattr(rlhf.http_client, "FIRST_WAIT", 0.01)
    judge = load_judge(
        {"http": url + "?key=${JUDGE_KEY}", "token_env": "JUDGE_TOKEN", "batch_size": 4}
    )
    assert judge.name == url
    found = judge_wins(judge, RESULTS, A, B, tmp_path / "judge.jsonl")
    np.testing.assert_allclose(found.wins, [[0.9, 0.1], [0.9, 0.9]], atol=1e-12)
    assert (
        sorted(status for status, _, _ in asked) == [200, 200, 503] and asked[0][1] == "Bearer hush"
    )
    assert [{"role": "user", "content": "prompt 0"}] in [body["prompts"][0] for _, _, body in asked]
    plan += [400]
    with pytest.raises(UserError, match=r"HTTP 400: .*not today, Bearer \*\*\*") as error:
        judge.ask([1], ["good"], ["b"])
    assert "k9" not in str(error.value)


def test_a_service_that_does_not_respond_is_named():
    judge = load_judge({"http": "http://127.0.0.1:9/pairs?n=k9", "retries": 0, "timeout": 1})
    with pytest.raises(
        UserError, match=r"judge \(http://127.0.0.1:9/pairs\) did not respond after 1 attempt"
    ) as error:
        judge.ask([1], ["a"], ["b"])
    assert "k9" not in str(error.value)
