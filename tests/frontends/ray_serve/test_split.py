"""Traffic split between versions of an application."""

from __future__ import annotations

import pytest

pytest.importorskip("ray.serve", reason="needs the [ray] extra (`make ray` installs it)")

from astraea_jax.errors import StartupError
from astraea_jax.frontends.ray_serve.split import Split, Splits

SESSIONS = [f"session {i}" for i in range(2000)]


def taken(splits):
    return {session: chosen for session in SESSIONS if (chosen := splits.choose(session))}


def splits(**shares):
    made = Splits()
    for name, share in shares.items():
        made.put(name, Split(share, f"/{name}"))
    return made


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_version_gets_its_share_of_the_sessions(share):
    assert len(taken(splits(next=share))) == pytest.approx(share * len(SESSIONS), abs=80)


def test_over_grpc_an_application_has_to_be_named_once_there_are_two():
    assert splits().application_of("s") is None
    assert splits(next=0.0).application_of("s") == "default"
    assert splits(next=1.0).application_of("s") == "next"


def test_every_proxy_chooses_the_same():
    assert taken(splits(next=0.3, other=0.3)) == taken(splits(other=0.3, next=0.3))


def test_a_share_that_grows_gives_nobody_back():
    few, more = taken(splits(next=0.1)), taken(splits(next=0.4))
    assert few.items() <= more.items()


def test_several_versions_part_the_sessions():
    found = [application for application, _ in taken(splits(a=0.25, b=0.5)).values()]
    assert found.count("a") == pytest.approx(500, abs=80)
    assert found.count("b") == pytest.approx(1000, abs=80)


def test_a_version_that_is_gone_takes_nobody():
    of_one = splits(next=1.0)
    of_one.put("next", None)
    assert not taken(of_one)


@pytest.mark.parametrize(
    ("path", "covered"), [("/next", True), ("/next/v1/models", True), ("/nextdoor", False), ("/v1/models", False)]
)
def test_whoever_asks_for_a_version_gets_it(path, covered):
    assert splits(next=0.5).covers(path) == covered


@pytest.mark.parametrize("config", [None, {}, {"split": None}])
def test_without_a_split_an_application_takes_nobody(config):
    assert Split.of(config) is None


@pytest.mark.parametrize(
    "config",
    [
        {"splt": {}},
        {"split": 0.1},
        {"split": {"share": 0.1}},
        {"split": {"share": 2, "route_prefix": "/next"}},
        {"split": {"share": float("nan"), "route_prefix": "/next"}},
        {"split": {"share": "a", "route_prefix": "/next"}},
        {"split": {"share": 0.1, "route_prefix": "next"}},
        {"split": {"share": 0.1, "route_prefix": "/next/"}},
        {"split": {"share": 0.1, "route_prefix": "/"}},
        {"split": {"share": 0.1, "route_prefix": "/next", "more": 1}},
    ],
)
def test_what_cannot_be_is_refused(config):
    with pytest.raises(StartupError):
        Split.of(config)
