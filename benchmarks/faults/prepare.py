"""Planted faults in 2,000 pairs: what `rlhf data prepare` finds, misses, and finds where nothing
is.

    python -m benchmarks.faults.prepare                       # invented pairs of the sandbox's shop
    RLHF_DATA=FOLDER python -m benchmarks.faults.prepare      # and pairs of the folder's .jsonl files

Every planted row carries what was planted in its metadata, in which `prepare` looks for personal
data alone. A row counts as found if the step that looks for this fault took it out (personal data:
masked it); as a false alarm if a step touched a clean row.
"""

import itertools
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from rlhf.data.agreement import annotator_reliability
from rlhf.data.alpha import alpha_interval, ratings_of
from rlhf.data.load import load
from rlhf.data.prepare import steps
from rlhf.data.prepare.run import PrepareConfig, prepare
from rlhf.data.records import Preference, normalise
from rlhf.data.votes import Vote
from rlhf.sandbox import corpus
from rlhf.sandbox.build import SandboxConfig

ROWS, HELD_OUT, EACH = 2000, 200, 20
SECRETS = {
    "email": [
        "jane.doe@mail.example",
        "j.smith+shop@dept.example.co.uk",
        "ANNA_K@example.org",
        "bob42@example.de",
    ],
    "phone": [
        "+49 30 901820",
        "(415) 555-2671",
        "020 7946 0958",
        "+1-212-456-7890",
        "07911 123456",
        "0151 23456789",
    ],
    "card": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "6011111111111117"],
    "iban": [
        "DE89 3704 0044 0532 0130 00",
        "GB82WEST12345698765432",
        "FR14 2004 1010 0505 0001 3M02 606",
    ],
    "ip": ["203.0.113.7", "198.51.100.21", "2001:db8:85a3::8a2e:370:7334"],
    "key": [
        "sk-proj-abcDEF1234567890abcd",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "AKIAIOSFODNN7EXAMPLE",
        "password: hunter2hunter2",
    ],
    "address": [
        "12 Baker Street, London NW1 6XE",
        "1600 Amphitheatre Parkway, Mountain View, CA 94043",
        "Hauptstraße 12, 10115 Berlin",
        "P.O. Box 1234",
        "Flat 3, The Old Mill, Stow-on-the-Wold",
        "Calle de Alcalá 45, 28014 Madrid",
    ],
}


def sandbox_pairs(count: int) -> list[dict]:
    """An on-brand answer over one with faults, for as many different questions."""
    config = SandboxConfig(output_dir="unused")
    world, rng = corpus.make_world(0, config.n_items, config.n_intents), random.Random(0)
    cases = itertools.islice(corpus.draw_cases(world, rng, lambda group: True), count)
    return [
        {
            "prompt": case.text,
            "chosen": corpus.answer(world, case, (), rng),
            "rejected": corpus.answer(world, case, corpus.draw_faults(rng), rng),
        }
        for case in cases
    ]


def real_pairs(folder: Path) -> list[dict]:
    """Pairs of two public files, one for each different question, without those in which nothing
    was said or twice the
    same: what the files hold twice by themselves is no planted fault.
    """
    rows, seen = [], set()
    for name in ("pref_rasbt_polite.jsonl", "pref_pandalm_human.jsonl"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            row = {
                side: json.loads(line)[side].strip() for side in ("prompt", "chosen", "rejected")
            }
            if (
                all(row.values())
                and row["chosen"] != row["rejected"]
                and normalise(row["prompt"]) not in seen
            ):
                seen.add(normalise(row["prompt"]))
                rows.append(row)
    random.Random(0).shuffle(rows)
    return rows


def typo(text: str, rng: random.Random) -> str:
    """Two neighbouring letters exchanged."""
    places = [
        i for i in range(len(text) - 1) if text[i : i + 2].isalpha() and text[i] != text[i + 1]
    ]
    if not places:
        return text + "!"
    i = rng.choice(places)
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def other_word(text: str, rng: random.Random) -> str:
    """One word exchanged for another."""
    words = text.split(" ")
    words[rng.randrange(len(words))] = rng.choice(
        ("really", "something", "perhaps", "today", "very")
    )
    return " ".join(words)


def each_side(row: dict, change: Callable[[str], str]) -> dict:
    return {side: change(row[side]) for side in ("prompt", "chosen", "rejected")}


def swapped(row: dict) -> dict:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def plant(rows: list[dict], held_out: list[dict], rng: random.Random) -> list[dict]:
    """The rows with faults among them; each has "planted": name of the fault, and which of its
    twins may go.
    """
    clean = [row | {"planted": None, "id": i} for i, row in enumerate(rows)]
    originals = iter(rng.sample(range(len(rows)), len(rows)))
    planted: list[dict] = []

    def twin(fault: str, change: Callable[[dict], dict], both: bool = False) -> None:
        for _ in range(EACH):
            i = next(originals)
            planted.append(change(rows[i]) | {"planted": fault, "twin": i})
            if both:
                clean[i]["planted"] = fault

    twin("identical answers", lambda r: r | {"rejected": r["chosen"] + " \u200b"})
    twin("exact duplicate", lambda r: each_side(r, lambda t: t.replace(" ", "  ", 1) + "\r\n"))
    twin("near duplicate: punctuation", lambda r: each_side(r, lambda t: t.rstrip(".!?") + "..."))
    twin("near duplicate: a typo in one text", lambda r: r | {"chosen": typo(r["chosen"], rng)})
    twin("near duplicate: a typo in every text", lambda r: each_side(r, lambda t: typo(t, rng)))
    twin(
        "near duplicate: a word in one answer",
        lambda r: r | {"chosen": other_word(r["chosen"], rng)},
    )
    twin(
        "near duplicate: a word in every text", lambda r: each_side(r, lambda t: other_word(t, rng))
    )
    twin("contradiction: exact", swapped, both=True)
    twin(
        "contradiction: punctuation",
        lambda r: swapped(each_side(r, lambda t: t.rstrip(".!?") + "...")),
        both=True,
    )
    twin(
        "contradiction: a typo in one text",
        lambda r: swapped(r | {"chosen": typo(r["chosen"], rng)}),
        both=True,
    )

    def leak(fault: str, change: Callable[[dict, dict], dict]) -> None:
        for _ in range(EACH):
            i = next(originals)
            planted.append(change(rows[i], rng.choice(held_out)) | {"planted": fault})
            clean[i]["planted"] = "used up"

    leak("leak: prompt", lambda r, t: r | {"prompt": t["prompt"]})
    leak("leak: prompt in capitals", lambda r, t: r | {"prompt": t["prompt"].upper()})
    leak(
        "leak: prompt in a longer text",
        lambda r, t: r | {"prompt": f"Hello team. {t['prompt']} Thanks in advance."},
    )
    leak(
        "leak: prompt with one word changed",
        lambda r, t: r | {"prompt": other_word(t["prompt"], rng)},
    )
    leak("leak: both answers", lambda r, t: r | {"chosen": t["chosen"], "rejected": t["rejected"]})

    for kind, secrets in SECRETS.items():
        for secret in secrets:
            for _ in range(5):
                i, side = next(originals), rng.choice(("prompt", "chosen", "rejected"))
                words = rows[i][side].split(" ")
                words.insert(rng.randint(0, len(words)), secret)
                planted.append(
                    rows[i]
                    | {side: " ".join(words), "planted": f"personal: {kind}", "secret": secret}
                )
                clean[i]["planted"] = "used up"
    twins = {row["twin"] for row in planted if "twin" in row}
    kept = [row for row in clean if row["id"] in twins]
    kept += [row for row in clean if row["id"] not in twins and row["planted"] != "used up"]
    rng.shuffle(planted)
    return kept[: ROWS - len(planted)] + planted


def run(
    rows: list[dict], held_out: list[dict], **options
) -> tuple[dict, list[Preference], dict[int, set[str]]]:
    """(report, rows left, steps that touched each row by its id)."""
    touched: dict[int, set[str]] = {}
    add = steps.Work.add

    def monitored(work, name, parameters, found, drop=(), examples=()):
        for i in drop:
            touched.setdefault(work.records[i].metadata["row"], set()).add(name)
        return add(work, name, parameters, found, drop, examples)

    with tempfile.TemporaryDirectory() as folder:
        source, test = Path(folder, "pairs.jsonl"), Path(folder, "test.jsonl")
        keep = ("prompt", "chosen", "rejected")
        source.write_text(
            "\n".join(json.dumps({k: r[k] for k in keep} | {"row": i}) for i, r in enumerate(rows))
        )
        test.write_text("\n".join(map(json.dumps, held_out)))
        steps.Work.add = monitored
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                files = {
                    "source": [str(source)],
                    "output": f"{folder}/out.jsonl",
                    "against": [str(test)],
                }
                report = prepare(PrepareConfig(**files, **options))
        finally:
            steps.Work.add = add
        left = load(f"{folder}/out.jsonl", Preference)
    return report, left, touched


def faults_table(
    rows: list[dict], held_out: list[dict], **options
) -> list[tuple[str, int, int, int]]:
    """(fault, planted, found, of these by the step meant for it); last, false alarms on the clean
    rows of the file.
    """
    _, left, touched = run(rows, held_out, **options)
    text_of = {
        r.metadata["row"]: " ".join([r.prompt[0]["content"], r.chosen, r.rejected]) for r in left
    }
    meant = {
        "identical answers": {"text"},
        "exact duplicate": {"exact duplicates"},
        "near duplicate": {"near duplicates"},
        "contradiction": {"contradictions", "near contradictions"},
        "leak": {"contamination"},
    }
    counts: dict[str, Counter] = {}
    false = Counter()
    ids = {row["id"]: n for n, row in enumerate(rows) if "id" in row}
    twins = {row["twin"]: n for n, row in enumerate(rows) if "twin" in row}
    for n, row in enumerate(rows):
        fault = row["planted"]
        if fault is None:
            partner = twins.get(row["id"])
            # of twins it does not matter which one went
            if n in touched and partner not in touched:
                false[", ".join(touched[n])] += 1
            continue
        count = counts.setdefault(fault, Counter())
        if fault.startswith("personal"):
            whole = row["secret"].removeprefix("password: ")
            found = n in touched or whole not in text_of.get(n, "")
            count.update(planted=1, found=found, meant=found)
            continue
        if "id" in row:  # the contradicted original: counted with its twin
            continue
        gone = touched.get(n, set()) | touched.get(ids.get(row.get("twin"), -1), set())
        count.update(planted=1, found=bool(gone), meant=bool(gone & meant[fault.split(":")[0]]))
    table = [(fault, c["planted"], c["found"], c["meant"]) for fault, c in counts.items()]
    clean = sum(row["planted"] is None for row in rows)
    return [*sorted(table), ("(clean rows: false alarms)", clean, false.total(), 0)]


def print_faults(name: str, pairs: list[dict], **options) -> None:
    held_out, rows = pairs[:HELD_OUT], pairs[HELD_OUT:]
    clean_report, _, touched = run(
        [r | {"id": i} for i, r in enumerate(rows[:ROWS])], held_out, **options
    )
    print(f"\n## {name}{' ' + str(options) if options else ''}\n")
    print(f"Clean: {len(rows[:ROWS])} rows, {len(touched)} left out, by step:")
    for step in clean_report["steps"]:
        print(f"  {step.name:<20} {step.found}; {step.dropped} left out")
        for example in step.examples if step.dropped else ():
            print(f"  {'':<20}   {example}")
    faulty = plant(rows, held_out, random.Random(1))
    print(f"\n| planted in {len(faulty)} rows | rows | found | by the step meant for it | missed |")
    print("|---|---:|---:|---:|---:|")
    for fault, planted, found, meant in faults_table(faulty, held_out, **options):
        if fault.startswith("("):
            print(f"\nFalse alarms among the {planted} clean rows of the same file: {found}")
        else:
            print(f"| {fault} | {planted} | {found} | {meant} | {planted - found} |")


def crowd(seed: int, pairs: int, each: int, careless: float, side: float) -> list[Vote]:
    """Votes of eight annotators, `each` of them on a pair: six honest ones who are right with
    probability 0.85, one who looks at nothing with probability `careless`, one who takes the left
    with probability `side`, else like the others.
    """
    rng = random.Random(seed)
    names = [f"honest {i}" for i in range(6)] + ["careless", "side-biased"]
    votes = []
    for pair in range(pairs):
        good = rng.choice("ab")
        for name in rng.sample(names, each):
            left, draw = rng.choice("ab"), rng.random()
            says = good if rng.random() < 0.85 else "ba"["ab".index(good)]
            if name == "careless" and draw < careless:
                says = rng.choice("ab")
            if name == "side-biased" and draw < side:
                says = left
            votes.append(Vote(len(votes), pair, name, says, left=left))
    return votes


def print_annotators(seeds: int = 20) -> None:
    """How often each planted annotator is flagged for what it does, and honest ones for anything."""
    print(f"\n## Annotators: eight on 2,000 pairs, {seeds} crowds\n")
    print(
        "| votes a pair | careless | takes the left | careless flagged | side flagged | honest flagged | alpha |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for each, careless, side in itertools.chain(
        itertools.product((2, 3), (1.0, 0.5, 0.25), (0.4,)),
        itertools.product((2,), (0.5,), (0.2, 0.1)),
    ):
        found, alphas = Counter(), []
        for seed in range(seeds):
            votes = crowd(seed, ROWS, each, careless, side)
            alphas.append(alpha_interval(ratings_of(votes))[0])
            for person in annotator_reliability(votes):
                flags = " ".join(person.flags)
                found["careless"] += person.annotator == "careless" and "agrees less" in flags
                found["side"] += person.annotator == "side-biased" and "left side" in flags
                found["honest"] += person.annotator.startswith("honest") and bool(flags)
        shares = f"{found['careless']} of {seeds} | {found['side']} of {seeds} | {found['honest']} of {6 * seeds}"
        print(f"| {each} | {careless:.0%} | {side:.0%} | {shares} | {sum(alphas) / seeds:.2f} |")


def print_coverage(seeds: int = 200) -> None:
    """How often the interval of alpha holds the alpha of very many pairs of the same crowd."""
    truth = alpha_interval(ratings_of(crowd(10**6, 50_000, 2, 0.5, 0.4)))[0]
    print(
        f"\n## Coverage of alpha's 95 % interval (two votes a pair; alpha of 50,000 pairs: {truth:.3f})\n"
    )
    for pairs in (30, 100, 300):
        inside = 0
        for seed in range(seeds):
            _, low, high = alpha_interval(ratings_of(crowd(seed, pairs, 2, 0.5, 0.4)))
            inside += low <= truth <= high
        print(f"- {pairs} pairs: {inside / seeds:.1%} of {seeds} intervals")


if __name__ == "__main__":
    print_faults("Invented pairs (sandbox)", sandbox_pairs(ROWS + HELD_OUT))
    if folder := os.environ.get("RLHF_DATA"):
        print_faults("Real pairs (rasbt polite, PandaLM)", real_pairs(Path(folder)))
    print_annotators()
    print_coverage()
