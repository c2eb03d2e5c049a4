"""A small collection with an invented shop's answers, a server in a process of its own, and a
browser.
"""

import shutil
from pathlib import Path

import pytest

from benchmarks.votes.collect_load import Server
from rlhf.data.store import Store

ROOT = Path(__file__).parents[2]

QUESTIONS = [
    (
        "Hi, my copper kettle arrived with a dent in the lid. What can you do?",
        "Good day, and thank you for telling us. We are sorry about the dented kettle.\n\n"
        "- We send a new kettle **today**.\n- You keep the old one or give it to a friend.\n\nWarmly, Fernhill",
        "Dents happen. You can return it if you pay the parcel, but honestly it still boils water.",
    ),
    (
        "Where is my order? The quilt should have been here on Monday.",
        "Hello, we are happy to trace your quilt right away. You will hear from us by noon. With care, Fernhill",
        "Hello there, sorry for the wait. We have traced the quilt: it left the depot this morning and reaches you "
        "tomorrow. Your Fernhill team",
    ),
    (
        "Can I still change the address for my lamp?",
        "Yes. Tell us the new address and we change it before the lamp leaves. Kind regards, Fernhill",
        "Maybe. Try the website.",
    ),
    (
        "The tent pole is missing. We leave on Friday!",
        "Hello, we are sorry about the missing part. We send the pole by express today, so that it is with you on "
        "Thursday. Warmly, Fernhill",
        "No worries mate, stuff gets lost. We guarantee you'll have a great trip anyway!",
    ),
    (
        "Is the teapot safe in the dishwasher?",
        "Gladly: wash it by hand in soapy water, and the glaze stays bright. Warmly, Fernhill",
        "Yes, it is.",
    ),
    (
        "I would like my money back for the rug. The colour is nothing like the picture.",
        "Thank you for writing. We are sorry that the colour disappointed you. We refund the rug in full once it is "
        "back with us, and the return is free. Kind regards, Fernhill",
        "Colours look different on screens. We can offer an exchange for another rug that you may like better.",
    ),
]


def fill(path, pairs=6, controls=0, hostile=()):
    """A store with so many pairs, control pairs ("right" beats "wrong") and answers of one's own."""
    with Store.open(path, create=True) as store, store.transaction():
        for i in range(pairs):
            question, one, other = QUESTIONS[i % len(QUESTIONS)]
            suffix = "" if i < len(QUESTIONS) else f" (order {4700 + i})"
            # either may be a
            _pair(store, question + suffix, *((one, other) if i * 7 % 5 % 2 else (other, one)))
        for i in range(controls):
            a, b = _pair(
                store, f"Control question {i}", f"Right {i}.", f"Wrong {i}.", compare=False
            )
            store.add_comparison(a, b, kind="control", expected=a)
        for i, text in enumerate(hostile):
            _pair(store, f"Hostile {i}", text, "A plain answer.")
    return path


ANSWERS = [
    "Good day, and thank you for telling us. We are sorry about the dented kettle.\n\n"
    "- We send a new kettle **today**.\n- You keep the old one or give it to a friend.\n\nWarmly, Fernhill",
    "Dents happen. You can return it if you pay the parcel, but honestly it still boils water.",
    "We are sorry about the dent. Send us a picture of the lid and we refund half of the price. Kind regards, Fernhill",
    "Hello! A new lid leaves our shop tomorrow and is free of charge. \u2615 Warmly, Fernhill",
]


def fill_rankings(path, rankings=2, pairs=0, answers=ANSWERS):
    """A store with rankings of the same answers, and pairs of two of them, to questions of their own."""
    with Store.open(path, create=True) as store, store.transaction():
        for i in range(rankings + pairs):
            question = f"Hi, my copper kettle arrived with a dent in the lid. What can you do? (order {4700 + i})"
            prompt = store.add_prompt([{"role": "user", "content": question}])
            ids = []
            for number, text in enumerate(answers):
                ids.append(store.add_response(prompt, text, model=f"runs/policy-{number}"))
            if i < rankings:
                store.add_ranking(ids)
            else:
                store.add_comparison(*ids[:2])
    return path


def _pair(store, question, one, other, compare=True):
    prompt = store.add_prompt([{"role": "user", "content": question}])
    a = store.add_response(prompt, one, model="runs/sft-one")
    b = store.add_response(prompt, other, model="runs/sft-two")
    if compare:
        store.add_comparison(a, b)
    return a, b


@pytest.fixture
def serve(tmp_path):
    """serve(store, *options) -> Server, stopped at the end."""
    started = []

    def start(store, *options, https=False):
        started.append(
            Server(
                store, *options, log=tmp_path / f"server-{len(started)}.log", https=https
            ).start()
        )
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def chromium():
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]"
    )
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
