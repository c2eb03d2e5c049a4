"""Personal data in text, by its form: found, and masked as [EMAIL], [PHONE], ...

What has a checksum is checked (cards: Luhn, IBAN: mod 97), telephone numbers are read by
`phonenumbers` (Google's libphonenumber), the rest goes by patterns. Names are not found; of postal
addresses only the written forms below are (number and street word in English, street and number in
German, P.O. boxes), so what this leaves is not proven free of personal data.
"""

import functools
import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

# In order of precedence: a place that an earlier kind has found is not another kind's
KINDS = ("key", "email", "iban", "card", "ip", "phone", "address")
REGIONS = ("US", "GB", "DE")

# Digits that touch others, letters or dashes, or a dot before or after digits, are part of
# something else: a UUID, a decimal, a version, a name in code
_BEFORE = r"(?<![\w-])(?<![\W\d]\.)(?<!^\.)"
_AFTER = r"(?![\w-]|\.\d)"
_STARTS_ALONE = re.compile(rf"{_BEFORE}(?=[\d+(])")
_ENDS_ALONE = re.compile(_AFTER)

# Not git@host:path, which is a remote, and not a version such as name@1.2
_EMAIL = re.compile(
    r"(?<![\w.+-])(?!git@)[\w.+-]{1,64}@(?!\d+\.\d)(?:[\w-]{1,63}\.)+[^\W\d_]{2,24}(?![\w-])"
)

# Secrets that their form gives away. Group "words" is dropped again if it reads like a name in
# code.
_SECRETS = re.compile(
    # a private key; of one that is cut off, as much as looks like one
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]+?-----END [A-Z ]*PRIVATE KEY-----"
    r"|(?:\s+(?:[A-Za-z0-9+/=]{20,}|(?=\S*[\d+/=])[A-Za-z0-9+/=]+))*)"
    # JSON web tokens
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"
    # OpenAI, Anthropic, Stripe
    r"|\b(?P<words>(?:sk|pk|rk)[-_](?:[A-Za-z]+[-_])*[A-Za-z0-9_-]{16,})\b"
    # GitHub, GitLab, Hugging Face, npm; AWS, Google, Slack, SendGrid, PyPI
    r"|\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{18,}|hf_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{20,})"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{35}|\bxox[abeoprs]-[\w-]{10,}|\bSG\.[\w-]{16,}\.[\w-]{16,}"
    r"|\bpypi-[\w-]{30,}"
)
# "api key: ...", "password = ...", "Bearer ...": a value of eight characters or more after its name
_NAMED_SECRET = re.compile(
    r"(?i)(?<![A-Za-z])(?:api[ _-]?key|(?:secret[ _-]?)?access[ _-]?key|access[ _-]?token|auth[ _-]?token"
    r"|secret(?:[ _-]?key)?|client[ _-]?secret|token|password|passwd|bearer)"
    r"\b[\"']?(?:\s*[:=]\s*|\s+is:?\s+|(?<=bearer)\s+)[\"']?(?P<value>[^\s\"',;]{8,})"
)
# user:password@ in a URL
_URL_LOGIN = re.compile(r"(?<=://)[^\s/:@]{1,64}:[^\s/@]{1,64}(?=@)")
# A placeholder, a call, an element: code in place of a secret
_CODE = re.compile(r"[$%<{]|[A-Za-z_][\w.]*[(\[{<]")

# Country, check digits, then groups of four and a rest; it may swallow following words, so its ends
# are tried in turn
_IBAN = re.compile(
    rf"(?i){_BEFORE}[A-Z]{{2}}\d{{2}}(?:[ -]?[A-Z0-9]{{4}}){{2,7}}(?:[ -]?[A-Z0-9]{{1,3}})?\b"
)
# One separator throughout, unlike a UUID
_IBAN_GROUPS = re.compile(r"\w{4}([ -]?)(?:\w{4}\1)*\w{1,4}")

_CARD = re.compile(r"(?<!\d)\d(?:[ .-]?\d){12,}")
# Sizes of the groups of digits that cards print
_CARD_GROUPS = ((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3))
# First digits of Visa, Mastercard, American Express, Diners, JCB, Discover
_CARD_START = re.compile(
    r"4|5[1-5]|2(?:2[2-9]|[3-6]\d|7[01]|720)|3[47]|3(?:0|6|8|9)|35|6(?:011|4[4-9]|5|2)"
)

_IP4 = re.compile(rf"{_BEFORE}\d{{1,3}}(?:\.\d{{1,3}}){{3}}{_AFTER}")
_IP6 = re.compile(
    r"(?<![\w:.])(?=[0-9A-Fa-f:]*\d)(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])"
)
# What precedes four numbers that are a version or a section
_VERSION = re.compile(
    r"(?i)(?:\b(?:version|release|build|revision|section|chapter|clause)s? ?:? ?|[=<>~!]= ?|\w/)\Z"
)
# Addresses that name no machine on the internet: private, shared, link-local, multicast, reserved
_NOBODYS = "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 169.254.0.0/16 224.0.0.0/3 fc00::/7 fe80::/10"
_NETWORKS = list(map(ipaddress.ip_network, _NOBODYS.split()))

# North American numbers, also invalid ones such as 555-0100
_PHONE_SHAPE = re.compile(
    rf"{_BEFORE}(?:\+?1[-. ])?(?:\(\d{{3}}\) ?|\d{{3}}[-. ])\d{{3}}[-. ]\d{{4}}{_AFTER}"
)
# Seven digits close together: without them libphonenumber, which is slow, is not asked
_PHONE_HINT = re.compile(r"\d(?:[ ()./-]{0,2}\d){6,}")
# National numbers must be written in groups, or as 0151/2345678
_PHONE_WRITTEN = re.compile(r"\d[ -]\d|^0\d{1,4}/\d{5,}$")

_NAME = r"[A-ZÄÖÜ][\wäöüß'.-]*"
_CITY = r"[A-ZÄÖÜ][a-zäöüß'-]+(?: [A-ZÄÖÜ][a-zäöüß'-]+){0,2}"
_STREET = (
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Sq|Terrace|Way|Parkway"
    r"|Pkwy|Crescent|Close|Highway|Hwy)"
)
_STATE = (
    r"(?:AL|AK|AZ|AR|CA|CO|CT|DE|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM|NY|NC|ND|OH|OK"
    r"|OR|PA|RI|SC|SD|TN|TX|UT|VT|VA|WA|WV|WI|WY|DC)"
)
_ADDRESS = re.compile(
    # 12 Baker Street, Apt 4, London NW1 6XE
    rf"\b\d{{1,5}}[A-Za-z]? (?:{_NAME} ){{1,3}}{_STREET}\b\.?(?: (?:NW|NE|SW|SE|N|S|E|W)\b)?"
    rf"(?:,? (?:Apt|Apartment|Suite|Unit|Flat|#)\.? ?#?\w{{1,5}})?(?:, {_CITY})?"
    rf"(?:,? {_STATE} \d{{5}}(?:-\d{{4}})?|,? [A-Z]{{1,2}}\d[A-Z\d]? \d[A-Z]{{2}})?"
    # Hauptstraße 12, 10115 Berlin
    r"|\b[A-ZÄÖÜ][\wäöüß-]*(?:straße|strasse|str\.|weg|platz|allee|gasse|ring|ufer) \d{1,4} ?[a-z]?\b"
    rf"(?:,? \d{{5}} {_CITY})?"
    # P.O. Box 1234
    r"|\bP\.? ?O\.? Box \d{1,6}\b"
)


Span = tuple[int, int]


@dataclass(frozen=True)
class Found:
    """One place in a text: characters start to end (exclusive)."""

    kind: str
    start: int
    end: int
    text: str


def find(text: str, regions: Sequence[str] = REGIONS) -> list[Found]:
    """Return the personal data in a text, in order, without overlaps.

    regions: countries whose national telephone numbers are recognised, as two letters; those with +
    always are.
    """
    taken: list[Found] = []
    for kind in KINDS:
        spans = _phones(text, regions) if kind == "phone" else _FINDERS[kind](text)
        for start, end in spans:
            # an IBAN has runs of digits that would pass for a card
            overlaps = any(start < other.end and other.start < end for other in taken)
            if end > start and not overlaps:
                taken.append(Found(kind, start, end, text[start:end]))
    return sorted(taken, key=lambda found: found.start)


def mask(text: str, found: Sequence[Found]) -> str:
    """Return the text with each place replaced by its kind: "write to [EMAIL]"."""
    for place in sorted(found, key=lambda place: place.start, reverse=True):
        text = f"{text[: place.start]}[{place.kind.upper()}]{text[place.end :]}"
    return text


def masked(text: str, regions: Sequence[str] = REGIONS) -> str:
    """Return the text with all personal data that is found in it masked."""
    return mask(text, find(text, regions=regions))


def luhn(digits: str) -> bool:
    """Check a card number (ISO/IEC 7812-1): every second digit from the right doubled, the digit
    sum ends in 0.
    """
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if i % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def valid_iban(text: str) -> bool:
    """Check ISO 13616: the first four characters moved to the end, letters as 10 to 35, the number
    is 1 modulo 97.
    """
    iban = re.sub(r"[ -]", "", text)
    if not 15 <= len(iban) <= 34:
        return False
    digits = "".join(str(int(character, 36)) for character in iban[4:] + iban[:4])
    return int(digits) % 97 == 1


def _spans(pattern: re.Pattern, text: str) -> Iterator[Span]:
    return map(re.Match.span, pattern.finditer(text))


def _emails(text: str) -> Iterable[Span]:
    # most texts have none, and the pattern is slow
    return _spans(_EMAIL, text) if "@" in text else ()


def _secrets(text: str) -> Iterator[Span]:
    for match in _SECRETS.finditer(text):
        # sk-learn-compatible-estimators is not a key
        if not match["words"] or re.search(r"\d|[a-z][A-Z]", match["words"]):
            yield match.span()
    yield from _spans(_URL_LOGIN, text)
    for match in _NAMED_SECRET.finditer(text):
        value = match["value"].rstrip(".!?)")
        # letters alone are a word of the sentence
        mixed = re.search(r"\d", value) and re.search(r"[^\W\d_]", value)
        if len(value) >= 8 and mixed and not _CODE.match(value):
            yield match.start("value"), match.start("value") + len(value)


def _ibans(text: str) -> Iterator[Span]:
    for match in _IBAN.finditer(text):
        # the pattern may have swallowed the next words: try every end, the last first
        for boundary in reversed(list(re.finditer(r"\b(?!\w)", match[0]))):
            end = match.start() + boundary.start()
            candidate = text[match.start() : end]
            shaped = _ENDS_ALONE.match(text, end) and _IBAN_GROUPS.fullmatch(candidate)
            if shaped and len(re.findall(r"\d", candidate)) >= 10 and valid_iban(candidate):
                yield match.start(), end
                break


def _cards(text: str) -> Iterator[Span]:
    """Yield, of each run of digits, all of it or groups as cards have them: a date or a check
    number may follow.
    """
    for match in _CARD.finditer(text):
        groups = list(re.finditer(r"\d+", match[0]))
        first = 0
        while first < len(groups):
            last = _card_end(groups, first, match[0])
            start = match.start() + groups[first].start()
            end = match.start() + groups[last - 1].end()
            if last and _STARTS_ALONE.match(text, start) and _ENDS_ALONE.match(text, end):
                yield start, end
            # go on behind what was found, or try from the next group
            first = last or first + 1


def _card_end(groups: list[re.Match], first: int, run: str) -> int:
    """Return the end of the longest card number that begins with group `first`, 0 if there is none."""
    for end in range(min(len(groups), first + 19), first, -1):
        if _is_card(groups[first:end], run):
            return end
    return 0


def _is_card(groups: list[re.Match], run: str) -> bool:
    numbers = [group[0] for group in groups]
    digits, sizes = "".join(numbers), tuple(map(len, numbers))
    whole = groups[0].start() == 0 and groups[-1].end() == len(run) and "." not in run
    shaped = whole or len(groups) == 1 or sizes in _CARD_GROUPS
    return shaped and 13 <= len(digits) <= 19 and bool(_CARD_START.match(digits)) and luhn(digits)


def _ips(text: str) -> Iterator[Span]:
    matches = list(_IP4.finditer(text))
    # the pattern is slow where it cannot match
    if ":" in text:
        matches.extend(_IP6.finditer(text))
    for match in matches:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            continue
        if (
            address.is_loopback
            or address.is_unspecified
            or any(address in network for network in _NETWORKS)
        ):
            continue
        # a version has four numbers, a time of day two or three groups
        if address.version == 4:
            plausible = not _VERSION.search(text, max(0, match.start() - 12), match.start())
        else:
            plausible = len(list(filter(None, match[0].split(":")))) >= 3
        if plausible:
            yield match.span()


def _phones(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Yield numbers that libphonenumber calls valid and that are written as such: with +, brackets
    or blanks.
    """
    if not _PHONE_HINT.search(text):
        return
    import phonenumbers

    yield from _spans(_PHONE_SHAPE, text)
    for region in (*regions, None):
        for match in phonenumbers.PhoneNumberMatcher(text, region):
            if _written_as_phone(text, match.start, match.end):
                yield match.start, match.end


def _written_as_phone(text: str, start: int, end: int) -> bool:
    written = text[start:end]
    if not (_STARTS_ALONE.match(text, start) and _ENDS_ALONE.match(text, end)):
        return False
    # the argument of a function, a decimal
    if written.count("(") != written.count(")") or re.fullmatch(r"\+?\d+\.\d+", written):
        return False
    # "1 2 3 4 5 6 7": somebody counts
    if written[0] != "+" and max(map(len, re.findall(r"\d+", written))) < 2:
        return False
    # the end of a time or a date
    before = text[max(0, start - 4) : start].lower()
    if before.endswith((":", ".", "/", "-")) and before != "tel:":
        return False
    return written.startswith(("+", "(", "00")) or bool(_PHONE_WRITTEN.search(written))


_FINDERS = {
    "key": _secrets,
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "ip": _ips,
    "address": functools.partial(_spans, _ADDRESS),
}
