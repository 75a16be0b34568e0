"""Names of the server: a stranger's page, whatever it calls itself, reaches no server on loopback without keys."""

import contextlib
import ipaddress

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.http_server import serving

from astraea_jax.errors import StartupError
from astraea_jax.frontends.http.errors import HostRefused
from astraea_jax.frontends.http.flags import allowed_hosts
from astraea_jax.frontends.http.hosts import AllowedHosts, is_loopback
from astraea_jax.frontends.http.tenants import Keys

LOCAL = AllowedHosts([])
KEYS = Keys(["key-of-a-tenant"])
port = st.just("") | st.integers(0, 65535).map(lambda number: f":{number}")
loopback = (
    st.sampled_from(["localhost", "LocalHost", "localhost.", "a.localhost", "[::1]", "[0:0::1]", "[::ffff:127.0.0.1]"])
    | st.ip_addresses(network="127.0.0.0/8").map(str)
)  # fmt: skip
strange = (
    st.from_regex(r"[a-z0-9-]{1,20}(\.[a-z0-9-]{1,20}){0,3}", fullmatch=True)
    | st.ip_addresses(v=4).map(str)
    | st.ip_addresses(v=6).map(lambda ip: f"[{ip}]")
    | st.sampled_from(["localhost.evil.example", "127.0.0.1.evil.example", "evil-localhost", "0.0.0.0", "[::]", ""])
    | st.sampled_from(["localhost@evil.example", "evil.example#localhost", "[::1].evil.example", "::1", "[localhost"])
).filter(lambda host: not is_loopback(host.strip("[]")))


def allowed(hosts: AllowedHosts, host: str | None = None, origin: str | None = None, address: str = "127.0.0.1"):
    try:
        hosts.check([] if host is None else [host], [] if origin is None else [origin], address)
    except HostRefused:
        return False
    return True


@given(loopback, port)
def test_names_of_loopback_are_allowed(host, port):
    assert allowed(LOCAL, host + port)
    assert allowed(LOCAL, host + port, f"http://{host}{port}")


@given(strange, port)
def test_other_names_are_not(host, port):
    assert not allowed(LOCAL, host + port)
    assert not allowed(LOCAL, "localhost", f"http://{host}{port}")


@given(st.text(max_size=30))
def test_whatever_comes_is_decided(host):
    for hosts in (LOCAL, AllowedHosts(["gpu.example"])):
        allowed(hosts, host)
        allowed(hosts, "localhost", host)
    assert allowed(AllowedHosts(), host, host)
    assert allowed(AllowedHosts(["*"]), host, host)


@given(st.ip_addresses())
def test_the_address_of_the_connection_is_allowed(address):
    """Probes call a machine by its address, and no page of a stranger's has that for a name."""
    written = f"[{address}]" if isinstance(address, ipaddress.IPv6Address) else str(address)
    assert allowed(AllowedHosts(["gpu.example"]), f"{written}:8000", address=str(address))


def test_one_strange_header_of_several_is_enough():
    with pytest.raises(HostRefused):
        LOCAL.check(["localhost", "evil.example"], [], None)
    assert not allowed(LOCAL, "localhost", "null")
    assert allowed(LOCAL)


def test_names_of_a_flag():
    hosts = allowed_hosts(["GPU.example:8000", "10.1.2.3", "::2", "[fe80::1]:80"], "127.0.0.1", Keys())
    for host in ("gpu.example", "gpu.example:1234", "GPU.EXAMPLE.", "10.1.2.3", "[::2]:80", "[fe80::1]", "localhost"):
        assert allowed(hosts, host), host
    assert allowed(hosts, "gpu.example", "https://gpu.example:8443")
    assert not allowed(hosts, "gpu.example.evil.example")
    for wrong in ("http://gpu.example", "", "a b:c"):
        with pytest.raises(StartupError, match="allowed_hosts"):
            allowed_hosts([wrong], "127.0.0.1", Keys())


@pytest.mark.parametrize(
    ("given", "host", "keys", "checks"),
    [
        (None, "127.0.0.1", Keys(), True),
        (None, "localhost", Keys([], ["key-of-the-admin"]), True),
        (None, "::1", Keys(), True),
        (None, "127.0.0.1", KEYS, False),
        (None, "0.0.0.0", Keys(), False),
        (["*"], "127.0.0.1", Keys(), False),
        (["gpu.example"], "0.0.0.0", Keys(), True),
        (["gpu.example"], "127.0.0.1", KEYS, True),
    ],
)
def test_who_checks(given, host, keys, checks):
    assert allowed(allowed_hosts(given, host, keys), "evil.example") is not checks


@pytest.mark.parametrize("path", ["/health", "/status", "/status.json", "/v1/models", "/v1/messages", "/nowhere", "/"])
async def test_a_server_answers_strangers_with_one_sentence(chatty, path):
    async with serving(chatty, hosts=LOCAL) as server:
        for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
            answer = await server.client.get(path, headers=headers)
            assert answer.status_code == 403
            assert "--allowed_hosts" in answer.json()["error"]["message"]
        assert (await server.client.get("/health")).status_code == 200


def test_a_serving_process_on_loopback(serve):
    with serve("--nogrpc", "--allowed_hosts=gpu.example") as server, contextlib.closing(httpx.Client()) as client:
        for host, status in (("gpu.example", 200), ("evil.example", 403), (server.address, 200)):
            assert client.get(f"http://{server.address}/v1/models", headers={"host": host}).status_code == status
