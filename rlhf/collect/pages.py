"""The annotators' pages: sign in, judge a pair or a ranking, undo, the end."""

import json
import secrets
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from rlhf.collect import auth
from rlhf.collect.queue import ANSWERS, SIDES, Answer, Progress
from rlhf.collect.queue_state import Assignment, assignment_of
from rlhf.collect.safe_markdown import LONGEST_PARSED, source_span, visible
from rlhf.collect.session import Refused, Site, annotator, page, read_form
from rlhf.data.spans import Span, checked
from rlhf.data.store_queries import StoreView
from rlhf.errors import UserError

# characters
LONGEST_REASON = 2000
LONGEST_CORRECTION = 4000
LONGEST_REMARK = 500
# characters of the name that a form gives to one click
LONGEST_CLICK = 64
NOTES = {
    "saved": "Saved.",
    "judge-same": "Saved. The judge says the same.",
    "judge-left": "Saved. The judge differs: it preferred answer 1.",
    "judge-right": "Saved. The judge differs: it preferred answer 2.",
    "judge-tie": "Saved. The judge differs: it called them equally good.",
    "judge-both_bad": "Saved. The judge differs: it called both bad.",
    "undone": "Undone. Here it is again.",
    "again": "That was saved already.",
    "withdrawn": "That answer was undone and does not count. Here is where you are.",
    "differs": "You had answered that already, and that answer stands. To change it, undo it.",
    "answered": "You had answered that already, and that answer stands. To change it, undo it.",
    "full": "Others have judged that in the meantime; nothing more is needed there.",
    "gone": "That page was out of date. Here is where you are.",
    "nothing": "There is nothing to undo.",
    "choose": "Choose an answer first.",
    "order": "Give every answer a place first. The same place means equally good.",
    "marks": "Nothing was saved: a marked passage is not in its answer. Mark it again.",
}


async def enter(request: Request) -> Response:
    """Sign in by a personal link: its token moves from the address into a cookie that scripts
    cannot read.

    Whoever is signed in as somebody else is asked first: a link slipped to them would file their
    answers under another's name.
    """
    site, token = request.app.state.site, request.path_params["token"]
    # all links look alike: the token tells whose it is
    if await site.do(auth.is_owner, site.store, token):
        return site.sign_in(RedirectResponse("/owner", 303), "owner", token)
    person = await site.do(auth.annotator_of, site.store, token)
    if person is None:
        raise Refused(
            403,
            "This link is not valid. Links are personal and can be replaced: ask for a new one.",
        )

    present = request.cookies.get(f"{site.cookie}_annotator", "")
    other = await site.do(auth.annotator_of, site.store, present) if present else None
    if other and other["id"] != person["id"]:
        if request.method != "POST":
            return page(
                "other.html", site, person=person, other=other, form=auth.form_name(present)
            )
        await read_form(request, present)
    # the introduction is for those who have not voted yet
    progress = await site.do(site.queue.progress, person["id"])
    target = "/" if progress.mine else "/welcome"
    return site.sign_in(RedirectResponse(target, 303), "annotator", token)


async def show_question(request: Request) -> Response:
    """Show the pair or ranking to judge now, or the end."""
    site, token, person = await annotator(request)
    assignment, progress, content = await site.do(_next, site, person["id"])
    note = request.query_params.get("note", "")
    values = {
        "person": person,
        "progress": progress,
        "note": NOTES.get(note),
        "saved": note == "saved",
        "form": auth.form_name(token),
        "click": secrets.token_hex(8),
    }
    if assignment is None:
        return page("done.html", site, **values)
    template = "pair.html" if assignment.ranking is None else "rank.html"
    return page(template, site, **values, assignment=assignment, **content)


async def welcome(request: Request) -> Response:
    """Show what this is about, and the keys."""
    site, token, person = await annotator(request)
    has_rankings = bool(await site.do(site.store.rankings_after, 0))
    values = {"person": person, "has_rankings": has_rankings}
    return page("welcome.html", site, form=auth.form_name(token), **values)


async def vote(request: Request) -> Response:
    """Record one answer; it is on disk before the browser is sent on to the next pair."""
    site, token, person = await annotator(request)
    form = await read_form(request, token)
    choice = "skip" if _first(form, "skip") else _first(form, "choice")
    if choice not in (*ANSWERS, "rank"):
        return RedirectResponse("/?note=choose", 303)

    # a browser sends these as the page had them; anything else is a stale or made-up form
    assignment, click = _first(form, "assignment"), _first(form, "click")
    is_number = assignment.isascii() and assignment.isdecimal() and len(assignment) < 16
    if not is_number or not 0 < len(click) <= LONGEST_CLICK:
        return RedirectResponse("/?note=gone", 303)
    shown = await site.do(_shown, site, person["id"], int(assignment))
    try:
        spans = _marks(_first(form, "marks"), shown)
    except (UserError, ValueError, TypeError, LookupError, RecursionError):
        return RedirectResponse("/?note=marks", 303)
    places = _places(form, len(shown)) if choice == "rank" else ()
    if None in places:
        return RedirectResponse("/?note=order", 303)

    strength = _first(form, "strength")
    # only tags that this site offers: a form may hold anything
    ticked = form.get("tag", [])
    answer = Answer(
        choice,
        strength=int(strength) if strength in ("1", "2", "3") else None,
        reason=_first(form, "reason").strip()[:LONGEST_REASON] or None,
        tags=tuple(tag for tag in site.tags if tag in ticked),
        # browsers send line ends as CR LF
        corrected=_first(form, "corrected").replace("\r\n", "\n").strip()[:LONGEST_CORRECTION]
        or None,
        ratings=_ratings(form, site.criteria),
        places=places,
        spans=spans,
    )
    outcome = await site.do(site.queue.vote, person["id"], int(assignment), answer, click)
    if outcome == "saved" and site.show_judge:
        outcome = await site.do(_note_on_model, site, int(assignment), choice)
    return RedirectResponse(f"/?note={outcome}", 303)


async def undo(request: Request) -> Response:
    """Undo the annotator's last vote by a new event."""
    site, token, person = await annotator(request)
    form = await read_form(request, token)
    click = _first(form, "click")
    if not 0 < len(click) <= LONGEST_CLICK:
        return RedirectResponse("/?note=gone", 303)
    outcome = await site.do(site.queue.undo, person["id"], f"undo {click}")
    return RedirectResponse(f"/?note={outcome}", 303)


async def leave(request: Request) -> Response:
    """Give back what is held, and sign out of this browser."""
    site, token, person = await annotator(request)
    await read_form(request, token)
    # others need not wait for the lease to end
    await site.do(site.queue.release, person["id"])
    text = "You are signed out of this browser. Your personal link signs you in again."
    return site.sign_out(page("message.html", site, title="Goodbye", text=text), "annotator")


def _note_on_model(site: Site, assignment: int, choice: str) -> str:
    """Return the note on what a model has said of a pair that was just answered by `choice`."""
    # after the answer is on disk: nobody is led by it
    given = site.store.event(assignment)
    if given["comparison"] is None:
        return "saved"
    said = site.store.at().model_choice(given["comparison"])
    if said in ("a", "b"):
        said = "left" if said == given["left"] else "right"
    if said is None or "skip" in (said, choice):
        return "saved"
    return "judge-same" if said == choice else f"judge-{said}"


def _ratings(form: dict[str, list[str]], criteria: list[str]) -> tuple[tuple[str, str, int], ...]:
    """Return (criterion, side, 1 to 5) of what was rated; anything else in the form is not read."""
    found = []
    for number, criterion in enumerate(criteria):
        for side in SIDES:
            given = _first(form, f"rate-{number}-{side}")
            if given in ("1", "2", "3", "4", "5"):
                found.append((criterion, side, int(given)))
    return tuple(found)


def _places(form: dict[str, list[str]], count: int) -> tuple[int | None, ...]:
    """Return the place of each answer, in the order of the page; None where it has none."""
    places = {str(place): place for place in range(1, count + 1)}
    return tuple(places.get(_first(form, f"place-{number}")) for number in range(count))


def _marks(text: str, shown: list[str]) -> tuple[Span, ...]:
    """Return marked passages, as the page has sent them in JSON, at their places in the stored texts.

    shown: the answers of the page. Raises ValueError, TypeError, LookupError, RecursionError or
    UserError for anything that no page sends.
    """
    found = []
    for mark in json.loads(text) if text else ():
        number, start, end = (mark[name] for name in ("answer", "start", "end"))
        answer = shown[number]
        seen = visible(answer)
        # what was selected must be what is there, or the remark would be about something else
        if not 0 <= start < end <= len(seen) or seen[start:end] != mark["text"]:
            raise ValueError("a mark that is not in its answer")
        start, end = source_span(answer, start, end)
        remark = str(mark.get("remark", ""))[:LONGEST_REMARK]
        span = {"answer": number, "start": start, "end": end, "label": mark["label"]}
        found.append(span | {"remark": remark})
    return tuple(checked(found, dict(enumerate(shown))))


def _first(form: dict[str, list[str]], name: str) -> str:
    """Return the first value of a form's field, or an empty text."""
    return form.get(name, [""])[0]


def _next(site: Site, person: int) -> tuple[Assignment | None, Progress, dict[str, Any]]:
    """Return what to judge, the progress, and the conversation and answers as the page shows them."""
    assignment = site.queue.next(person)
    content = _content(site.store.at(), assignment) if assignment else {}
    return assignment, site.queue.progress(person), content


def _content(view: StoreView, assignment: Assignment) -> dict[str, Any]:
    """Return {messages, answers: [{text, cut, can_be_marked}]}, the answers as they were drawn when
    they were handed out, so that a reload shows the same.
    """
    if assignment.ranking is None:
        pair = view.pair(assignment.comparison)
        messages = pair["messages"]
        sides = "ab" if assignment.left == "a" else "ba"
        found = [(pair[f"text_{side}"], pair[f"ended_{side}"]) for side in sides]
    else:
        ranking = view.rankings(assignment.ranking)[assignment.ranking]
        messages = ranking["messages"]
        by_id = {response["id"]: response for response in ranking["responses"]}
        found = [(by_id[id]["text"], by_id[id]["ended"]) for id in assignment.shown]
    answers = []
    for text, ended in found:
        # the plain text beside a huge one would be as huge again
        can_be_marked = len(text) <= LONGEST_PARSED
        answers.append({"text": text, "cut": ended == 0, "can_be_marked": can_be_marked})
    return {"messages": messages, "answers": answers}


def _shown(site: Site, person: int, event: int) -> list[str]:
    """Return the answers of a person's page by the event of its assignment; none of another's."""
    found = site.store.event(event)
    if found is None or (found["kind"], found["annotator"]) != ("assign", person):
        return []
    answers = _content(site.store.at(), assignment_of(found))["answers"]
    return [answer["text"] for answer in answers]


ROUTES = [
    Route("/enter/{token}", enter, methods=["GET", "POST"]),
    Route("/", show_question),
    Route("/welcome", welcome),
    Route("/vote", vote, methods=["POST"]),
    Route("/undo", undo, methods=["POST"]),
    Route("/leave", leave, methods=["POST"]),
]
