"""Thirty people at once on one `rlhf collect serve`, and the server killed in the middle.

    python -m benchmarks.votes.collect_load                 # 3,000 places, 30 annotators, 4 kills; about two minutes

A closed loop: each annotator gets a page, thinks (uniform from half to one and a half of --think
seconds), answers, is sent on. Some press twice, some undo. `kill -9` hits the server at random
moments; it is started again on the same file, and whoever got no answer sends the same form once
more. Afterwards the events are replayed: each answered vote is there, none is there twice, and no
pair ever had more than its overlap. Server and annotators share the loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import random
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.data.store import Store
from rlhf.startup import free_port


class Server:
    """`rlhf collect serve` on a free port; `links` maps the names it printed to their addresses."""

    def __init__(self, store, *options, log=None, https=False):
        self.port = free_port()
        self.store, self.options, self.log, self.links, self.process = store, options, log, {}, None
        self.https, self.url = https, f"http{'s' if https else ''}://127.0.0.1:{self.port}"
        self.printed = ""

    def start(self) -> Server:
        command = [
            sys.executable,
            "-m",
            "rlhf.cli",
            "collect",
            "serve",
            str(self.store),
            "--port",
            str(self.port),
        ]
        with open(self.log or os.devnull, "ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.options], stdout=subprocess.PIPE, stderr=log
            )
        text, deadline = b"", time.monotonic() + 600
        while b"Ctrl-C" not in text:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"the server did not start: {text!r}")
            if select.select([self.process.stdout], [], [], 1)[0]:
                text += os.read(self.process.stdout.fileno(), 65536)
        self.printed = text.decode()
        self.links |= dict(re.findall(r"^([\w-]+): (http\S+)$", self.printed, re.M))
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if not self.https:
                    Client(self.port).get("/static/icon.svg")
                return self
            time.sleep(0.02)
        raise RuntimeError("the server does not answer")

    def stop(self, kill: bool = False) -> None:
        self.process.send_signal(signal.SIGKILL if kill else signal.SIGINT)
        self.process.wait(timeout=600)
        self.process.stdout.close()


class Client:
    """A browser without scripts: one connection, cookies, forms."""

    def __init__(self, port: int):
        self.port, self.cookies, self.connection = port, {}, None

    def request(self, method, path, fields=None, headers=None):
        """(response, text); raises OSError or HTTPException where no whole answer came."""
        sock = self.connection.sock if self.connection else None
        # the server ends a connection that was idle for seconds: there is an end to read
        if sock is not None and select.select([sock], [], [], 0)[0]:
            self.close()
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers, body = dict(headers or {}), None
        if self.cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        if fields is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            body = urllib.parse.urlencode(fields, doseq=True)
        try:
            self.connection.request(method, path, body, headers)
            answer = self.connection.getresponse()
            text = answer.read().decode()
        except BaseException:
            self.close()
            raise
        for line in answer.headers.get_all("Set-Cookie") or []:
            name, value = line.split(";")[0].split("=", 1)
            self.cookies[name] = value
        return answer, text

    def get(self, path):
        return self.request("GET", path)

    def post(self, path, fields):
        return self.request("POST", path, fields)

    def enter(self, link):
        return self.get(urllib.parse.urlsplit(link).path)

    def close(self):
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def fields_of(page: str, action: str = "/vote") -> dict[str, str]:
    """The hidden fields of the form with this action."""
    form = re.search(rf'<form[^>]*action="{action}".*?</form>', page, re.S).group()
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form))


@dataclass
class Load:
    """What the annotators saw: seconds of each request by kind, the clicks that were answered,
    repeats and failures.
    """

    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {"page": [], "vote": [], "undo": []}
    )
    votes: set[str] = field(default_factory=set)  # "name click"
    undos: set[str] = field(default_factory=set)
    repeats: int = 0
    failures: int = 0
    strange: list[str] = field(default_factory=list)


def fill(path: Path, pairs: int, controls: int) -> None:
    """A store of pairs with answers of a usual length."""
    words = [
        "we",
        "are",
        "happy",
        "to",
        "help",
        "and",
        "will",
        "send",
        "you",
        "a",
        "new",
        "one",
        "with",
        "regards",
    ]
    rng = random.Random(0)
    with Store.open(path, create=True) as store, store.transaction():
        for i in range(pairs + controls):
            prompt = store.add_prompt(
                [
                    {
                        "role": "user",
                        "content": f"Question {i}: " + " ".join(rng.choices(words, k=30)),
                    }
                ]
            )
            texts = (f"**Answer {s}**: " + " ".join(rng.choices(words, k=80)) for s in "ab")
            a, b = (store.add_response(prompt, text) for text in texts)
            store.add_comparison(a, b, **({"kind": "control", "expected": a} if i >= pairs else {}))


def annotate(
    name: str, link: str, port: int, think: float, load: Load, lock: threading.Lock, end: float
) -> None:
    """One annotator until nothing is left for them."""
    rng, client = random.Random(name), Client(port)

    def send(kind: str, *request) -> tuple[str, str]:
        """(where to, page), tried until answered; only the time of the try that was answered
        counts.
        """
        while time.monotonic() < end:
            begun = time.monotonic()
            try:
                answer, text = client.request(*request)
            except (OSError, http.client.HTTPException):
                with lock:
                    load.failures += 1
                time.sleep(0.1)
                continue
            with lock:
                load.seconds.setdefault(kind, []).append(time.monotonic() - begun)
                if answer.status not in (200, 303):
                    load.strange.append(f"{kind}: {answer.status}")
            return answer.headers.get("Location", ""), text
        raise TimeoutError(name)

    send("enter", "GET", urllib.parse.urlsplit(link).path)
    while True:
        _, page = send("page", "GET", "/")
        if 'id="judge"' not in page:
            if "Others are still at work" not in page:
                return
            time.sleep(think)
            continue
        time.sleep(rng.uniform(0.5, 1.5) * think)
        fields = fields_of(page)
        form = fields | {
            "choice": rng.choice(("left", "right", "left", "right", "tie")),
            "strength": "2",
        }
        for _ in range(2 if rng.random() < 0.05 else 1):  # a double click
            where, _ = send("vote", "POST", "/vote", form)
            with lock:
                if where in ("/?note=saved", "/?note=again"):
                    load.votes.add(f"{name} {fields['click']}")
                    load.repeats += where.endswith("again")
                else:
                    load.strange.append(f"vote: {where}")
        if rng.random() < 0.03:
            _, page = send("page", "GET", "/")
            fields = fields_of(page, "/undo")
            where, _ = send("undo", "POST", "/undo", fields)
            with lock:
                if where in ("/?note=undone", "/?note=again"):
                    load.undos.add(f"{name} undo {fields['click']}")
                else:
                    load.strange.append(f"undo: {where}")


def run(
    path: Path,
    pairs: int,
    controls: int,
    overlap: int,
    people: int,
    think: float,
    kills: int,
    limit: float,
):
    """Fill the store, let everybody work, kill the server at random; returns (Load, seconds)."""
    fill(path, pairs, controls)
    names = [f"p{i:02d}" for i in range(people)]
    server = Server(path, "--annotators", ",".join(names), "--overlap", str(overlap)).start()
    load, lock, begun = Load(), threading.Lock(), time.monotonic()
    end = begun + limit
    threads = [
        threading.Thread(
            target=annotate, args=(n, server.links[n], server.port, think, load, lock, end)
        )
        for n in names
    ]
    expected = think * (pairs * overlap * 1.15) / people
    moments = sorted(random.Random(1).uniform(0.1, 0.9) * expected for _ in range(kills))
    try:
        for thread in threads:
            thread.start()
        for moment in moments:
            time.sleep(max(0.0, begun + moment - time.monotonic()))
            server.stop(kill=True)
            server.start()
        for thread in threads:
            thread.join()
    finally:
        server.stop()
    return load, time.monotonic() - begun


def check(path: Path, load: Load, pairs: int, overlap: int) -> dict[str, int]:
    """Replay the events against what the annotators were told; raises AssertionError on the first
    that is wrong.
    """
    with Store.open(path) as store:
        assert store._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        names = {row["id"]: row["name"] for row in store.annotators()}
        controls = store.at().controls()
        rows = [dict(r) for r in store._db.execute("SELECT * FROM events ORDER BY id")]
        standing = store.at().votes()
    kept = {kind: set() for kind in ("vote", "undo")}
    now: dict[int, dict[int, int]] = {}
    for row in rows:
        people = now.setdefault(row["comparison"], {})
        if row["kind"] in kept:
            click = f"{names[row['annotator']]} {row['request'].split(':', 1)[1]}"
            assert click not in kept[row["kind"]], f"{click} is there twice"
            kept[row["kind"]].add(click)
        if row["kind"] == "vote":
            assert row["annotator"] not in people, "a pair was judged twice by one annotator"
            people[row["annotator"]] = row["id"]
            assert row["comparison"] in controls or len(people) <= overlap, "more than the overlap"
        elif row["kind"] == "undo":
            assert people.pop(row["annotator"]) == row["undoes"]
    assert load.votes <= kept["vote"], f"{len(load.votes - kept['vote'])} answered votes are lost"
    assert load.undos <= kept["undo"], f"{len(load.undos - kept['undo'])} answered undos are lost"
    assert kept["vote"] <= load.votes and kept["undo"] <= load.undos, (
        "votes are there that nobody was told of"
    )
    assert not load.strange, load.strange[:5]
    normal = [vote for vote in standing if vote.comparison not in controls]
    assert len(normal) == pairs * overlap, f"{len(normal)} votes stand, expected {pairs * overlap}"
    return {
        "cast": len(kept["vote"]),
        "undone": len(kept["undo"]),
        "standing": len(standing),
        "normal": len(normal),
    }


def percentiles(values: list[float]) -> tuple[float, float, float, float]:
    """p50, p95, p99 and the largest, in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return tuple(1000 * x for x in (cuts[49], cuts[94], cuts[98], max(values)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("pairs", 1000),
        ("controls", 40),
        ("overlap", 3),
        ("people", 30),
        ("kills", 4),
        ("repeats", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--think", type=float, default=1.0, help="mean seconds between page and answer"
    )
    parser.add_argument(
        "--limit", type=float, default=600.0, help="seconds after which a round gives up"
    )
    options = parser.parse_args()
    for number in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "votes.db"
            about = (
                options.pairs,
                options.controls,
                options.overlap,
                options.people,
                options.think,
                options.kills,
            )
            load, seconds = run(path, *about, options.limit)
            counts = check(path, load, options.pairs, options.overlap)
        print(
            f"round {number + 1}: {counts['normal']} votes stand on {options.pairs} pairs ({counts['standing']} with "
            f"controls; {counts['cast']} cast, {counts['undone']} undone), {load.repeats} repeats recorded once, "
            f"{options.kills} kills, {load.failures} requests without an answer sent again; nothing lost, "
            f"nothing double; {seconds:.0f} s; load average of the machine {os.getloadavg()[0]:.1f}"
        )
        for kind in ("page", "vote"):
            times = load.seconds[kind]
            p50, p95, p99, most = percentiles(times)
            print(
                f"  {len(times):5d} x {kind:4s} p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f}, max {most:.1f} ms"
            )
        print(flush=True)


if __name__ == "__main__":
    main()
