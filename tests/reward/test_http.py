import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import rlhf.http_client
from reward.compose import build_scorer
from reward.http import http_scorer
from reward.specs import HttpSpec
from rlhf.data.records import BadScore, Samples
from rlhf.errors import UserError
from rlhf.http_client import Service, check_url, retry_after

SECRET = "s3cret-t0ken"


def samples(*responses):
    n = len(responses)
    prompts = [[{"role": "user", "content": f"question {i}"}] for i in range(n)]
    ended, metadata = [i % 2 == 0 for i in range(n)], [{"group": i} for i in range(n)]
    return Samples(prompts, list(responses), [[1]] * n, [[2]] * n, ended, metadata)


def lengths(asked):
    """What a right service answers here: the number of characters, and whether a response ended."""
    rows = asked["samples"]
    parts = {"ended": [float(row["ended"]) for row in rows]}
    return 200, {"scores": [len(row["response"]) for row in rows], "breakdown": parts}


@pytest.fixture
def service(monkeypatch):
    """A service on loopback. `service.answers` are used up one a request, the last one again and
    again.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.asked.append((asked, dict(self.headers)))
                answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            status, content, *headers = answer(asked) if callable(answer) else answer
            body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.asked, server.answers, server.handler = (
        threading.Lock(),
        [],
        [lengths],
        Handler,
    )
    server.url = f"http://127.0.0.1:{server.server_port}/tone?key=${{TONE_KEY}}"
    server.handle_error = lambda *args: None  # a client that gave up
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(rlhf.http_client, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("TONE_KEY", SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def scorer(service, **options):
    return build_scorer([{"http": service.url, **options}])


def refused(service, *responses, **options):
    with pytest.raises(UserError) as caught:
        scorer(service, **options)(samples(*(responses or ("a", "bb"))))
    assert SECRET not in str(caught.value)
    return str(caught.value)


def test_a_request_is_what_the_protocol_says(service):
    rows = samples("a", "bb")
    rows.metadata = [
        {"n": np.int64(3), "x": math.nan},
        {"when": datetime(2026, 1, 2), "list": [1, None]},
    ]
    scores = scorer(service)(rows)
    assert scores.total == [1.0, 2.0]
    assert scores.breakdown == {"tone": [1.0, 2.0], "tone/ended": [1.0, 0.0]}
    question = [[{"role": "user", "content": f"question {i}"}] for i in range(2)]
    metadata = [{"n": 3, "x": None}, {"when": "2026-01-02 00:00:00", "list": [1, None]}]
    assert service.asked[0][0] == {
        "samples": [
            {"prompt": question[0], "response": "a", "ended": True, "metadata": metadata[0]},
            {"prompt": question[1], "response": "bb", "ended": False, "metadata": metadata[1]},
        ]
    }
    assert "Authorization" not in service.asked[0][1]


def test_batches_come_back_in_order_however_long_each_takes(service):
    def slower_for_earlier(asked):
        time.sleep(0.02 * (10 - asked["samples"][0]["metadata"]["group"]))
        return lengths(asked)

    service.answers = [slower_for_earlier]
    scores = scorer(service, batch_size=3)(samples(*("x" * n for n in range(1, 9))))
    assert scores.total == [float(n) for n in range(1, 9)]
    assert scores.breakdown["tone/ended"] == [1.0, 0.0] * 4
    assert sorted(len(asked["samples"]) for asked, _ in service.asked) == [2, 3, 3]


def test_a_bare_list_of_scores_is_enough_and_no_samples_ask_nothing(service):
    service.answers = [(200, {"scores": [1, 2.5]})]
    assert scorer(service)(samples("a", "b")).breakdown == {"tone": [1.0, 2.5]}
    assert (
        http_scorer(HttpSpec(name="tone", http=service.url))(samples()).total == []
        and len(service.asked) == 1
    )


def test_null_in_a_part_says_that_it_does_not_apply(service):
    service.answers = [(200, {"scores": [1, 2], "breakdown": {"item": [None, 3]}})]
    part = scorer(service)(samples("a", "b")).breakdown["tone/item"]
    assert math.isnan(part[0]) and part[1] == 3.0


def test_the_token_is_sent_and_never_printed(service, monkeypatch, capfd):
    monkeypatch.setenv("TONE_TOKEN", f" {SECRET}\n")
    echo = json.dumps({"error": f"{SECRET} is not allowed"})
    service.answers = [(503, echo), lengths, (403, echo)]
    score = scorer(service, token_env="TONE_TOKEN")
    assert score(samples("a")).total == [1.0]
    assert [headers["Authorization"] for _, headers in service.asked] == [f"Bearer {SECRET}"] * 2
    with pytest.raises(UserError, match=r"HTTP 403: .*\*\*\* is not allowed") as caught:
        score(samples("a"))
    printed = "".join(capfd.readouterr())
    assert "HTTP 503" in printed and SECRET not in printed + str(caught.value)
    assert SECRET not in repr(Service("tone", "http://h", 1.0, 1, SECRET))


def test_credentials_in_the_specification_are_refused_unseen():
    for spec in (
        {"http": f"http://user:{SECRET}@localhost/score"},
        {"http": f"user:{SECRET}@localhost/score"},
        {"http": "http://localhost/score", "token_env": SECRET},
    ):
        with pytest.raises(UserError, match="token") as caught:
            build_scorer([spec])
        assert SECRET not in str(caught.value)


def test_a_token_that_no_header_can_carry_is_refused_unseen(monkeypatch):
    monkeypatch.setenv("TONE_TOKEN", "s3cret\nt0ken")
    with pytest.raises(UserError, match="TONE_TOKEN holds") as caught:
        build_scorer([{"http": "http://localhost/score", "token_env": "TONE_TOKEN"}])
    assert "s3cret" not in str(caught.value)


def test_a_failure_that_passes_is_tried_again(service, capfd):
    service.answers = [(500, "out of memory"), (429, "too many"), lengths]
    assert scorer(service)(samples("a", "bb")).total == [1.0, 2.0]
    assert len(service.asked) == 3
    lines = capfd.readouterr().err.splitlines()
    assert re.search(
        r"scorer 'tone' \(http://127.0.0.1:\d+/tone\): HTTP 500: out of memory; retry 1 of 5",
        lines[0],
    )
    assert "HTTP 429" in lines[1] and "in 0.02 s" in lines[1]  # twice the first wait


def test_a_service_that_stays_away_stops_with_a_letter(service, capfd):
    service.answers = [(500, "out of memory")]
    message = refused(service, retries=2)
    assert len(service.asked) == 3
    # it waits before each retry, and not after the last
    assert len(capfd.readouterr().err.splitlines()) == 2
    for words in (
        "scorer 'tone' (http://127.0.0.1:",
        "did not respond after 3 attempts in ",
        "HTTP 500: out of memory",
        "Check that",
    ):
        assert words in message, message


def test_a_slow_service_times_out(service):
    def slow(asked):
        time.sleep(0.3)
        return lengths(asked)

    service.answers = [slow]
    message = refused(service, timeout=0.05, retries=1)
    assert "after 2 attempts" in message and "no whole answer within 0.05 s" in message


def test_a_closed_port_says_so(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/tone"
        with pytest.raises(UserError) as caught:
            build_scorer([{"http": url, "retries": 0}])(samples("a"))
    message = str(caught.value)
    assert "after 1 attempt in" in message and "no connection: Connection refused" in message


def test_a_connection_that_breaks_is_tried_again(service):
    def hang_up(asked):
        raise ConnectionAbortedError

    half = (200, '{"scores": [', ("Content-Length", "99"))
    service.answers = [hang_up, half, lengths]
    assert scorer(service)(samples("a")).total == [1.0]
    assert len(service.asked) == 3


def test_a_refusal_stops_at_once_with_the_servers_words(service):
    service.answers = [(400, {"error": "unknown voice"})]
    message = refused(service)
    assert (
        len(service.asked) == 1
        and "refused" in message
        and 'HTTP 400: {"error": "unknown voice"}' in message
    )
    service.answers = [(301, "", ("Location", "http://127.0.0.1:1/elsewhere"))]
    assert "sends elsewhere" in refused(service) and len(service.asked) == 2


def test_one_refused_batch_stops_the_others(service, monkeypatch):
    # the first batch waits for its retry: unless it is stopped, longer than a test may take
    monkeypatch.setattr(rlhf.http_client, "FIRST_WAIT", 900.0)
    monkeypatch.setattr(rlhf.http_client, "MAX_WAIT", 900.0)

    def refuse(asked):
        return (400, "no") if asked["samples"][0]["metadata"]["group"] else (500, "busy")

    service.answers = [refuse]
    assert "HTTP 400: no" in refused(service, "a", "b", batch_size=1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("<html>busy</html>", ["not JSON: <html>busy</html>"]),
        ([1, 2], ["answered [1, 2], expected"]),
        ({"score": [1, 2]}, ['expected {"scores"']),
        ({"scores": [1, 2], "breakdown": [1, 2]}, ['expected {"scores"']),
        ({"scores": [1]}, ["returned 1 numbers in 'scores' for 2 samples", "question 0"]),
        (
            {"scores": [1, 2], "breakdown": {"item": [1]}},
            ["1 numbers in 'item' for 2 samples", "question 0"],
        ),
        ({"scores": [1, None]}, ["returned None for sample 1", "question 1"]),
        ({"scores": ["1", 2]}, ["returned '1' for sample 0"]),
    ],
)
def test_an_answer_that_is_not_the_protocol_is_shown(service, content, words):
    service.answers = [(200, content)]
    message = refused(service)
    assert all(word in message for word in ("scorer 'tone'", *words)), message
    assert len(service.asked) == 1


def test_a_nan_is_a_bad_score_of_that_sample(service):
    service.answers = [
        lambda asked: (200, {"scores": [math.nan if r["ended"] else 1.0 for r in asked["samples"]]})
    ]
    rows = samples("a", "bb", "ccc", "dddd")
    rows.ended = [False, False, True, False]
    with pytest.raises(BadScore, match=r"question 2'\n  response: 'ccc'") as caught:
        scorer(service, batch_size=1)(rows)
    assert (caught.value.scorer, caught.value.index, math.isnan(caught.value.value)) == (
        "tone",
        2,
        True,
    )


def test_the_service_of_the_docs_is_understood(service):
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "HTTPServer" in block
    )
    names = {"__name__": "docs"}
    exec(code, names)
    service.RequestHandlerClass = type(
        "Quiet", (names["Tone"],), {"log_message": lambda *args: None}
    )
    assert scorer(service)(samples("Thank you!", "No.")).total == [1.0, 0.0]
    asked, answered = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.S))
    service.RequestHandlerClass = service.handler
    service.answers = [(200, answered)]
    rows = samples("Hello!")
    rows.prompts[0][0]["content"], rows.metadata[0] = "Hi", {"item": "kettle"}
    scores = scorer(service)(rows)
    assert service.asked[-1][0] == asked
    assert (scores.total, scores.breakdown["tone/warmth"]) == ([0.5], [0.7])


def test_parts_that_change_between_answers_are_refused(service):
    service.answers = [(200, {"scores": [1], "breakdown": {"item": [1]}}), (200, {"scores": [1]})]
    assert "breakdown differ" in refused(service, batch_size=1)


def test_retry_after_is_seconds_or_a_date_and_has_a_cap(service, monkeypatch, capfd):
    assert (retry_after(None), retry_after("7"), retry_after("soon"), retry_after("-1")) == (
        0.0,
        7.0,
        0.0,
        0.0,
    )
    assert retry_after(
        format_datetime(datetime.now(UTC) + timedelta(seconds=3000), True)
    ) == pytest.approx(3000, abs=300)
    assert retry_after(format_datetime(datetime.now(UTC) - timedelta(seconds=30), True)) == 0.0
    monkeypatch.setattr(rlhf.http_client, "MAX_WAIT", 0.03)
    service.answers = [(429, "later", ("Retry-After", "3600")), lengths]
    scorer(service)(samples("a"))
    assert "in 0.03 s" in capfd.readouterr().err


def test_the_specification_is_checked_without_loading_requests():
    code = (
        "import sys; from reward.specs import parse_specs; parse_specs([{'http': 'http://localhost/score'}])\n"
        "print('requests' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.strip() == "False", done.stderr


def test_an_answer_that_comes_drop_by_drop_times_out_as_a_whole(service):
    def drip(handler):
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(50):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    service.handler.do_POST = drip
    assert "no whole answer within 0.2 s" in refused(service, timeout=0.2, retries=0)


def test_an_endless_answer_is_cut_off(service, monkeypatch):
    monkeypatch.setattr(rlhf.http_client, "LONGEST_ANSWER", 2**20)
    sent = []

    def flood(handler):
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(200)
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(b"1" * 2**20)
            sent.append(1)

    service.handler.do_POST = flood
    assert "sent more than 1 MiB when asked to score 2 samples" in refused(service, retries=0)
    assert len(sent) < 100


def test_json_that_is_nested_too_deeply_is_no_json(service):
    service.answers = [(200, "[" * 100_000)]
    assert "answered with something that is not JSON" in refused(service)


def test_a_key_in_a_url_comes_from_the_environment(service, monkeypatch):
    paths = []
    post = service.handler.do_POST
    service.handler.do_POST = lambda handler: (paths.append(handler.path), post(handler))
    scorer(service)(samples("a"))
    assert paths == [f"/tone?key={SECRET}"]
    for wrong in (
        "key=abc",
        "n=1&api_key=abc",
        "apiKey=abc",
        "access_token=abc",
        "sig=abc",
        "x-auth=abc",
    ):
        with pytest.raises(
            UserError, match=r"looks like a key \(not shown\).*=\$\{SCORER_KEY\}"
        ) as error:
            check_url(f"http://h/score?{wrong}", "scorers")
        assert "abc" not in str(error.value)
    check_url("http://h/score?keyword=abc&author=abc&n=1", "scorers")
    monkeypatch.delenv("TONE_KEY")
    with pytest.raises(UserError, match="the environment variable TONE_KEY is not set"):
        scorer(service)
