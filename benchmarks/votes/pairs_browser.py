"""Simulated annotators decide between two policies in a real browser, until enough votes are in.

    rlhf collect sample --runs runs/sft,runs/ppo --split test --data prompts.jsonl --store ab.db
    python -m benchmarks.votes.pairs_browser ab.db [--voice FILE] [--annotators 5]

Needs Chromium and playwright. Every annotator is a browser context of its own that signs in by its
link and judges the pair on its page by keyboard: by the brand voice (the gold score), with noise and
habits of its own (rlhf/sandbox/annotators.py). After each vote the rule of
`rlhf collect status` is asked, and the collection ends as soon as it says that votes are enough. A
second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import random

from benchmarks.paths import RESULTS
from benchmarks.result_rows import add_rows, row_of
from benchmarks.votes.browsers import press, signed_in
from reward.compose import build_scorer
from rlhf.data.store import Store
from rlhf.sandbox import SHOP_VOICE
from rlhf.sandbox.annotators import ANNOTATORS, Annotator, choose, gold_scores
from rlhf.voting.page import votes_markdown
from rlhf.voting.rates import votes_of_store

COMMAND = "python -m benchmarks.votes.pairs_browser ab.db"
# a difference in gold that is worth one logit
NOISE = 0.1
KEYS = {"tie": "t", "both_bad": "b", "skip": "s"}


class Person:
    """A simulated annotator at a browser."""

    def __init__(self, page, habits: Annotator, scorer, store: str):
        self.page, self.habits, self.scorer, self.store = page, habits, scorer, store
        self.rng = random.Random(habits.name)

    def judge(self) -> bool:
        """Judge the pair on the page by keyboard; returns whether there was one."""
        form = self.page.query_selector("#judge input[name=assignment]")
        if form is None:
            return False
        pair, left = self._assigned(int(form.get_attribute("value")))
        gold = gold_scores([pair], self.scorer)[pair["id"]]
        words = len(pair["text_a"].split()), len(pair["text_b"].split())
        answer = choose(self.habits, gold, words, left, NOISE, self.rng)
        keys = [KEYS.get(answer.choice) or ("1" if answer.choice == left else "2")]
        if answer.strength:
            keys.append(str(2 + answer.strength))
        for key in keys:
            self.page.keyboard.press(key)
        press(self.page, "Enter")
        return True

    def _assigned(self, event: int) -> tuple[dict, str]:
        """Return the pair of an assignment, and the answer on the left of the page."""
        with Store.open(self.store) as store:
            assigned = store.event(event)
            pair = store.at().pair(assigned["comparison"])
        # formatting apart, the page shows the same answer
        shown = self.page.inner_text("#answer-1 ~ *")
        assert pair[f"text_{assigned['left']}"].split()[0] in shown, shown
        return pair, assigned["left"]


def collect(store: str, voice: str, count: int) -> int:
    """Let `count` annotators judge in turn until the rule ends it; returns the votes cast."""
    habits = ANNOTATORS[:count]
    scorer = build_scorer([{"voice": voice}])
    names = [own.name for own in habits]
    with Store.open(store) as opened:
        for name in names:
            # a link is printed for those alone who have none yet
            opened.set_token(opened.add_annotator(name), None)
    votes = 0
    with signed_in(store, names, overlap=1) as pages:
        people = []
        for page, own in zip(pages, habits, strict=True):
            people.append(Person(page, own, scorer, store))
        while people:
            people = [person for person in people if person.judge()]
            votes += len(people)
            found = votes_of_store(store)["votes"]
            state = found["pairs"][0]["stop"]["state"] if found else "open"
            print(f"\r{votes} votes, {state}", end="", flush=True)
            if state != "open":
                break
    print()
    return votes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("store")
    parser.add_argument("--voice", default=str(SHOP_VOICE))
    parser.add_argument("--annotators", type=int, default=len(ANNOTATORS))
    asked = parser.parse_args()
    collect(asked.store, asked.voice, asked.annotators)

    found = votes_of_store(asked.store)["votes"]
    print("\n".join(votes_markdown(found)))
    pair = found["pairs"][0]
    what = (
        "simulated annotators in a real browser: the sequential stop said that votes were enough "
        f"after {pair['votes']} votes; source stored as {found['source']}"
    )
    is_enough = pair["stop"]["state"] != "open" and found["source"] == "simulated"
    row = row_of("votes-browser", what, is_enough, "== true", COMMAND)
    add_rows(RESULTS / "votes.json", [row])


if __name__ == "__main__":
    main()
