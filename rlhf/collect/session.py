"""What all pages share: the site, its templates, the signed-in session, and the check of forms."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from rlhf.collect import auth
from rlhf.collect.guide import Guide
from rlhf.collect.queue import Queue
from rlhf.collect.safe_markdown import render, visible
from rlhf.collect.status import fraction, number, percent, rules_of
from rlhf.data.annotator_report import remarks
from rlhf.data.store import Store
from rlhf.report.format import share
from rlhf.voting.page import LEGEND, sentences, stop_text

HERE = Path(__file__).parent
COOKIE_SECONDS = 90 * 24 * 3600


class Refused(Exception):
    """A request that this session has no right to make; `reason` is shown on the page."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass
class Site:
    """The state of the app, which every request reads."""

    path: Path
    # where people reach it, without a slash at the end
    url: str = ""
    guide: Guide | None = None
    tags: list[str] = field(default_factory=list)
    # names of what each answer is rated on, 1 to 5
    criteria: list[str] = field(default_factory=list)
    # say after each answer what a model's vote on the pair was
    show_judge: bool = False
    # send cookies over https only
    secure: bool = False
    # prefix of the cookies' names, since browsers share cookies between ports
    cookie: str = "rlhf"
    worker: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "store"))
    store: Store | None = None
    queue: Queue | None = None
    # the owner's summary, with the newest event and comparison when it was computed
    summary: tuple[tuple[int, int], dict[str, Any]] | None = None
    summary_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the function's value, called on the thread that owns the store."""
        return await asyncio.get_running_loop().run_in_executor(self.worker, function, *arguments)

    def open(self) -> None:
        self.store = Store.open(self.path)
        self.queue = Queue(self.store, rules_of(self.store))

    def sign_in(self, response: Response, role: str, token: str) -> Response:
        # Lax, not Strict: a link followed from an e-mail must arrive signed in
        options = {"httponly": True, "samesite": "lax", "secure": self.secure}
        response.set_cookie(f"{self.cookie}_{role}", token, max_age=COOKIE_SECONDS, **options)
        return response

    def sign_out(self, response: Response, role: str) -> Response:
        response.delete_cookie(
            f"{self.cookie}_{role}", httponly=True, samesite="lax", secure=self.secure
        )
        return response


async def annotator(request: Request) -> tuple[Site, str, dict[str, Any]]:
    """Return the site, the session's token and its annotator; raises Refused."""
    site = request.app.state.site
    token = request.cookies.get(f"{site.cookie}_annotator", "")
    person = await site.do(auth.annotator_of, site.store, token) if token else None
    if person is None:
        raise Refused(
            401,
            "Please open your personal link. If you have none, ask whoever runs this collection.",
        )
    return site, token, person


async def owner(request: Request) -> tuple[Site, str]:
    """Return the site and the owner's token; raises Refused."""
    site = request.app.state.site
    token = request.cookies.get(f"{site.cookie}_owner", "")
    # the same answer without a cookie and with a wrong one
    if not token or not await site.do(auth.is_owner, site.store, token):
        raise Refused(
            401, "This page is for the owner of the collection. Open the owner's link first."
        )
    return site, token


async def read_form(request: Request, token: str) -> dict[str, list[str]]:
    """Return the fields of a form that this site made for this session; raises Refused for any
    other.
    """
    # a broken form is refused below, like any that is not ours
    body = (await request.body()).decode("utf-8", "replace")
    with contextlib.suppress(ValueError):
        form = parse_qs(body, max_num_fields=100)
        if auth.form_is_ours(token, form.get("form", [""])[0]):
            return form
    raise Refused(
        403,
        "This form did not come from your own page here. Go back, reload the page and try again.",
    )


def page(template: str, site: Site, status: int = 200, **values: Any) -> HTMLResponse:
    return HTMLResponse(TEMPLATES.get_template(template).render(site=site, **values), status)


def shown(value: Any) -> Any:
    """Write out hidden and control characters in every text on a page, except in HTML that is
    already safe.
    """
    is_plain_text = isinstance(value, str) and not isinstance(value, Markup)
    return visible(value) if is_plain_text else value


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


TEMPLATES = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=shown,
)
TEMPLATES.globals["vote_legend"] = LEGEND
TEMPLATES.filters |= {
    "signed": _signed,
    "vote_sentences": sentences,
    "rate": share,
    "stop_text": stop_text,
    "render": render,
    "percent": percent,
    "fraction": fraction,
    "number": number,
    "remarks": remarks,
}
