"""Ask a service of the user: bounded in time and size, retried, and without keys in any file or
message.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from rlhf.errors import UserError
from rlhf.text import clip

# seconds before the first retry, doubled each time up to the second
FIRST_WAIT, MAX_WAIT = 1.0, 60.0
# bytes
LONGEST_ANSWER = 64 * 2**20
# bytes read at a time
PIECE = 64 * 1024
# names in a URL's query that hold a key, such as api_key, access-token or sig; "monkey" is none
_KEY = re.compile(
    r"(?:^|[^a-z])(?:api|access|secret|auth)?"
    r"(?:key|token|secret|password|passwd|pwd|auth|authorization|sig|signature|credentials?)(?:$|[^a-z])"
)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class Service:
    """The address of a service, the seconds for a whole answer, and the retries after the first
    attempt.

    `name` is how messages call it, such as "scorer 'tone'"; `remedy` is what helps where it is too
    slow.
    """

    name: str
    url: str
    timeout: float
    retries: int
    token: str | None = field(default=None, repr=False)
    remedy: str = "raise `timeout` or `retries`, or lower `batch_size`"

    def __str__(self) -> str:
        """Return name and address for messages, without the query, which may hold a key."""
        return f"{self.name} ({self.address})"

    @property
    def address(self) -> str:
        """The address without the query, which may hold a key."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"

    def without_token(self, text: str) -> str:
        """Return a text of the service without the token, which it may repeat in a message."""
        return text.replace(self.token, "***") if self.token else text


class AnswerTooLong(Exception):
    """The service sent more than LONGEST_ANSWER bytes."""


class Refused(UserError):
    """The service refused a request with the HTTP status `status`: a repeat will not help."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """What a service said: HTTP status, headers, text."""

    status: int
    headers: Mapping[str, str]
    text: str

    def json(self) -> Any:
        """Return the content. Raises ValueError where it is not JSON, or is nested too deeply to be
        read.
        """
        try:
            return json.loads(self.text)
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def excerpt(self, service: Service) -> str:
        """Return the text on one line, cut to 300 characters."""
        return clip(service.without_token(self.text), 300) or "(nothing)"


def check_url(url: Any, where: str) -> None:
    """Raise UserError, naming `where`, unless this is an http(s) URL that holds no password and no
    key.

    The URL is written into config.yaml, checkpoints and W&B: a key in its query is given as
    ${VARIABLE}.
    """
    text = str(url)
    if "@" in text.rpartition("://")[2].partition("/")[0]:
        raise UserError(
            f"{where}: the URL holds a user name or a password ('@'), which would be written into the run's files. "
            "Put a token into an environment variable and name that: token_env: SCORER_TOKEN"
        )
    try:
        parts = urlsplit(text)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    # a port or an IPv6 address that is none
    except ValueError:
        right = False
    if not right:
        raise UserError(
            f"{where}: the URL is {text.partition('?')[0]!r}, expected http://HOST:PORT/PATH or https://..."
        )
    for name, value in parse_qsl(parts.query):
        if looks_like_key(name) and not _VARIABLE.fullmatch(value):
            raise UserError(
                f"{where}: '{name}' in the URL's query looks like a key (not shown), which would be written into the "
                f"run's files. Put it into an environment variable and name that: ?{name}=${{SCORER_KEY}}"
            )
    full_url(text, where)


def looks_like_key(name: str) -> bool:
    """Return whether something of this name, such as api_key or access-token, is a secret."""
    return bool(_KEY.search(name.lower()))


def full_url(url: str, where: str) -> str:
    """Return the URL with its ${VARIABLE}s from the environment. Raises UserError where one is not
    set.
    """
    return _VARIABLE.sub(lambda found: _from_environment(found[1], where), url)


def _from_environment(variable: str, where: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise UserError(
            f"{where}: the environment variable {variable} is not set. Set it: export {variable}=..."
        )
    return value


def send(url: str, content: Any, timeout: float, token: str | None = None) -> Answer:
    """Post `content` as JSON (None: get the URL) and read the whole answer within `timeout`
    seconds. Redirects are not followed.

    Raises requests.Timeout, requests.ConnectionError or another requests.RequestException, and
    AnswerTooLong.
    """
    import requests
    import urllib3

    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    deadline = time.monotonic() + timeout
    is_get = content is None
    response = requests.request(
        "GET" if is_get else "POST",
        url,
        data=None if is_get else json.dumps(content, allow_nan=False).encode(),
        headers=headers,
        timeout=timeout,
        # without an `auth`, requests looks for credentials in ~/.netrc
        auth=lambda request: request,
        allow_redirects=False,
        stream=True,
    )
    with response as answer:
        read = bytearray()
        try:
            while piece := answer.raw.read1(PIECE, decode_content=True):
                read += piece
                if len(read) > LONGEST_ANSWER:
                    raise AnswerTooLong
                # an answer in small pieces never exceeds the timeout of a single read
                if time.monotonic() > deadline:
                    raise requests.Timeout
        except urllib3.exceptions.ReadTimeoutError:
            raise requests.Timeout from None
        except urllib3.exceptions.HTTPError as error:
            raise requests.ConnectionError(error) from error
        return Answer(
            answer.status_code, answer.headers, read.decode(answer.encoding or "utf-8", "replace")
        )


def ask(service: Service, content: Any, work: str, stop: threading.Event | None = None) -> Answer:
    """Return the answer to one request, see `send`; retry after connection errors, timeouts, HTTP
    429 and 5xx.

    `stop`, when it is set, ends the waiting between two attempts. Raises UserError when the request
    is refused or no attempt is left; `work` says what was asked: "score 4 samples".
    """
    import requests

    began, pause = time.monotonic(), FIRST_WAIT
    url, stop = full_url(service.url, str(service)), stop or threading.Event()
    for attempt in range(1, service.retries + 2):
        # seconds that the service asks for
        requested = 0.0
        try:
            answer = send(url, content, service.timeout, service.token)
        except requests.Timeout:
            reason = f"no whole answer within {service.timeout:g} s"
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            reason = f"no connection: {_cause(error)}"
        except AnswerTooLong:
            raise UserError(
                f"{service} sent more than {LONGEST_ANSWER >> 20} MiB when asked to {work}"
            ) from None
        # its own message may hold the URL's query
        except requests.RequestException as error:
            raise UserError(f"{service}: the request failed ({type(error).__name__})") from None
        else:
            if answer.status < 300:
                return answer
            reason = f"HTTP {answer.status}: {answer.excerpt(service)}"
            if answer.status < 400:
                raise UserError(
                    f"{service} sends elsewhere (HTTP {answer.status}). Give the final URL"
                )
            if answer.status != 429 and answer.status < 500:
                raise Refused(f"{service} refused the request. {reason}", answer.status)
            requested = retry_after(answer.headers.get("Retry-After"))

        if attempt <= service.retries:
            seconds = min(max(pause, requested), MAX_WAIT)
            note = f"{service}: {reason}; retry {attempt} of {service.retries} in {seconds:.3g} s"
            print(note, file=sys.stderr, flush=True)
            if stop.wait(seconds):
                break
            pause = min(2 * pause, MAX_WAIT)
    raise UserError(
        f"{service} did not respond after {attempt} {'attempt' if attempt == 1 else 'attempts'} "
        f"in {time.monotonic() - began:.0f} s. Last: {reason}\n"
        f"  Check that the service runs, that this machine reaches it and that it can {work} within "
        f"{service.timeout:g} s; else {service.remedy}."
    )


def retry_after(text: str | None) -> float:
    """Return the seconds that a Retry-After header asks for (a number, or a date); 0 where it
    cannot be read.
    """
    import urllib3

    try:
        return float(urllib3.Retry().parse_retry_after(text or "0"))
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return 0.0


def read_token(variable: str | None, where: str) -> str | None:
    """Return the bearer token in an environment variable, or None without a name.

    Raises UserError where it cannot be used.
    """
    if variable is None:
        return None
    if not isinstance(variable, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise UserError(
            f"{where}: token_env names an environment variable, in capitals, such as SCORER_TOKEN; found something "
            "else (not shown: it may be the token itself)"
        )
    token = _from_environment(variable, where)
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(
            f"{where}: the token in {variable} holds a space or a character that no header can carry"
        )
    return token


def vllm_service(url: str, timeout: float, retries: int) -> Service:
    """Return the API of the vLLM server at `url`, which may end in its /v1."""
    address = url.rstrip("/").removesuffix("/v1") + "/v1"
    variable = "VLLM_API_KEY" if os.environ.get("VLLM_API_KEY") else None
    token = read_token(variable, "vllm_url")
    return Service("vllm_url", address, timeout, retries, token, "lower `generation_batch_size`")


def _cause(error: BaseException) -> str:
    """Return the innermost reason ('Connection refused')."""
    # the outer errors repeat the URL, whose query may hold a key
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
