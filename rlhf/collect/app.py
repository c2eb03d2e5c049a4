"""The annotation app: pages for those who judge, pages for the owner.

One thread owns the store and takes requests in turn, so that a vote is decided, written and on disk
(synchronous=FULL) before its page is answered; the owner's statistics read the file beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import h11
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlhf.collect import owner, pages
from rlhf.collect.session import HERE, Refused, Site, page

# bytes
LONGEST_FORM = 64 * 1024
# until a request must be complete
REQUEST_SECONDS = 30.0
FAILED = "Something failed on the server. What was saved is safe. Reload the page; if it fails again, tell the owner."
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def create_app(site: Site) -> Headers:
    """Return the application; `site.path` must be a store."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        await site.do(site.open)
        yield
        await site.do(site.store.close)
        site.worker.shutdown()

    static = Mount("/static", StaticFiles(directory=HERE / "static"))
    not_found = message_page(404, "Nothing here", "There is no such page.")
    handlers = {
        Refused: refused,
        ClientDisconnect: disconnected,
        404: not_found,
        405: not_found,
        413: message_page(413, "Too long", "That form was too long."),
        500: message_page(500, "That did not work", FAILED),
    }
    app = Starlette(
        routes=[*pages.ROUTES, *owner.ROUTES, static],
        lifespan=lifespan,
        exception_handlers=handlers,
        max_body_size=LONGEST_FORM,
    )
    app.state.site = site
    # around all of it: the page of a failure is made outside of any middleware
    return Headers(app)


class Headers:
    """Every answer forbids foreign assets, framing, sniffing and referrers; pages are not kept by
    the browser.
    """

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def sending(message: dict) -> None:
            if message["type"] == "http.response.start":
                is_static = scope["path"].startswith("/static/")
                added = HEADERS | {"Cache-Control": "no-cache" if is_static else "no-store"}
                encoded = [(name.lower().encode(), value.encode()) for name, value in added.items()]
                message["headers"] = [*message["headers"], *encoded]
            await send(message)

        await self.app(scope, receive, sending if scope["type"] == "http" else send)


class TimedProtocol(H11Protocol):
    """Close a connection whose request is not complete in time; uvicorn alone would wait forever."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch()

    def watch(self) -> None:
        """Start the timer with a request, stop it when the request is complete."""
        # an open connection without a request costs a slot as much as a slow form
        waiting = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if waiting and self.timer is None:
            self.timer = self.loop.call_later(REQUEST_SECONDS, self.transport.close)
        elif not waiting and self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self.timer is not None:
            self.timer.cancel()


async def disconnected(request: Request, error: Exception) -> Response:
    """Answer a closed connection, which nobody reads: it was closed before the form was complete."""
    return Response(status_code=408)


async def refused(request: Request, error: Refused) -> Response:
    return page(
        "message.html", request.app.state.site, error.status, title="No entry", text=error.reason
    )


def message_page(status: int, title: str, text: str) -> Callable:
    """Return a handler that answers with a page of one message."""

    async def handler(request: Request, error: Exception) -> Response:
        return page("message.html", request.app.state.site, status, title=title, text=text)

    return handler
