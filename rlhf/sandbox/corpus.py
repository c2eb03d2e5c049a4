"""A seeded generator of customer-service exchanges of an invented shop.

A `Case` is what a customer wants (intent, item, colour, words); an answer to it is on-brand, or has
one to three named `FAULTS`. Everything is drawn from a `random.Random`, so the same seed gives the
same exchanges on every machine.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rlhf.data.records import prompt_group
from rlhf.sandbox import phrases

FAULTS = (
    "rude",
    "slang",
    "cold",
    "no_greeting",
    "no_closing",
    "promise",
    "rambling",
    "wrong_item",
    "wrong_remedy",
    "no_job",
)
# two faults of one set rewrite the same words of an answer, so that only one of them is taken
_EXCLUSIVE = (
    {"rude", "slang", "cold", "no_job"},
    {"no_greeting", "slang"},
    {"no_closing", "slang"},
    {"wrong_item", "no_job"},
    {"wrong_remedy", "no_job"},
    {"promise", "rambling"},
)
_FAULT_COUNTS, _FAULT_WEIGHTS = (1, 2, 3), (0.35, 0.4, 0.25)


@dataclass(frozen=True)
class Case:
    """One customer's message, and what a right answer has to contain."""

    intent: str
    item: str
    colour: str
    text: str

    @property
    def remedy(self) -> str:
        return phrases.INTENTS[self.intent][0]

    @property
    def group(self) -> str:
        return prompt_group(self.messages)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}]

    @property
    def metadata(self) -> dict[str, str]:
        return {
            "intent": self.intent,
            "item": self.item,
            "colour": self.colour,
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class World:
    """The goods and intents that one world seed chose among all that the phrases know."""

    items: tuple[str, ...]
    colours: tuple[str, ...]
    intents: tuple[str, ...]

    @property
    def distinct_prompts(self) -> int:
        """How many different user turns this world has."""
        phrasings = sum(len(phrases.INTENTS[intent][2]) for intent in self.intents)
        # LEADS and TAILS have their empty one twice, so that it is drawn more often
        frames = len(set(phrases.LEADS)) * len(set(phrases.TAILS))
        return phrasings * frames * len(self.items) * len(self.colours)


def make_world(world_seed: int, n_items: int, n_intents: int) -> World:
    """Choose the goods and the intents of a world, two or more of each, at most those there are."""
    rng = random.Random(f"world {world_seed}")
    items = tuple(sorted(rng.sample(phrases.ITEMS, n_items)))
    intents = tuple(sorted(rng.sample(sorted(phrases.INTENTS), n_intents)))
    return World(items, tuple(phrases.COLOURS), intents)


def draw_case(world: World, rng: random.Random) -> Case:
    """Return one random customer."""
    # the order of the draws is part of the world: another one gives other customers
    intent = rng.choice(world.intents)
    item, colour = rng.choice(world.items), rng.choice(world.colours)
    core = rng.choice(phrases.INTENTS[intent][2]).format(item=item, colour=colour)
    lead, tail = rng.choice(phrases.LEADS), rng.choice(phrases.TAILS)
    # some say no more than they want
    text = " ".join(filter(None, (lead, core, tail)))
    return Case(intent, item, colour, text)


def draw_cases(world: World, rng: random.Random, keep: Callable[[str], bool]) -> Iterator[Case]:
    """Yield random customers without end, none of whom says what one before said, and of whose group
    `keep` is true.
    """
    seen: set[str] = set()
    while True:
        case = draw_case(world, rng)
        group = case.group
        if group not in seen and keep(group):
            seen.add(group)
            yield case


def draw_faults(rng: random.Random) -> tuple[str, ...]:
    """Return one to three faults that can stand in one answer."""
    count = rng.choices(_FAULT_COUNTS, _FAULT_WEIGHTS)[0]
    chosen: list[str] = []
    # what a fault that was taken leaves no room for
    excluded: set[str] = set()
    for fault in rng.sample(FAULTS, len(FAULTS)):
        if len(chosen) == count:
            break
        if fault in excluded:
            continue
        chosen.append(fault)
        for group in _EXCLUSIVE:
            if fault in group:
                excluded |= group
    return tuple(sorted(chosen))


def draw_answer(
    world: World, case: Case, off_brand: float, rng: random.Random
) -> tuple[str, tuple[str, ...]]:
    """Return an answer and its faults; the answer is off-brand with probability `off_brand`."""
    faults = draw_faults(rng) if rng.random() < off_brand else ()
    return answer(world, case, faults, rng), faults


def answer(world: World, case: Case, faults: tuple[str, ...], rng: random.Random) -> str:
    """Return the shop's answer to a case with exactly these of FAULTS; without any it is on-brand."""
    item, remedy = case.item, case.remedy
    if "wrong_item" in faults:
        item = rng.choice([other for other in world.items if other != case.item])
    if "wrong_remedy" in faults:
        # of the intents of this world; several may share a remedy
        remedies = [phrases.INTENTS[intent][0] for intent in world.intents]
        remedy = rng.choice([other for other in remedies if other != case.remedy])
    greeting, openers, tones, closing = _manner(case, faults, rng)
    opener = rng.choice(openers).format(item=item)
    if greeting == "":
        opener = opener[0].upper() + opener[1:]
    if "no_job" in faults:
        action = rng.choice(phrases.NO_JOB)
    else:
        action = f"{rng.choice(tones)} {rng.choice(phrases.REMEDIES[remedy])}"
    if "rambling" in faults:
        action = f"{rng.choice(phrases.RAMBLES)}, and {action[0].lower()}{action[1:]}"
    promise = rng.choice(phrases.PROMISES) if "promise" in faults else ""
    return " ".join(filter(None, (greeting, opener, action, promise, closing)))


def _manner(case: Case, faults: tuple[str, ...], rng: random.Random):
    """Return greeting, openers, tones of the action and closing that go with the faults."""
    greetings, closings = phrases.GREETINGS, phrases.CLOSINGS
    openers, tones = phrases.OPENERS[phrases.INTENTS[case.intent][1]], phrases.WARM
    if "rude" in faults:
        openers, tones = phrases.RUDE_OPENERS, phrases.RUDE_TONE
    elif "slang" in faults:
        greetings, closings = phrases.SLANG_GREETINGS, phrases.SLANG_CLOSINGS
        openers, tones = phrases.SLANG_OPENERS, phrases.SLANG_TONE
    elif "cold" in faults:
        openers, tones = phrases.COLD_OPENERS, phrases.COLD
    elif "no_job" in faults:
        openers = phrases.NO_JOB_OPENERS
    greeting = "" if "no_greeting" in faults else rng.choice(greetings)
    closing = "" if "no_closing" in faults else rng.choice(closings)
    return greeting, openers, tones, closing


def plain_sentence(world: World, rng: random.Random) -> str:
    """Return a sentence about the shop's goods, for the base's pretraining text."""
    item, colour = rng.choice(world.items), rng.choice(world.colours)
    return rng.choice(phrases.PLAIN).format(item=item, colour=colour)


def short_exchange(world: World, rng: random.Random) -> list[dict[str, str]]:
    """Return an exchange in which a customer names a thing and the shop says it back: how a small
    base learns to copy within its first minute.
    """
    item, colour = rng.choice(world.items), rng.choice(world.colours)
    said = rng.choice(phrases.SAID).format(item=item, colour=colour)
    back = rng.choice(phrases.BACK).format(item=item, colour=colour)
    return [{"role": "user", "content": said}, {"role": "assistant", "content": back}]
