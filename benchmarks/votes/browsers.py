"""Simulated annotators at real browsers (Chromium, by playwright): each has a context of its own."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from benchmarks.votes.collect_load import Server


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Yield a browser without a window."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def signed_in(store: str | Path, names: Sequence[str], overlap: int) -> Iterator[list[Any]]:
    """Serve the store, and yield the first page to judge of each annotator, who all have a new link."""
    people = ("--annotators", ",".join(names), "--overlap", str(overlap))
    server = Server(store, *people).start()
    try:
        with chromium() as browser:
            pages = []
            for name in names:
                context = browser.new_context()
                # milliseconds: a machine that is busy with other work is slow, not wrong
                context.set_default_timeout(120_000)
                page = context.new_page()
                page.goto(server.links[name])
                # who has judged before is led to the next question at once
                if page.query_selector("#start"):
                    press(page, "Enter")
                pages.append(page)
            yield pages
    finally:
        server.stop()


def press(page: Any, key: str) -> None:
    """Press a key that leads to another page, and wait until its script is there."""
    with page.expect_navigation():
        page.keyboard.press(key)
