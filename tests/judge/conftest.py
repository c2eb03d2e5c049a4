import pytest

import rlhf.http_client
from tests.judge.chat_server import ChatServer


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Start stand-in servers: `serve(answer)` returns one whose answers `answer(body)` gives."""
    monkeypatch.setattr(rlhf.http_client, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    started = []

    def start(answer):
        started.append(ChatServer(answer))
        return started[-1]

    yield start
    for server in started:
        server.close()
