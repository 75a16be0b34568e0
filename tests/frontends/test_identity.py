"""Tests that sessions are found under every name by which clients send them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.engine.events import MAX_NAME
from astraea_jax.errors import RequestError
from astraea_jax.frontends.identity import FINAL, KEYS, NAMINGS, Identity, identify

NAMES = st.text(st.characters(codec="ascii", exclude_categories=["C", "Z"]), min_size=1, max_size=80)
FIELDS = ("session_id", "parent_session_id", "prompt_cache_key", "user_id")


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming.session)
def test_every_header_names_the_session_and_its_parent(naming):
    headers = {naming.session: "s"}
    assert identify(headers) == Identity("s")
    if naming.parent and not naming.child:
        assert identify(headers | {naming.parent: "p"}) == Identity("s", "p")
        assert identify(headers | {naming.parent: "s"}) == Identity("s"), "nobody is a child of itself"
        assert identify({naming.parent: "p"}) == Identity(), "a parent alone names no session"


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming.session)
def test_underscores_are_dashes(naming):
    """As Ray Serve has it, whose key in gRPC metadata is ``session_id``."""
    headers = {key.replace("-", "_"): "s" for key in (naming.session, naming.child) if key}
    assert identify(headers) == identify({naming.session: "s"} | ({naming.child: "s"} if naming.child else {}))
    assert identify(headers).session
    assert identify({"x_session_final": "true"}).final


def test_what_has_dashes_counts_before_what_has_underscores():
    """A gateway may have set it, and what passes beside it must not replace it."""
    assert identify({"x_session_id": "a", "x-session-id": "b"}) == Identity("b")
    assert identify({"x-session-id": "b", "x_session_id": "a", "session_id": "c"}) == Identity("b")


def test_sub_agents_of_claude_code_are_children_of_their_session_or_of_each_other():
    headers = {"x-claude-code-session-id": "s", "x-claude-code-agent-id": "a"}
    assert identify(headers) == Identity("s/a", "s")
    assert identify(headers | {"x-claude-code-parent-agent-id": "b"}) == Identity("s/a", "s/b")
    assert identify({"x-claude-code-session-id": "s", "x-claude-code-parent-agent-id": "b"}) == Identity("s")


def test_precedence_runs_from_the_body_over_headers_to_fields_for_other_purposes():
    headers = {naming.session: str(i) for i, naming in enumerate(NAMINGS)}
    fields = {"prompt_cache_key": "key", "user_id": json.dumps({"session_id": "user"})}
    assert identify(headers, session_id="body", **fields).session == "body"
    for i, naming in enumerate(NAMINGS):
        assert identify(headers, **fields).session == str(i)
        del headers[naming.session]
    assert identify({}, **fields).session == "key"
    assert identify({}, user_id=fields["user_id"]).session == "user"


def test_the_parent_comes_from_where_the_name_does():
    headers = {"x-dynamo-session-id": "d", "x-dynamo-parent-session-id": "above", "thread-id": "t"}
    assert identify(headers) == Identity("d", "above")
    assert identify(headers, session_id="body") == Identity("body")
    assert identify(headers, parent_session_id="mine") == Identity("d", "mine")
    assert identify(headers | {"x-session-id": "x"}) == Identity("x")


@pytest.mark.parametrize(
    ("user_id", "session"),
    [
        (None, None),
        ("", None),
        ("user_abc_account__session_0c3e-1", "0c3e-1"),
        (json.dumps({"device_id": "d", "session_id": "0c3e"}), "0c3e"),
    ],
)
def test_sessions_within_a_user_id(user_id, session):
    assert identify({}, user_id=user_id).session == session


@pytest.mark.parametrize("user_id", ["someone", json.dumps({"session_id": ["x"]}), "[" * 4000, "\ud800", "x" * 4096])
def test_another_user_id_is_a_name_of_its_own(user_id):
    session = identify({}, user_id=user_id).session
    assert session
    assert session.startswith("user:")
    assert len(session) <= MAX_NAME
    assert session != identify({}, user_id=user_id + "x").session


@pytest.mark.parametrize("where", [*sorted(KEYS - {*FINAL}), *FIELDS[:3]])
def test_a_name_that_is_too_long_is_refused_by_its_place(where):
    long = "x" * (MAX_NAME + 1)
    headers = {naming.session: "s" for naming in NAMINGS if where in (naming.parent, naming.child)}
    if where in ("x-claude-code-parent-agent-id",):
        headers["x-claude-code-agent-id"] = "a"
    given = {"headers": headers, where: long} if where in FIELDS else {"headers": headers | {where: long}}
    with pytest.raises(RequestError, match=where):
        identify(**given)


@pytest.mark.parametrize("key", FINAL)
def test_the_end_of_a_session_is_a_flag(key):
    assert identify({key: "True"}).final
    assert not identify({key: "false"}).final
    with pytest.raises(RequestError, match=key):
        identify({key: "maybe"})


@given(
    headers=st.dictionaries(st.sampled_from(sorted(KEYS - {*FINAL})), NAMES | st.just(""), max_size=len(KEYS)),
    fields=st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, st.none() | NAMES)),
)
def test_whatever_comes_gives_names_that_came(headers, fields):
    identity = identify(headers, **fields)
    pieces = {piece for value in [*headers.values(), *fields.values()] if value for piece in (value, *value.split("/"))}
    user = identity.session and identity.session.startswith("user:") and not {*fields} <= {"session_id"}
    for name in (identity.session, identity.parent):
        assert name is None or user or {name, *name.split("/")} & pieces
        assert name != ""
    assert identity.session is not None or not any(headers.get(naming.session) for naming in NAMINGS)
    assert identity.parent is None or identity.parent != identity.session
    assert identify({**headers, "x-session-id": "first"}, session_id="own").session == "own"
