"""The pictures of docs/collect.md (needs Chromium and playwright): python -m
tests.collect.screenshots [FOLDER]
"""

import random
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from benchmarks.votes.browsers import chromium
from benchmarks.votes.collect_load import Server
from rlhf.data.store import Store
from tests.collect.conftest import ROOT, fill, fill_rankings

# name: (share that is judged with care, habit of the left side, seconds a pair)
PEOPLE = {
    "sim-Ann": (0.95, 0.0, 21),
    "sim-Bela": (0.92, 0.0, 26),
    "sim-Cem": (0.35, 0.0, 1.4),
    "sim-Dora": (0.85, 0.6, 17),
}

# the first words of the first answer
MARKS = ["m", *["Shift+Control+ArrowRight"] * 4, "x", *"not how we speak"]


def judge(path: Path) -> None:
    """Votes of four people on most pairs: two good ones, a hasty one, one who likes the left side."""
    rng = random.Random(4)
    with Store.open(path) as store, store.transaction():
        controls, pairs = store.at().controls(), store.at().pairs()
        for name, (care, habit, seconds) in PEOPLE.items():
            person = store.add_annotator(name)
            for id, pair in pairs.items():
                if rng.random() < 0.3 or (
                    pair["kind"] == "normal"
                    and sum(v.comparison == id for v in store.at().votes()) > 2
                ):
                    continue
                left = rng.choice("ab")
                good = controls.get(id) or ("a" if "Fernhill" in pair["text_a"] else "b")
                choice = good if rng.random() < care else rng.choice("ab")
                choice = left if rng.random() < habit else choice
                tags = ["off tone"] if rng.random() < 0.2 else []
                reason = rng.choice(
                    (
                        "It names the thing and says what happens next.",
                        "Sounds like us.",
                        None,
                        None,
                    )
                )
                took = round(1000 * seconds * rng.uniform(0.5, 1.6))
                ratings = {side: rng.randint(3, 4) + (side == good) for side in "ab"}
                about = {
                    "criteria": {"clear": ratings} if rng.random() < 0.5 else None,
                    "left": left,
                    "strength": rng.randint(1, 3),
                    "tags": tags,
                    "reason": reason,
                }
                store.vote(id, person, choice, duration_ms=took, **about)


def shoot(folder: Path) -> None:
    work = Path(tempfile.mkdtemp())
    path = fill(work / "fernhill.db", pairs=60, controls=10)
    judge(path)
    voice = ("--voice", str(ROOT / "configs" / "voices" / "shop.yaml"))
    people = ("--annotators", "sim-Ann,sim-Bela,sim-Cem,sim-Dora,sim-Eve", "--overlap", "3")
    more = ("--adjudicators", "sim-Fay", "--criteria", "clear,sounds like us")
    server = Server(path, *people, *more, *voice).start()
    try:
        with chromium() as browser:

            def picture(
                name, who, path, keys=(), width=1280, height=800, scheme="light", full=False
            ):
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=scheme
                )
                page = context.new_page()
                page.goto(server.links[who])
                page.goto(server.url + path)
                for key in keys:
                    page.keyboard.press(key)
                page.evaluate("document.activeElement.blur()")
                page.wait_for_timeout(300)
                page.screenshot(path=folder / name, full_page=full)
                Image.open(folder / name).quantize(256, dither=Image.Dither.NONE).save(
                    folder / name, optimize=True
                )
                context.close()

            picture("collect-pair.png", "sim-Ann", "/", "14")
            picture("collect-dark.png", "sim-Bela", "/", "2", scheme="dark")
            picture("collect-phone.png", "sim-Ann", "/", "14", width=390, height=844)
            picture("collect-owner.png", "owner", "/owner", full=True)
            picture("collect-owner-phone.png", "owner", "/owner", width=390, height=844, full=True)
            picture("collect-disputed.png", "owner", "/owner/disputed")
            server = (
                server.stop() or Server(fill_rankings(work / "kettles.db"), *people, *voice).start()
            )
            picture("collect-rank.png", "sim-Ann", "/", "31t4", height=860)
            picture("collect-rank-phone.png", "sim-Bela", "/", "31t4", width=390, height=844)
            picture("collect-marks.png", "sim-Cem", "/", MARKS, height=900)
    finally:
        server.stop()
        shutil.rmtree(work)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    target.mkdir(parents=True, exist_ok=True)
    shoot(target)
