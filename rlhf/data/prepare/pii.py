"""Personal data in text, by its form: found, and masked as [EMAIL], [PHONE], ...

What has a checksum is checked (cards: Luhn, IBAN: mod 97), telephone numbers are read by `phonenumbers` (Google's
libphonenumber), the rest goes by patterns. Names are not found; of postal addresses only the written forms below are
(number and street word in English, street and number in German, P.O. boxes), so what this leaves is not proven free of
personal data.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KINDS = ("key", "email", "iban", "card", "ip", "phone", "address")  # in this order: the first to claim a place has it
REGIONS = ("US", "GB", "DE")

# Digits that touch others, letters or dashes, or a dot before or after digits, are part of something else: a UUID, a
# decimal, a version, a name in code
_BEFORE = r"(?<![\w-])(?<![\W\d]\.)(?<!^\.)"
_AFTER = r"(?![\w-]|\.\d)"
_EMAIL = re.compile(r"(?<![\w.+-])(?!git@)[\w.+-]{1,64}@(?!\d+\.\d)(?:[\w-]{1,63}\.)+[^\W\d_]{2,24}(?![\w-])")
_SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]+?-----END [A-Z ]*PRIVATE KEY-----"
    r"|(?:\s+(?:[A-Za-z0-9+/=]{20,}|(?=\S*[\d+/=])[A-Za-z0-9+/=]+))*)"  # cut off: as far as it looks like one
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"  # JWT
    r"|\b(?P<words>(?:sk|pk|rk)[-_](?:[A-Za-z]+[-_])*[A-Za-z0-9_-]{16,})\b"  # OpenAI, Anthropic, Stripe
    r"|\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{18,}|hf_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{20,})"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{35}|\bxox[abeoprs]-[\w-]{10,}|\bSG\.[\w-]{16,}\.[\w-]{16,}"
    r"|\bpypi-[\w-]{30,}"
)
_NAMED_SECRET = re.compile(
    r"(?i)(?<![A-Za-z])(?:api[ _-]?key|(?:secret[ _-]?)?access[ _-]?key|access[ _-]?token|auth[ _-]?token"
    r"|secret(?:[ _-]?key)?|client[ _-]?secret|token|password|passwd|bearer)"
    r"\b[\"']?(?:\s*[:=]\s*|\s+is:?\s+|(?<=bearer)\s+)[\"']?(?P<value>[^\s\"',;]{8,})"
)
_URL_LOGIN = re.compile(r"(?<=://)[^\s/:@]{1,64}:[^\s/@]{1,64}(?=@)")
_CODE = re.compile(r"[$%<{]|[A-Za-z_][\w.]*[(\[{<]")  # a placeholder, a call, an element: not the secret itself
_IBAN = re.compile(rf"(?i){_BEFORE}[A-Z]{{2}}\d{{2}}(?:[ -]?[A-Z0-9]{{4}}){{2,7}}(?:[ -]?[A-Z0-9]{{1,3}})?\b")
_IBAN_GROUPS = re.compile(r"\w{4}([ -]?)(?:\w{4}\1)*\w{1,4}")  # unlike a UUID's
_CARD = re.compile(r"(?<!\d)\d(?:[ .-]?\d){12,}")
_CARD_GROUPS = ((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3))  # as cards print them
_CARD_START = re.compile(r"4|5[1-5]|2(?:2[2-9]|[3-6]\d|7[01]|720)|3[47]|3(?:0|6|8|9)|35|6(?:011|4[4-9]|5|2)")
_IP4 = re.compile(rf"{_BEFORE}\d{{1,3}}(?:\.\d{{1,3}}){{3}}{_AFTER}")
_VERSION = re.compile(r"(?i)(?:\b(?:version|release|build|revision|section|chapter|clause)s? ?:? ?|[=<>~!]= ?|\w/)\Z")
# Addresses that name no machine on the internet: private, shared, link-local, multicast, reserved
_NOBODYS = "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 169.254.0.0/16 224.0.0.0/3 fc00::/7 fe80::/10"
_NETWORKS = [ipaddress.ip_network(name) for name in _NOBODYS.split()]
_IP6 = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f:]*\d)(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])")
_PHONE_SHAPE = re.compile(rf"{_BEFORE}(?:\+?1[-. ])?(?:\(\d{{3}}\) ?|\d{{3}}[-. ])\d{{3}}[-. ]\d{{4}}{_AFTER}")
_ALONE = re.compile(rf"{_BEFORE}(?=[\d+(])")
_ENDS = re.compile(_AFTER)
_PHONE_HINT = re.compile(r"\d(?:[ ()./-]{0,2}\d){6,}")
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
    rf"\b\d{{1,5}}[A-Za-z]? (?:{_NAME} ){{1,3}}{_STREET}\b\.?(?: (?:NW|NE|SW|SE|N|S|E|W)\b)?"
    rf"(?:,? (?:Apt|Apartment|Suite|Unit|Flat|#)\.? ?#?\w{{1,5}})?(?:, {_CITY})?"
    rf"(?:,? {_STATE} \d{{5}}(?:-\d{{4}})?|,? [A-Z]{{1,2}}\d[A-Z\d]? \d[A-Z]{{2}})?"
    r"|\b[A-ZÄÖÜ][\wäöüß-]*(?:straße|strasse|str\.|weg|platz|allee|gasse|ring|ufer) \d{1,4} ?[a-z]?\b"
    rf"(?:,? \d{{5}} {_CITY})?"
    r"|\bP\.? ?O\.? Box \d{1,6}\b"
)


@dataclass(frozen=True)
class Found:
    """One place in a text: characters start to end (exclusive)."""

    kind: str
    start: int
    end: int
    text: str


def find(text: str, kinds: Sequence[str] = KINDS, regions: Sequence[str] = REGIONS) -> list[Found]:
    """Personal data in a text, in order, without overlaps.

    regions: countries whose national telephone numbers are recognised, as two letters; those with + always are.
    """
    taken: list[Found] = []
    for kind in (k for k in KINDS if k in kinds):
        spans = _phones(text, regions) if kind == "phone" else _FINDERS[kind](text)
        for start, end in spans:
            if end > start and not any(start < other.end and other.start < end for other in taken):
                taken.append(Found(kind, start, end, text[start:end]))
    return sorted(taken, key=lambda found: found.start)


def mask(text: str, found: Sequence[Found]) -> str:
    """The text with each place replaced by its kind: "write to [EMAIL]"."""
    for place in sorted(found, key=lambda f: f.start, reverse=True):
        text = f"{text[: place.start]}[{place.kind.upper()}]{text[place.end :]}"
    return text


def masked(text: str, regions: Sequence[str] = REGIONS) -> str:
    """The text with all personal data that is found in it masked."""
    return mask(text, find(text, regions=regions))


def luhn(digits: str) -> bool:
    """The checksum of card numbers (ISO/IEC 7812-1): every second digit from the right doubled, the sum ends in 0."""
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if i % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def valid_iban(text: str) -> bool:
    """ISO 13616: the first four characters moved to the end, letters as 10 to 35, the number is 1 modulo 97."""
    iban = re.sub(r"[ -]", "", text)
    if not 15 <= len(iban) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97 == 1


def _emails(text: str) -> Iterator[tuple[int, int]]:
    return (m.span() for m in _EMAIL.finditer(text)) if "@" in text else iter(())


def _secrets(text: str) -> Iterator[tuple[int, int]]:
    for m in _SECRETS.finditer(text):
        if not m["words"] or re.search(r"\d|[a-z][A-Z]", m["words"]):  # sk-learn-compatible-estimators is none
            yield m.span()
    yield from (m.span() for m in _URL_LOGIN.finditer(text))
    for m in _NAMED_SECRET.finditer(text):
        value = m["value"].rstrip(".!?)")
        mixed = re.search(r"\d", value) and re.search(r"[^\W\d_]", value)  # a word is no secret
        if len(value) >= 8 and mixed and not _CODE.match(value):
            yield m.start("value"), m.start("value") + len(value)


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for m in _IBAN.finditer(text):
        ends = [m.start() + end.start() for end in re.finditer(r"\b(?!\w)", m[0])]
        ends = [end for end in ends if _ENDS.match(text, end)]
        for end in reversed(ends):  # the pattern may have eaten the next words
            whole = text[m.start() : end]
            if len(re.findall(r"\d", whole)) >= 10 and _IBAN_GROUPS.fullmatch(whole) and valid_iban(whole):
                yield m.start(), end
                break


def _cards(text: str) -> Iterator[tuple[int, int]]:
    """Of each run of digits all of it, or groups in it as cards have them: a date or a check number may follow."""
    for m in _CARD.finditer(text):
        groups = list(re.finditer(r"\d+", m[0]))
        first = 0
        while first < len(groups):
            ends = range(min(len(groups), first + 19), first, -1)
            last = next((end for end in ends if _is_card(groups[first:end], m[0])), 0)
            span = m.start() + groups[first].start(), m.start() + groups[last - 1].end()
            if last and _ALONE.match(text, span[0]) and _ENDS.match(text, span[1]):
                yield span
            first = last or first + 1


def _is_card(groups: list[re.Match], run: str) -> bool:
    digits, sizes = "".join(group[0] for group in groups), tuple(len(group[0]) for group in groups)
    whole = groups[0].start() == 0 and groups[-1].end() == len(run) and "." not in run
    shaped = whole or len(groups) == 1 or sizes in _CARD_GROUPS
    return shaped and 13 <= len(digits) <= 19 and bool(_CARD_START.match(digits)) and luhn(digits)


def _ips(text: str) -> Iterator[tuple[int, int]]:
    for m in (*_IP4.finditer(text), *(_IP6.finditer(text) if ":" in text else ())):
        try:
            address = ipaddress.ip_address(m[0])
        except ValueError:
            continue
        if address.is_loopback or address.is_unspecified or any(address in network for network in _NETWORKS):
            continue
        groups = sum(bool(part) for part in m[0].split(":"))
        a_version = address.version == 4 and _VERSION.search(text, max(0, m.start() - 12), m.start())
        if not a_version and (address.version == 4 or groups >= 3):
            yield m.span()


def _phones(text: str, regions: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Numbers that libphonenumber calls valid and that are written as such: with +, brackets or blanks."""
    if not _PHONE_HINT.search(text):
        return
    yield from (m.span() for m in _PHONE_SHAPE.finditer(text))
    import phonenumbers

    for region in (*regions, None):
        for match in phonenumbers.PhoneNumberMatcher(text, region):
            written = match.raw_string
            if not (_ALONE.match(text, match.start) and _ENDS.match(text, match.end)):
                continue
            if written.count("(") != written.count(")") or re.fullmatch(r"\+?\d+\.\d+", written):
                continue  # the argument of a function, a decimal
            if written[0] != "+" and max(map(len, re.findall(r"\d+", written))) < 2:
                continue  # somebody counts
            before = text[max(0, match.start - 4) : match.start].lower()
            alone = not before.endswith((":", ".", "/", "-")) or before == "tel:"  # not the end of a time or a date
            if alone and (written.startswith(("+", "(", "00")) or _PHONE_WRITTEN.search(written)):
                yield match.start, match.end


def _addresses(text: str) -> Iterator[tuple[int, int]]:
    return (m.span() for m in _ADDRESS.finditer(text))


_FINDERS = {
    "key": _secrets,
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "ip": _ips,
    "address": _addresses,
}
