"""Logs: one line for a record, whatever clients send, and no word of theirs."""

from __future__ import annotations

import json
import logging
import sys

from hypothesis import given
from hypothesis import strategies as st
from support.http_server import serving
from support.logged import written
from support.stub import stub_engine

from astraea_jax.frontends.logs import JsonFormatter, answered


def record(message="what {} happened", **extra):
    return logging.getLogger("a.b").makeRecord("a.b", logging.WARNING, "f", 1, message, (), None, extra=extra)


@given(st.text(), st.text())
def test_a_record_is_one_line_of_json(message, value):
    line = JsonFormatter().format(record(message.replace("%", "%%"), detail=value))
    assert "\n" not in line
    read = json.loads(line)
    assert (read["level"], read["logger"], read["detail"]) == ("warning", "a.b", value)
    assert read["message"] == message.replace("%", "%%")


def test_exceptions_stand_beside_the_message():
    try:
        raise ValueError("broken")
    except ValueError:
        one = record()
        one.exc_info = sys.exc_info()
    assert "ValueError: broken" in json.loads(JsonFormatter().format(one))["exception"]


@given(path=st.text(), as_json=st.booleans())
def test_what_a_client_makes_up_is_one_short_printable_line(path, as_json):
    with written(as_json=as_json, access=True) as text:
        answered("http", "GET", path, 404, "id", "127.0.0.1", 0.5)
    [line] = text.getvalue().splitlines()
    assert line.isprintable()
    assert len(line) < 3000


async def test_requests_are_logged_by_their_ids_without_what_they_hold():
    with written(as_json=True, access=True) as text:
        async with serving(stub_engine()[0]) as http:
            secret = {"messages": "secret"}
            await http.client.post("/no/such/route?secret=1", json=secret, headers={"x-request-id": "mine"})
            await http.client.get("/ready")
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    [one] = [line for line in lines if line.get("request_id") == "mine"]
    assert (one["door"], one["method"], one["path"], one["status"]) == ("http", "POST", "/no/such/route", 404)
    assert "secret" not in str(lines)
    assert "/ready" not in str(lines)  # somebody asks every second


async def test_without_the_flag_nothing_is_logged():
    with written(as_json=False, access=False) as text:
        async with serving(stub_engine()[0]) as http:
            await http.client.get("/no/such/route")
    assert text.getvalue() == ""
