"""OpenAI's protocol, spoken by its own client, and what is refused."""

import concurrent.futures
import http.client
import json
import re
import time
from urllib.parse import urlsplit

import pytest
import requests

from rlhf.engines.sampling import sample_key
from tests.serve.conftest import QUESTION


@pytest.fixture(scope="module")
def client(url):
    openai = pytest.importorskip("openai", reason="pip install openai")
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def post(url, path="chat/completions", key=None, **fields):
    body = {"model": "sft", "messages": QUESTION, "max_tokens": 3, **fields}
    body = {name: value for name, value in body.items() if value != "left out"}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return requests.post(f"{url}/{path}", json=body, headers=headers, timeout=60)


def test_models_are_the_runs_and_their_base(client, policies):
    cards = list(client.models.list())
    assert [card.id for card in cards] == list(policies)
    assert [card.parent for card in cards] == [cards[2].id, cards[2].id, None]
    assert client.models.retrieve("ppo").id == "ppo"


def test_each_name_answers_with_the_tokens_of_its_run(client, policies, runs, base_path, sampler):
    texts = set()
    for name, path in zip(policies, [*runs, base_path], strict=True):
        text, ids, logprobs = sampler(path, QUESTION, 20)
        answer = client.chat.completions.create(
            model=name, messages=QUESTION, temperature=0, max_tokens=20, logprobs=True
        )
        choice = answer.choices[0]
        assert choice.message.content == text and answer.model == name
        entries = choice.logprobs.content
        # the log-probability of each token, and its text
        decoder = policies[name].tokenizer
        assert [entry.token for entry in entries] == [decoder.decode([token]) for token in ids]
        assert [entry.logprob for entry in entries] == pytest.approx(logprobs, abs=1e-5)
        prompt = len(decoder.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"])
        assert answer.usage.prompt_tokens == prompt
        assert answer.usage.completion_tokens == len(ids)
        assert answer.usage.total_tokens == prompt + len(ids)
        texts.add(text)
    assert len(texts) == 3


def test_a_stream_has_the_pieces_of_the_same_answer(client):
    asked = {"model": "ppo", "messages": QUESTION, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    # text comes while tokens are drawn, not in one piece
    assert len([piece for piece in pieces if piece]) > 3
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_choices_are_told_apart_in_a_stream(client):
    asked = {"model": "sft", "messages": QUESTION, "n": 3, "seed": 5, "max_tokens": 8}
    whole = client.chat.completions.create(**asked)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert whole.usage.completion_tokens == 24


def test_a_seed_gives_the_answer_of_its_key(client, runs, sampler, policies):
    from rlhf.data.encode import encode_prompt

    prompt = encode_prompt(policies["sft"].tokenizer, QUESTION)
    for seed, top_p in ((1, 1.0), (2, 0.5)):
        key = sample_key(seed, "serve", prompt, 0)
        expected = sampler(runs[0], QUESTION, 10, key=key, temperature=0.7, top_p=top_p)[0]
        answer = client.chat.completions.create(
            **{"model": "sft", "messages": QUESTION, "max_completion_tokens": 10},
            **{"seed": seed, "temperature": 0.7, "top_p": top_p},
        )
        assert answer.choices[0].message.content == expected
    # without one, each answer has another
    free = {
        client.chat.completions.create(model="sft", messages=QUESTION).choices[0].message.content
        for _ in range(3)
    }
    assert len(free) > 1


def test_a_stop_text_ends_an_answer_before_it(client, runs, sampler):
    text, _, _ = sampler(runs[1], QUESTION, 20)
    stop = text[4:7]
    assert text.index(stop) == 4
    for stream in (False, True):
        answer = client.chat.completions.create(
            **{"model": "ppo", "messages": QUESTION, "temperature": 0, "max_tokens": 20},
            **{"stop": ["never", stop], "stream": stream},
        )
        if stream:
            chunks = list(answer)
            found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            found, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (found, reason) == (text[:4].rstrip(), "stop")


def test_an_answer_that_ends_by_itself_says_so(client, policies, monkeypatch, runs, sampler):
    ids = sampler(runs[0], QUESTION, 4)[1]
    monkeypatch.setattr(policies["sft"], "stop_ids", [ids[2]])
    answer = client.chat.completions.create(
        model="sft", messages=QUESTION, temperature=0, max_tokens=9, logprobs=True
    )
    assert answer.choices[0].finish_reason == "stop"
    # the token that ends it is counted, and is no part of the answer
    assert answer.usage.completion_tokens == 3
    assert len(answer.choices[0].logprobs.content) == 2


def test_texts_are_continued(client, policies, sampler, runs):
    tokenizer = policies["sft"].tokenizer
    texts = ["where is", "we are happy"]
    asked = {"model": "sft", "temperature": 0, "max_tokens": 5}
    answer = client.completions.create(prompt=texts, **asked)
    by_ids = client.completions.create(
        prompt=[tokenizer(text).input_ids for text in texts], **asked
    )
    assert [c.text for c in answer.choices] == [c.text for c in by_ids.choices]
    assert answer.usage.prompt_tokens == sum(len(tokenizer(text).input_ids) for text in texts)
    stream = client.completions.create(prompt=texts[0], **asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_many_clients_at_once_get_their_own_answers(client, policies, runs, base_path, sampler):
    paths = dict(zip(policies, [*runs, base_path], strict=True))

    def ask(number):
        name = list(policies)[number % 3]
        answer = client.chat.completions.create(
            **{"model": name, "messages": QUESTION, "temperature": 0},
            max_tokens=4 + number % 4,
        )
        return name, 4 + number % 4, answer.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for name, tokens, text in pool.map(ask, range(24)):
            assert text == sampler(paths[name], QUESTION, tokens)[0]


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"model": "sftt"}, 404, "model", r"Did you mean 'sft'\? Served: sft, ppo, base"),
        ({"model": "left out"}, 400, "model", "'model' is missing"),
        (
            {"frequency_penalty": 0.5},
            400,
            "frequency_penalty",
            "is not supported here",
        ),
        ({"top_pp": 0.5}, 400, "top_pp", r"is not supported here\. Did you mean 'top_p'\?"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "'tools' is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        ({"top_logprobs": 5, "logprobs": True}, 400, "top_logprobs", "not supported"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"n": True}, 400, "n", "'n': Input should be a valid integer"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 500}, 400, "messages", "positions for 512 tokens"),
        ({"messages": []}, 400, "messages", "'messages'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages", "expected one of sys"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "a"}]}, 400, "messages", "ends"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            *(400, "messages", r"'messages\[0\].content' has to be text"),
        ),
        (
            {"messages": [{"role": "user", "content": "a", "name": "b"}]},
            *(400, "messages", r"'messages\[0\].name' is not supported"),
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(url, fields, status, param, message):
    found = post(url, **fields)
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (status, param), error
    assert re.search(message, error["message"]) and error["type"] == "invalid_request_error"


def test_neutral_values_and_what_a_client_sends_back_are_taken(url):
    answer = post(
        url, frequency_penalty=0, tools=None, store=False, response_format={"type": "text"}
    )
    message = answer.json()["choices"][0]["message"]
    parts = [{"type": "text", "text": "and "}, {"type": "text", "text": "now?"}]
    more = [*QUESTION, {**message, "tool_calls": None}, {"role": "user", "content": parts}]
    again = post(url, messages=[{"role": "developer", "content": "be brief"}, *more])
    assert again.status_code == 200, again.json()


def test_bodies_that_are_no_json_and_other_places(url):
    form = requests.post(f"{url}/chat/completions", data={"model": "sft"}, timeout=60)
    assert form.status_code == 415 and "application/json" in form.json()["error"]["message"]
    headers = {"Content-Type": "application/json"}
    for body in ("{", "[]", "\xff"):
        broken = requests.post(f"{url}/chat/completions", data=body, headers=headers, timeout=60)
        assert broken.status_code == 400 and "body" in broken.json()["error"]["message"]
    assert requests.get(f"{url}/embeddings", timeout=60).status_code == 404
    assert requests.get(f"{url}/chat/completions", timeout=60).json()["error"]["type"]
    assert requests.get(url.replace("/v1", "/health"), timeout=60).json() == {"status": "ok"}
    empty = post(url, "completions", messages="left out", prompt="")
    assert empty.status_code == 400 and empty.json()["error"]["param"] == "prompt"
    above = post(url, "completions", messages="left out", prompt=[320])
    assert "from 0 to 319" in above.json()["error"]["message"]


def test_without_a_key_other_names_than_this_machines_are_refused(url):
    """A page of the web may have given its own name the address 127.0.0.1."""
    for host, status in (("evil.example:8000", 403), ("localhost:8000", 200), ("[::1]", 200)):
        found = requests.get(f"{url}/models", headers={"Host": host}, timeout=60)
        assert found.status_code == status, host


def test_numbers_and_letters_at_the_edge(url):
    cold = post(url, temperature=1e-300, logprobs=True).json()["choices"][0]
    greedy = post(url, temperature=0, logprobs=True).json()["choices"][0]
    assert cold == greedy
    # half of a surrogate pair, which UTF-8 cannot carry
    for fields in (
        {"model": "\ud800"},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "\ud800", "content": "a"}]},
        {"\ud800": 1},
    ):
        refused = post(url, **fields)
        assert refused.status_code in (400, 404) and refused.json()["error"]["message"]


def test_a_key_is_asked_for_and_never_shown(url, service, monkeypatch, capsys):
    monkeypatch.setattr(service, "key", "right")
    for key in (None, "wrong", "righ", "right2"):
        refused = post(url, key=key)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert requests.get(f"{url}/models", timeout=60).status_code == 401
    assert post(url, key="right").status_code == 200
    told = "".join(capsys.readouterr())
    # one line for the request that was answered, without key or prompt
    assert "sft: " in told and "right" not in told and "parcel" not in told


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(stream, url, service, capsys):
    # more than a minute of work
    body = {"model": "sft", "messages": QUESTION, "max_tokens": 400, "n": 128, "stream": stream}
    address = f"{url}/chat/completions"
    if stream:
        with requests.post(address, json=body, stream=True, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        client = http.client.HTTPConnection(urlsplit(url).netloc)
        headers = {"Content-Type": "application/json"}
        client.request("POST", urlsplit(address).path, json.dumps(body), headers)
        while not service.worker.running:
            time.sleep(0.01)
        client.close()
    # the next request does not wait for it
    assert post(url, model="ppo").status_code == 200
    told = capsys.readouterr().err
    tokens = int(re.search(r"sft: \d+ \+ (\d+) tokens, .* cut off", told)[1])
    assert tokens < 128 * 400 / 2


def test_an_error_after_the_first_piece_is_told_in_the_stream(url, policies, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(policies["sft"]), "generate", fails)
    answer = post(url, stream=True)
    pieces = [line[6:] for line in answer.text.splitlines() if line]
    assert "sampling failed" in json.loads(pieces[-1])["error"]["message"]
    whole = post(url)
    assert whole.status_code == 503 and whole.json()["error"]["type"] == "server_error"
    assert "out of memory" in capsys.readouterr().err
