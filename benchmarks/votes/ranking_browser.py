"""Simulated annotators order four answers and mark passages in a real browser; all that they did must
be in the store as they did it.

    python -m benchmarks.votes.ranking_browser [--rankings 12] [--annotators 3]

Needs Chromium and playwright. Every annotator is a browser context of its own, signs in by its link,
orders answers by keys after the voice's score with noise of its own, equally good where it sees no
difference, and marks the first line of the best answer.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from benchmarks.paths import RESULTS
from benchmarks.result_rows import add_rows, row_of
from benchmarks.votes.browsers import press, signed_in
from reward.compose import build_scorer
from rlhf.data.agreement import agreement_summary
from rlhf.data.records import Samples
from rlhf.data.store import Store
from rlhf.exchange.rankings import named
from rlhf.sandbox import SHOP_VOICE

COMMAND = "python -m benchmarks.votes.ranking_browser"
# of a score; and what is seen as no difference
NOISE, SAME = 0.1, 0.05
BEGINNINGS = ("Good day, and thank you for writing.", "Hello.", "Hey there!", "")
ENDS = ("Warmly, Fernhill", "Kind regards, Fernhill", "Cheers", "")


def fill(path: Path, rankings: int) -> None:
    """Make rankings of four answers, which are more or less like the voice."""
    rng = random.Random(0)
    with Store.open(path, create=True) as store, store.transaction():
        for number in range(rankings):
            messages = [
                {"role": "user", "content": f"My lamp {number} is broken. What can you do?"}
            ]
            prompt = store.add_prompt(messages)
            ids = []
            for i, (beginning, end) in enumerate(
                zip(rng.sample(BEGINNINGS, 4), rng.sample(ENDS, 4), strict=True)
            ):
                text = f"{beginning}\n\nWe look at lamp {number}.{i} today ☂.\n\n{end}".strip()
                ids.append(store.add_response(prompt, text))
            store.add_ranking(ids)


class Person:
    """A simulated annotator at a browser; `given` holds what it did, by the texts of the answers."""

    def __init__(self, page, name: str, scorer):
        self.page, self.scorer = page, scorer
        self.rng = random.Random(name)
        self.given: list[tuple[list[list[str]], str]] = []

    def judge(self) -> bool:
        """Order the answers on the page by keyboard; returns whether there were any."""
        texts = [area.input_value() for area in self.page.query_selector_all(".passage")]
        if not texts:
            return False
        prompts = [[{"role": "user", "content": ""}]] * len(texts)
        samples = Samples(prompts, texts, [[]] * 4, [[]] * 4, [True] * 4, [{}] * 4)
        seen = [score + self.rng.gauss(0, NOISE) for score in self.scorer(samples).total]
        best_first = sorted(range(len(texts)), key=lambda i: -seen[i])
        order: list[list[str]] = []
        for before, i in zip([None, *best_first], best_first, strict=False):
            self.page.keyboard.press(str(i + 1))
            if before is not None and seen[before] - seen[i] < SAME:
                self.page.keyboard.press("t")
                order[-1].append(texts[i])
            else:
                order.append([texts[i]])
        best = best_first[0]
        passage = self.page.locator(f"#passage-{best + 1}")
        for _ in range(best + 1):
            self.page.keyboard.press("m")
        self.page.keyboard.press("Shift+End")
        line = texts[best].split("\n")[0]
        self.page.keyboard.press("g")
        self.page.keyboard.type("a good beginning")
        self.page.keyboard.press("Enter")
        assert passage.input_value() == texts[best]
        self.page.keyboard.press("Escape")
        press(self.page, "Enter")
        self.given.append((order, line))
        return True


def collect(path: Path, names: list[str]) -> dict[str, list[tuple[list[list[str]], str]]]:
    """Let the annotators judge in turn until nothing is left; returns what each has done."""
    scorer = build_scorer([{"voice": str(SHOP_VOICE)}])
    with signed_in(path, names, overlap=len(names)) as pages:
        people = []
        for page, name in zip(pages, names, strict=True):
            people.append(Person(page, name, scorer))
        waiting = people
        while waiting:
            waiting = [person for person in waiting if person.judge()]
    return {name: person.given for name, person in zip(names, people, strict=True)}


def share_kept(
    path: Path, given: dict[str, list[tuple[list[list[str]], str]]]
) -> tuple[float, float]:
    """Return the share of orders that are stored, with their mark, as they were given; and tau-b."""
    with Store.open(path, readonly=True) as store:
        view = store.at()
        cast, rankings, votes = view.ranked(), view.rankings(), view.votes()
    kept = 0
    texts = {}
    for ranking in rankings.values():
        texts |= {response["id"]: response["text"] for response in ranking["responses"]}
    for ranked in cast:
        order = list(map(sorted, named(ranked.order, texts)))
        (mark,) = ranked.spans
        expected = [(list(map(sorted, own)), line) for own, line in given[ranked.annotator]]
        is_marked = mark["answer"] in ranked.order[0] and mark["remark"] == "a good beginning"
        kept += is_marked and (order, mark["text"]) in expected
    total = sum(map(len, given.values()))
    assert len(cast) == total, f"{len(cast)} orders are stored, {total} were given"
    return kept / total, agreement_summary(votes)["tau"]["estimate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rankings", type=int, default=12)
    parser.add_argument("--annotators", type=int, default=3)
    asked = parser.parse_args()
    names = [f"sim-{number}" for number in range(asked.annotators)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "votes.db"
        fill(path, asked.rankings)
        given = collect(path, names)
        kept, tau = share_kept(path, given)
    orders = sum(map(len, given.values()))
    what = (
        f"share of {orders} orders of four answers, each with a marked passage, that are stored as "
        f"{asked.annotators} simulated annotators gave them by keyboard in a real browser"
    )
    print(f"{what}: {kept}; Kendall's tau-b {tau:.2f}")
    add_rows(RESULTS / "votes.json", [row_of("rankings-browser", what, kept, "== 1", COMMAND)])


if __name__ == "__main__":
    main()
