"""Personal links: a random token in the link becomes a cookie at the first visit; the store keeps
only its hash.

Forms carry an HMAC of the token, which another site cannot know. Hashes are compared in constant
time, and all of them are compared even after one matched.
"""

import hashlib
import hmac
import secrets
from typing import Any

from rlhf.data.records import one_name
from rlhf.data.store import Store
from rlhf.data.store_contents import token_hash
from rlhf.errors import UserError

# name of the store's setting
OWNER = "owner_token_hash"


def new_link(store: Store, name: str | None, role: str | None = None) -> str:
    """Return a fresh token for the person of this name, who is added if new, or for the owner
    (None).

    role: of a new person, "adjudicator" for one who ends disputes. An earlier link of theirs stops
    working. Raises UserError if the name is taken by a model, a rule, or for another role.
    """
    # 192 random bits: nobody guesses one
    token = secrets.token_urlsafe(24)
    if name is None:
        store.set_setting(OWNER, token_hash(token))
    else:
        store.set_token(store.add_annotator(checked_name(name), role=role), token)
    return token


def checked_name(name: str) -> str:
    """Return the name as the store has it. Raises UserError unless it is 1 to 60 printable
    characters.
    """
    if not name.strip() or len(name) > 60 or not name.isprintable():
        raise UserError(f"annotator's name {name!r}: expected 1 to 60 printable characters")
    return one_name(name)


def annotator_of(store: Store, token: str) -> dict[str, Any] | None:
    """Return the annotator who may sign in with this token: {id, name, ...}; None if there is none."""
    given = token_hash(token)
    found = None
    # no early return: the time taken must not depend on who it is
    for annotator in store.annotators():
        if annotator["token_hash"] and hmac.compare_digest(annotator["token_hash"], given):
            found = annotator
    return found


def is_owner(store: Store, token: str) -> bool:
    return hmac.compare_digest(store.setting(OWNER) or "", token_hash(token))


def form_name(token: str) -> str:
    """Return the value that a form of this session must carry."""
    return hmac.new(token.encode(), b"form", hashlib.sha256).hexdigest()


def form_is_ours(token: str, given: str) -> bool:
    return hmac.compare_digest(form_name(token).encode(), given.encode("utf-8", "replace"))
