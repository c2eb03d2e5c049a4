"""`rlhf chat` and `rlhf serve` as programs."""

import concurrent.futures
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import requests

from rlhf.cli import main as rlhf
from rlhf.config import parse
from rlhf.errors import UserError
from rlhf.http_server import listen
from rlhf.serve.run import ServeConfig
from tests.conftest import ROOT
from tests.serve.conftest import QUESTION

COMMAND = [sys.executable, "-m", "rlhf.cli"]
GREEDY = ["--temperature", "0", "--max_response_length", "12"]


def chat(arguments, text, cwd):
    command = [*COMMAND, "chat", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=cwd, timeout=300)


def test_a_script_talks_to_two_runs_side_by_side(runs, sampler):
    script = "where is my parcel?\n\nthank you\n/reset\nwhere is my parcel?\n/exit\nnever\n"
    voice = ["--voice", str(ROOT / "configs/voices/shop.yaml")]
    done = chat([*runs, *GREEDY, *voice], script, ROOT)
    assert done.returncode == 0, done.stderr
    # each run goes on with its own first answer
    expected = []
    for turns in (1, 2, 1):
        for run, name in zip(runs, ("sft", "ppo"), strict=True):
            messages = list(QUESTION)
            if turns == 2:
                first = sampler(run, QUESTION, 12)[0]
                messages.append({"role": "assistant", "content": first})
                messages.append({"role": "user", "content": "thank you"})
            expected.append((name, sampler(run, messages, 12)[0]))
    score = r"  score (\d\.\d\d) \((?:\w+ \d\.\d\d(?:, )?)+\)"
    found = re.findall(rf"\[(\w+)\]\n(.*?)\n{score}\n\n", done.stdout, re.S)
    assert [(name, text) for name, text, _ in found] == expected
    assert len({text for _, text, _ in found}) == 4


def test_one_question_from_a_script(runs, sampler):
    for arguments, text in (
        (["--prompt", QUESTION[0]["content"]], None),
        (["--prompt", "-"], f"{QUESTION[0]['content']}\n"),
    ):
        done = chat([runs[0], *GREEDY, *arguments], text, ROOT)
        assert done.stdout == sampler(runs[0], QUESTION, 12)[0] + "\n"
        assert "cut off after 12 tokens" in done.stderr


def test_commands_of_a_chat(runs, sampler, capsys, monkeypatch):
    """In this process: a new system prompt, another answer, help, and what is unknown."""
    from rlhf.serve.chat import Chat, ChatConfig, obey

    talk = Chat(ChatConfig(runs=[runs[0]], temperature=1.0, max_response_length=8), None)
    with pytest.raises(UserError, match="no message to answer"):
        obey(talk, "/again")
    obey(talk, "/system  be kind")
    obey(talk, "where is my parcel?")
    first = talk.speakers[0].messages
    assert [m["role"] for m in first] == ["system", "user", "assistant"]
    assert first[0]["content"] == "be kind"
    before = first[-1]["content"]
    obey(talk, "/again")
    after = talk.speakers[0].messages
    assert len(after) == 3 and after[-1]["content"] != before
    # a new conversation with the same seed gets the same answer
    obey(talk, "/reset")
    obey(talk, "where is my parcel?")
    assert talk.speakers[0].messages[-1]["content"] == before
    obey(talk, "/help")
    assert "/system TEXT" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown command '/sytem'"):
        obey(talk, "/sytem")

    # a message that a policy cannot take is forgotten
    kept = list(talk.speakers[0].messages)
    with pytest.raises(UserError, match=r"512 tokens.*/reset begins again"):
        obey(talk, "parcel " * 600)
    assert talk.speakers[0].messages == kept


def test_a_wrong_voice_is_found_before_a_model_is_loaded(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        rlhf(["chat", runs[0], "--voice", str(tmp_path / "none.yaml"), "--prompt", "a"])
    assert stop.value.code == 2 and "none.yaml" in capsys.readouterr().err


def test_other_machines_need_a_key(monkeypatch):
    with pytest.raises(UserError, match=r"--host: 'host' is 0\.0\.0\.0.*--api_key_env"):
        parse(ServeConfig, ["--runs", "a", "--host", "0.0.0.0"])
    monkeypatch.delenv("SERVE_KEY", raising=False)
    with pytest.raises(UserError, match="SERVE_KEY is not set"):
        parse(ServeConfig, ["--runs", "a", "--api_key_env", "SERVE_KEY"])
    monkeypatch.setenv("SERVE_KEY", "s")
    parse(ServeConfig, ["--runs", "a", "--host", "0.0.0.0", "--api_key_env", "SERVE_KEY"])


def test_an_interrupted_answer_is_forgotten_and_ends_a_script(runs, monkeypatch, capsys):
    from rlhf.serve.chat import Chat, ChatConfig, attempt, obey

    talk = Chat(ChatConfig(runs=runs, max_response_length=4), None)
    talk.say("hello")
    kept = [list(speaker.messages) for speaker in talk.speakers]
    second = talk.speakers[1].policy

    def interrupted(*_):
        raise KeyboardInterrupt

    # the first has answered when the second is interrupted
    monkeypatch.setattr(second, "generate", interrupted)
    attempt(lambda line: obey(talk, line), "and now?", is_terminal=True)
    assert "this message is forgotten" in capsys.readouterr().err
    assert [speaker.messages for speaker in talk.speakers] == kept
    with pytest.raises(SystemExit) as stop:
        attempt(talk.say, "and now?", is_terminal=False)
    assert stop.value.code == 130
    # a person goes on after an error, a script does not
    attempt(lambda line: obey(talk, line), "/what", is_terminal=True)
    assert "unknown command '/what'" in capsys.readouterr().err
    with pytest.raises(UserError):
        attempt(lambda line: obey(talk, line), "/what", is_terminal=False)


def serving(runs, *arguments):
    """Start a server on a free port; return its process and its address."""
    pytest.importorskip("uvicorn", reason="the extra 'collect' is not installed")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*COMMAND, "serve", *runs, "--port", str(port), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    first = process.stdout.readline()
    assert first.startswith("serving sft, ppo, base") and f"http://127.0.0.1:{port}/v1" in first
    return process, f"http://127.0.0.1:{port}/v1/chat/completions"


def test_a_server_ends_on_a_signal(runs):
    process, address = serving(runs)
    body = {"model": "ppo", "messages": QUESTION, "max_tokens": 3, "temperature": 0}
    # printed before the server answers; the socket listens already
    assert requests.post(address, json=body, timeout=60).status_code == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    # a line for the request, without its words, and no traceback
    assert re.fullmatch(r"\d\d:\d\d:\d\d ppo: \d+ \+ 3 tokens, \d+\.\d s\n", err), err
    assert out == ""


def wait_for_connections(process: subprocess.Popen, count: int) -> None:
    """Wait until a server has taken so many connections, and read what was asked."""
    server, end = psutil.Process(process.pid), time.monotonic() + 120
    while sum(c.status == "ESTABLISHED" for c in server.net_connections("tcp")) < count:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    # it reads right after it has taken one
    time.sleep(1)


def test_requests_that_wait_are_told_when_a_server_ends(runs):
    process, address = serving(runs, "--batch_size", "1")
    # minutes of work
    body = {"model": "sft", "messages": QUESTION, "max_tokens": 400, "n": 128}

    def ask(stream):
        return requests.post(address, json={**body, "stream": stream}, timeout=120)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, stream) for stream in (True, True, False)]
        wait_for_connections(process, 3)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
        streamed, queued, whole = (answer.result() for answer in answers)
    assert process.returncode == 0 and "Traceback" not in err, err
    for answer in (streamed, queued):
        last = [line for line in answer.text.splitlines() if line][-1]
        assert "the server is shutting down" in last
    assert whole.status_code == 503
    assert whole.json()["error"]["message"] == "the server is shutting down"
    assert len(re.findall("cut off", err)) == 3
