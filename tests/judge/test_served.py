"""A real small model, served by the project itself, as judge and as scorer."""

import subprocess
import sys

import pytest

from benchmarks.real.model import FILE
from reward.compose import build_scorer
from rlhf.judge.judges import load_judge
from rlhf.judge.pairs import JudgedPair, ask
from rlhf.judge.report import judge_report
from tests.conftest import ROOT
from tests.judge.test_client import samples

QUESTIONS = ["What is the capital of France?", "How many legs does a cat have?"]
ANSWERS = [("Paris.", "I like trains."), ("Four.", "Blue, mostly.")]


@pytest.fixture
def address(monkeypatch, tmp_path):
    """The address of `rlhf serve`, and the model's name there."""
    pytest.importorskip("uvicorn", reason="the extra 'collect' is not installed")
    if not FILE.is_file():
        pytest.skip(f"no {FILE}; python -m benchmarks.real.model fetches it")
    from rlhf.http_server import listen
    from rlhf.model.from_gguf import as_folder

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rlhf.cli", "serve", as_folder(str(FILE)), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    name = process.stdout.readline().partition(" on ")[0].removeprefix("serving ")
    yield f"http://127.0.0.1:{port}/v1", name
    process.terminate()
    process.wait(60)


@pytest.mark.slow
def test_a_real_model_judges_pairs_and_scores_answers(address, tmp_path, capsys):
    url, model = address
    spec = {"openai": url, "model": model, "max_tokens": 48}
    pairs = []
    for question, (good, bad) in zip(QUESTIONS, ANSWERS, strict=True):
        prompt = [{"role": "user", "content": question}]
        pairs.append(JudgedPair(prompt, question, "good", "bad", good, bad))
    judge = load_judge(spec, tmp_path / "answers.jsonl")
    ask(judge, pairs, "")
    usage = judge.client.usage
    # the server takes no JSON schema, which is said once
    assert "takes no JSON schema" in capsys.readouterr().err
    assert usage.asked == 4 and usage.prompt_tokens > 4 * 200
    assert 0 < usage.completion_tokens <= 2 * 4 * 48
    report = judge_report(pairs, judge.name, client=judge.client)
    known = [pair for pair in pairs if 0 <= pair.share <= 1]
    assert report["no_verdict"] + len(known) == 2
    assert usage.unreadable == sum(
        reply.value is None for reply in judge.client.answers.known.values()
    )
    # nothing is asked twice, and the same is said
    again = load_judge(spec, tmp_path / "answers.jsonl")
    said = [(pair.p_ab, pair.p_ba) for pair in pairs]
    ask(again, pairs, "")
    assert again.client.usage.asked == 0
    assert repr([(pair.p_ab, pair.p_ba) for pair in pairs]) == repr(said)

    grade = {**spec, "highest": 5, "unreadable": 1, "cache": str(tmp_path / "scores.jsonl")}
    found = build_scorer([grade])(samples("Paris.", "I like trains."))
    assert all(1 <= total <= 5 for total in found.total)
    print(said, usage, found, [r.text for r in judge.client.answers.known.values()])
