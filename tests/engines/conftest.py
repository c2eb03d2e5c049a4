import pytest

from rlhf.engines import sampling


@pytest.fixture(autouse=True)
def nothing_said_before(monkeypatch):
    """Let each test see the notices that are printed once."""
    monkeypatch.setattr(sampling, "_SAID", set())
