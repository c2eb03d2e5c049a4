import random
import uuid

import pytest

from rlhf.data.prepare.pii import find, luhn, mask, valid_iban


def test_luhn_by_hand():
    # 79927398713: doubled from the right 1 -> 2, 8 -> 16 -> 7, 3 -> 6, 2 -> 4, 9 -> 18 -> 9
    # 3 + 2 + 7 + 7 + 9 + 6 + 7 + 4 + 9 + 9 + 7 = 70
    assert luhn("79927398713") and not luhn("79927398710")


def test_iban_by_hand():
    # ISO 13616's example; the same with two digits exchanged
    assert valid_iban("GB82 WEST 1234 5698 7654 32") and not valid_iban(
        "GB82 WEST 1234 5698 7654 23"
    )


@pytest.mark.parametrize(
    ("kind", "secret"),
    [
        ("email", "jane.doe+news@mail.example.co.uk"),
        ("phone", "+49 30 901820"),
        ("phone", "(415) 555-2671"),
        ("phone", "020 7946 0958"),
        ("phone", "555-123-4567"),
        ("phone", "030/12345678"),
        ("phone", "0171/1234567"),
        ("card", "4111.1111.1111.1111"),
        ("iban", "de89 3704 0044 0532 0130 00"),
        ("card", "4111 1111 1111 1111"),
        ("card", "378282246310005"),
        ("iban", "DE89 3704 0044 0532 0130 00"),
        ("iban", "GB82WEST12345698765432"),
        ("ip", "203.0.113.7"),
        ("ip", "2001:db8:85a3::8a2e:370:7334"),
        ("key", "sk-proj-abcDEF1234567890abcd"),
        ("key", "ghp_abcdefghijklmnopqrstuvwxyz0123456789"),
        ("key", "AKIAIOSFODNN7EXAMPLE"),
        ("key", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVPmB92K27u"),
        ("key", "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----"),
        ("address", "12 Baker Street, London NW1 6XE"),
        ("address", "1600 Pennsylvania Avenue NW, Washington, DC 20500"),
        ("address", "Hauptstraße 12, 10115 Berlin"),
        ("address", "P.O. Box 1234"),
    ],
)
def test_every_kind_is_found_whole_and_masked(kind, secret):
    text = f"Before it {secret}, and after."
    (found,) = find(text)
    assert (found.kind, found.text) == (kind, secret)
    assert mask(text, [found]) == f"Before it [{kind.upper()}], and after."


def test_a_secret_is_known_by_its_name():
    for text, masked in (
        ("my password: hunter2hunter2 ok", "my password: [KEY] ok"),
        ("Bearer abcdef1234567890", "Bearer [KEY]"),
        ("https://bob:s3cretpw@host.example/x", "https://[KEY]@host.example/x"),
        ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPx", "AWS_SECRET_ACCESS_KEY=[KEY]"),
        ("DB_PASSWORD=hunter2hunter2", "DB_PASSWORD=[KEY]"),
        (
            "-----BEGIN PRIVATE KEY-----\nMIIEow123\nAbCdEfGhIjKlMnOpQrStUvWx and so on",
            "[KEY] and so on",
        ),
    ):
        assert mask(text, find(text)) == masked


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("4111 1111 1111 1111 12/27", "[CARD] 12/27"),
        ("4111 1111 1111 1111 123", "[CARD] 123"),
        ("4111111111111111 123", "[CARD] 123"),
        ("card no.4111111111111111", "card no.[CARD]"),
        ("tel:+442079460958", "tel:[PHONE]"),
        ("gb82 west 1234 5698 7654 32 then some more", "[IBAN] then some more"),
    ],
)
def test_what_stands_beside_it_hides_nothing(text, masked):
    assert mask(text, find(text)) == masked


@pytest.mark.parametrize(
    "text",
    [
        "order 4155552671 of 2024-11-22 at 10:30",
        "card 4111 1111 1111 1112 fails its checksum, and so does DE89 3704 0044 0532 0130 01",
        "ISBN 978-3-16-148410-0, 1,234,567,890 and 3.14159265358979",
        "version 1.2.3.4, at 12:30:45, abc::def, localhost is 127.0.0.1",
        "the password was changed yesterday; a token is required; my secret is: tell nobody",
        "sk-learn-compatible-estimators, pk_columns_for_every_table and sk_buff_head_init_something_else",
        "4.11111111111111, 4111 1111 1111 1112 12/27 and 1/2/2024",
        "between 3 and 4 streets away, in 12 ways, user@ home, @handle",
        "count 1 2 3 4 5 6 7 8 9 0 and 1, 2, 3, 4, 5, 6, 7, 8",
        "0.4111111111111111, .4111111111111111, 4111111111111111.5 and x = 4111111111111111e5",
        "4111-1111-1111-1111-2222, 4111 1111 1111 1111-2 and A4111111111111111",
        "hosts 192.168.1.10, 10.0.0.5, 172.16.3.4, 169.254.1.1, fe80::1:2:3, mask 255.255.255.0, 224.0.0.1, 10.0.0.0/8",
        "version: 8.1.2.3, Release 8.1.2.4, foo==8.1.2.5, foo >= 8.1.2.6, libfoo/8.1.2.7, section 8.1.2.8, 8.1.2.9-rc1",
        "ORD-555-123-4567, A555-123-4567, 555-123-4567-89, 555.123.4567.8, 1.212-555-0123.7 and phone_5551234567",
        "sum(2125550123, 1), Decimal('+35236450.6') and arr[5551234567]",
        "git@github.com:org/repo.git and pkg@2.0.0-beta.rc",
        "token = tokenizer.encode(x1), password: ${DB_PASSWORD_1}, api_key=os.environ['KEY_1'], secret=<your-key-1>",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text):
    assert find(text) == []


def test_numbers_that_name_no_person_are_left_alone():
    rng = random.Random(0)
    for _ in range(200):
        digits = [f"{rng.randrange(10**n):0{n}d}" for n in (8, 4, 4, 4, 12)]
        texts = (
            str(uuid.UUID(int=rng.getrandbits(128), version=4)),
            "-".join(digits),
            f"{rng.randrange(10)}.{rng.randrange(10**16):016d}",
            f"({rng.uniform(-90, 90):.7f}, {rng.uniform(-180, 180):.7f})",
            f"192.168.{rng.randrange(256)}.{rng.randrange(256)}",
            f"{rng.getrandbits(160):040x}",
        )
        for text in texts:
            assert find(f"see {text} here") == []


def test_regions_are_for_national_numbers_alone():
    assert [f.text for f in find("ring 030 901820 or +49 30 901820", regions=["US"])] == [
        "+49 30 901820"
    ]
    assert len(find("ring 030 901820 or +49 30 901820", regions=["DE"])) == 2


def test_places_do_not_overlap_and_stand_in_order():
    found = find("a@b.example 4111111111111111 a@b.example")
    assert [(f.kind, f.start) for f in found] == [("email", 0), ("card", 12), ("email", 29)]
