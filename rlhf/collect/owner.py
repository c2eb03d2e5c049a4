"""The owner's pages: progress, agreement, the reliability of each annotator, disputed pairs, links,
export.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf.collect import auth
from rlhf.collect.session import Refused, owner, page, read_form
from rlhf.collect.status import disputed, marked_passages, summary
from rlhf.data.store import Store
from rlhf.data.votes import Vote
from rlhf.errors import UserError

# disputed pairs
ON_A_PAGE = 10
PASSAGES_ON_A_PAGE = 50
# characters of an answer before and after a marked passage
AROUND = 200
CHOICE_TEXTS = {"a": "prefers A", "b": "prefers B", "tie": "equally good", "both_bad": "both bad"}
STRENGTH_TEXTS = {1: ", slightly", 2: ", clearly", 3: ", by far"}


async def overview(request: Request) -> Response:
    """Show progress, agreement and annotators; recomputed on a connection of its own when the store
    has grown.
    """
    site, token = await owner(request)
    # one computation at a time, however often the page is reloaded
    async with site.summary_lock:
        newest = await site.do(lambda: (site.store.last_event(), site.store.last_comparison()))
        if site.summary is None or site.summary[0] != newest:
            site.summary = (newest, await run_in_threadpool(_read, site.path, summary))
    annotators = await site.do(site.store.annotators)
    found = site.summary[1]
    people = [row for row in annotators if row["kind"] == "person"]
    judged = {person["annotator"] for person in found["annotators"]} | set(found["excluded"])
    voters = [row["name"] for row in annotators if row["name"] in judged]
    values = {"found": found, "people": people, "voters": voters}
    return page("owner.html", site, **values, form=auth.form_name(token))


async def split_pairs(request: Request) -> Response:
    """Show the pairs on which people differ, the most evenly split first, with each vote."""
    return await _listing(request, "disputed.html", _disputed, ON_A_PAGE)


async def passages(request: Request) -> Response:
    """Show marked passages in their answers, the newest first, with remarks."""
    return await _listing(request, "passages.html", _passages, PASSAGES_ON_A_PAGE)


async def _listing(request: Request, template: str, read: Any, size: int) -> Response:
    """Show one page of a list; read: returns what a part of it holds, and how long it is."""
    site, _ = await owner(request)
    number = _page_number(request)
    part = slice((number - 1) * size, number * size)
    found, total = await run_in_threadpool(_read, site.path, read, part)
    pages = -(-total // size)
    return page(template, site, found=found, number=number, total=total, pages=pages)


async def export(request: Request) -> Response:
    """Send the pairs to train on as JSONL; the event in the file's name says up to which vote."""
    site, _ = await owner(request)
    aggregate = request.query_params.get("aggregate", "each")
    # a page that does not exist, not an error of the server
    if aggregate not in ("each", "majority", "skill"):
        raise Refused(404, "Pairs can be exported as each, majority or skill.")
    event, rows = await run_in_threadpool(_read, site.path, _rows, aggregate)
    lines: Iterator[str] = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # the name goes into a header, where quotes and line ends would break out
    name = re.sub(r"[^A-Za-z0-9_-]", "_", site.path.stem)
    disposition = f'attachment; filename="{name}-{event}-{aggregate}.jsonl"'
    return StreamingResponse(
        lines, media_type="application/jsonl", headers={"Content-Disposition": disposition}
    )


async def new_link(request: Request) -> Response:
    """Make a new personal link, shown once; an earlier one of the same person stops working."""
    site, token = await owner(request)
    form = await read_form(request, token)
    name = " ".join(form.get("name", [""])[0].split())
    role = "adjudicator" if form.get("adjudicator") else None
    try:
        link = f"{site.url}/enter/{await site.do(auth.new_link, site.store, name, role)}"
    except UserError as error:
        return page(
            "message.html", site, 400, title="No link was made", text=str(error), back="/owner"
        )
    return page("link.html", site, name=name, link=link)


async def exclude(request: Request) -> Response:
    """Let an annotator's answers count no more, or again."""
    site, token = await owner(request)
    form = await read_form(request, token)
    name, back = form.get("name", [""])[0], form.get("back", [""])[0] == "yes"
    try:
        await site.do(partial(site.store.exclude, name, back=back))
    except UserError as error:
        return page(
            "message.html", site, 400, title="Nothing was changed", text=str(error), back="/owner"
        )
    return RedirectResponse("/owner", 303)


def _page_number(request: Request) -> int:
    asked = request.query_params.get("page", "1")
    # the address bar may hold anything
    return max(1, int(asked)) if asked.isdecimal() and len(asked) < 7 else 1


def _read(path: Path, function: Any, *arguments: Any) -> Any:
    with Store.open(path) as store:
        return function(store, *arguments)


def _rows(store: Store, aggregate: str) -> tuple[int, list[dict[str, Any]]]:
    view = store.at()
    return view.event, view.rows(aggregate)


def _disputed(store: Store, part: slice) -> tuple[list[dict[str, Any]], int]:
    """Return one page of the disputed pairs with their votes, and how many there are in all."""
    view = store.at()
    pairs = view.pairs()
    found = disputed(view.votes(), pairs)
    shown = []
    for id, votes in found[part]:
        shown.append(pairs[id] | {"votes": list(map(_described, votes))})
    return shown, len(found)


def _passages(store: Store, part: slice) -> tuple[list[dict[str, Any]], int]:
    """Return one page of the marked passages with the text around them, and how many there are."""
    view = store.at()
    found = marked_passages(view)
    shown = []
    for given, span in found[part]:
        response = view.response(span["answer"])
        text = response["text"]
        before, after = text[: span["start"]], text[span["end"] :]
        around = {
            "before": ("…" if len(before) > AROUND else "") + before[-AROUND:],
            "after": after[:AROUND] + ("…" if len(after) > AROUND else ""),
        }
        about = {"annotator": given.annotator, "model": response["model"]}
        shown.append(span | around | about)
    return shown, len(found)


def _described(vote: Vote) -> dict[str, Any]:
    verdict = CHOICE_TEXTS[vote.choice] + STRENGTH_TEXTS.get(vote.strength, "")
    return {
        "annotator": vote.annotator,
        "verdict": verdict,
        "reason": vote.reason,
        "tags": vote.tags,
        "corrected": vote.corrected,
        "spans": vote.spans,
    }


ROUTES = [
    Route("/owner", overview),
    Route("/owner/disputed", split_pairs),
    Route("/owner/passages", passages),
    Route("/owner/export", export),
    Route("/owner/exclude", exclude, methods=["POST"]),
    Route("/owner/links", new_link, methods=["POST"]),
]
