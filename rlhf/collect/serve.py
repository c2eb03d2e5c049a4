"""`rlhf collect serve` and `rlhf collect links`: the app on a port, and the personal links to it."""

import contextlib
import ipaddress
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rlhf.collect import auth
from rlhf.collect.guide import Guide
from rlhf.collect.pairs import check_pairs
from rlhf.config import option
from rlhf.data.records import one_name
from rlhf.data.store import Store
from rlhf.errors import UserError
from rlhf.http_server import is_loopback, listen, local_url

MOST_CRITERIA = 8
TAGS = ["wrong", "off tone", "too long", "too short", "unsafe"]


@dataclass
class ServeConfig:
    """Let people compare the pairs of a preference store, and order the answers of its rankings, in
    their browser, on this machine or behind https.
    """

    store: str = option(
        help="the preference store (SQLite) with pairs; rlhf collect sample makes them"
    )
    annotators: list[str] = option(
        [], "names of people who may judge; the link of each new one is printed"
    )
    adjudicators: list[str] = option(
        [], "names of people who take a second look at disputed pairs, and whose vote ends it"
    )
    overlap: int | None = option(
        None, "people who judge each pair; default: as last time, at first 3", low=1
    )
    lease_minutes: float | None = option(
        None,
        "after this time a pair that was handed out and not answered is free again; default: as last time, at first 30",
        above=0,
    )
    control_share: float | None = option(
        None,
        "share of control pairs among what is shown; default: as last time, at first 0.1",
        low=0,
        high=1,
    )
    voice: str | None = option(None, "a brand voice (YAML) whose guide is shown beside the answers")
    tags: list[str] = option(TAGS, "reasons to tick, as short words")
    criteria: list[str] = option(
        [], "what each answer may be rated on from 1 to 5 beside the choice, such as clear,on brand"
    )
    show_judge: bool = option(
        False, "after each answer, say what a model whose votes are in the store chose"
    )
    host: str = option(
        "127.0.0.1", "the address to listen on; any but this machine's own needs https"
    )
    port: int = option(8000, "the port to listen on", low=1, high=65535)
    url: str | None = option(
        None, "where people reach it, such as https://judge.example.org behind a proxy"
    )
    certificate: str | None = option(
        None, "file with the TLS certificate (PEM), to serve https without a proxy"
    )
    certificate_key: str | None = option(None, "file with its private key")

    def validate(self) -> None:
        if bool(self.certificate) != bool(self.certificate_key):
            raise UserError(
                "'certificate' and 'certificate_key' belong together; found one of them"
            )
        for path in (self.certificate, self.certificate_key):
            if path and not Path(path).is_file():
                raise UserError(f"{path}: no such file")
        if self.certificate:
            check_certificate(self.certificate, self.certificate_key)
        # links are this address and a path, so it has none of its own
        parts = urlsplit(self.url or "http://host")
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path not in ("", "/"):
            raise UserError(
                f"'url' is {self.url!r}, expected http://HOST or https://HOST without a path"
            )
        if _is_wildcard(self.host) and not self.url:
            raise UserError(
                f"'host' is {self.host}, which means every address of this machine and cannot be used in a link; say "
                "where people reach it with --url https://HOST"
            )
        self.criteria = list(dict.fromkeys(one_name(name) for name in self.criteria))
        if len(self.criteria) > MOST_CRITERIA:
            raise UserError(
                f"'criteria' has {len(self.criteria)} names, expected {MOST_CRITERIA} at most: people rate two "
                "answers by each"
            )
        self.annotators = list(dict.fromkeys(map(auth.checked_name, self.annotators)))
        self.adjudicators = list(dict.fromkeys(map(auth.checked_name, self.adjudicators)))
        both = set(self.annotators) & set(self.adjudicators)
        if both:
            raise UserError(
                f"{', '.join(sorted(both))}: is named as annotator and as adjudicator, who must be another person"
            )


def check_certificate(certificate: str, key: str) -> None:
    """Raise UserError unless the two PEM files are a TLS certificate and its private key, without a
    password.
    """
    try:
        # without a password given, an encrypted key would be asked about on the terminal
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{certificate} and {key}: no TLS certificate with its key ({error}). Expected two PEM files that belong "
            "together, the key without a password"
        ) from None


@dataclass
class LinksConfig:
    """Make new personal links. An earlier link of the same person stops working; what they judged
    stays theirs.
    """

    store: str = option(help="the preference store (SQLite)")
    annotators: list[str] = option([], "names of people; who is new is added")
    owner: bool = option(False, "a new link to the owner's page as well")
    revoke: list[str] = option(
        [], "names of people whose link is to stop working, without a new one"
    )
    url: str | None = option(None, "where people reach the app; default: as served last")


def serve(config: ServeConfig, guide: Guide | None = None) -> None:
    """Serve until interrupted, with `guide` beside the answers.

    Prints each new personal link once: only hashes of their tokens are kept.
    """
    import uvicorn

    from rlhf.collect.app import TimedProtocol, create_app
    from rlhf.collect.session import Site

    own_url = local_url(config.host, config.port, "https" if config.certificate else "http")
    url = (config.url or own_url).rstrip("/")
    # listening before the store is touched: a port that is taken must not cost anybody their link
    with contextlib.closing(listen(config.host, config.port)) as listener:
        with Store.open(config.store) as store:
            _set_up(store, config, url)
        for warning in _warnings(config, url):
            print(f"WARNING: {warning}", file=sys.stderr)
        site = Site(
            Path(config.store),
            url=url,
            guide=guide,
            tags=config.tags,
            criteria=config.criteria,
            show_judge=config.show_judge,
            secure=url.startswith("https://"),
            cookie=f"rlhf_{config.port}",
        )
        settings = uvicorn.Config(
            create_app(site),
            timeout_graceful_shutdown=5,
            # paths are never logged: a personal link's path is its secret
            access_log=False,
            # a warning for every malformed request would let anybody fill the log
            log_level="error",
            server_header=False,
            http=TimedProtocol,
            ws="none",
            ssl_certfile=config.certificate,
            ssl_keyfile=config.certificate_key,
        )
        listening = "" if url == own_url else f", listening on {own_url}"
        print(f"serving {config.store} on {url}{listening} (Ctrl-C ends)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listener])


@dataclass
class ExcludeConfig:
    """Let the votes of annotators count no more, from now on: they stay in the store, and an earlier
    state (STORE@EVENT) is what it was. --back true takes it back."""

    store: str = option(help="the preference store (SQLite)")
    annotators: list[str] = option([], "names of those whose votes are not to count")
    back: bool = option(False, "their votes count again")

    def validate(self) -> None:
        if not self.annotators:
            raise UserError("whose votes? Give --annotators NAME,NAME")


def exclude(config: ExcludeConfig) -> None:
    """Exclude annotators, or take it back; all of them or none."""
    with Store.open(config.store) as store:
        with store.transaction():
            events = [store.exclude(name, back=config.back) for name in config.annotators]
        counted = "count again" if config.back else "do not count"
        for name, event in zip(config.annotators, events, strict=True):
            print(f"{name}: votes {counted} from event {event} on")


def links(config: LinksConfig) -> dict[str, str]:
    """Print new links; returns them by name, the owner's under ''."""
    if not (config.annotators or config.owner or config.revoke):
        raise UserError(
            "nothing to do: give --annotators NAME,NAME or --owner true or --revoke NAME"
        )
    # without doubles: a second link of one person would end the first
    names: list[str | None] = list(dict.fromkeys(map(auth.checked_name, config.annotators)))
    if config.owner:
        names.append(None)
    made = {}
    with Store.open(config.store) as store:
        url = (config.url or store.setting("url") or "http://127.0.0.1:8000").rstrip("/")
        _revoke(store, config.revoke)
        for name in names:
            link = f"{url}/enter/{auth.new_link(store, name)}"
            made[name or ""] = link
            print(f"{name or 'owner'}: {link}")
    return made


def _revoke(store: Store, names: list[str]) -> None:
    for name in map(one_name, names):
        store.set_token(store.annotator_id(name), None)
        print(f"{name}: link revoked")


def _set_up(store: Store, config: ServeConfig, url: str) -> None:
    """Keep the rules in the store, add annotators, and print new links."""
    check_pairs(store)
    store.set_setting("url", url)
    lease_seconds = None if config.lease_minutes is None else 60 * config.lease_minutes
    rules = {
        "overlap": config.overlap,
        "control_share": config.control_share,
        "lapse": lease_seconds,
    }
    for name, value in rules.items():
        # what is not given stays as it was last time
        if value is not None:
            store.set_setting(name, str(value))

    with_link = {one_name(row["name"]) for row in store.annotators() if row["token_hash"]}
    roles = dict.fromkeys(config.annotators, "annotator")
    roles |= dict.fromkeys(config.adjudicators, "adjudicator")
    for name, role in roles.items():
        # a new link would end the one that the person has; this one only checks the role
        store.add_annotator(name, role=role)
        if name not in with_link:
            print(f"{name}: {url}/enter/{auth.new_link(store, name)}")
            with_link.add(name)
    # printed once: a later start cannot know the token
    if store.setting(auth.OWNER) is None:
        print(f"owner: {url}/enter/{auth.new_link(store, None)}")
    if not with_link:
        print(
            "nobody has a link yet: give --annotators NAME,NAME or add people on the owner's page"
        )
    print(
        f"a lost link is replaced with: rlhf collect links {config.store} --annotators NAME (or --owner true)"
    )


def _warnings(config: ServeConfig, url: str) -> list[str]:
    """Return warnings where links and votes could be read on the way: to `url`, and on the port
    itself.
    """
    found = []
    if url.startswith("http://") and not is_loopback(urlsplit(url).hostname or ""):
        found.append(
            f"people reach {url} without https: links and votes can be read on the way. Give --certificate and "
            "--certificate_key, or put a proxy with https before it and give --url https://..."
        )
    if not (is_loopback(config.host) or config.certificate):
        found.append(
            f"others can reach {config.host} port {config.port} and there is no https on it. Give --certificate and "
            "--certificate_key, or let only the proxy reach it"
        )
    return found


def _is_wildcard(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_unspecified
    return not host
