"""HTTP over TLS; gRPC's tests are in ``rpc/test_keys.py``."""

from __future__ import annotations

import asyncio
import ssl

import httpx
import pytest
import trustme

from astraea_jax.agents import formats
from astraea_jax.frontends.http.app import make_app
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.server import Server
from astraea_jax.frontends.tls import Tls


async def test_http_is_encrypted(engine, tmp_path):
    authority = trustme.CA()
    certificate, client = authority.issue_cert("localhost"), authority.issue_cert("client.example")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    door = Door(engine, formats.choose(engine.tokenizer, None), ["random"])
    for ca in (None, tmp_path / "ca.pem"):
        tls = Tls(tmp_path / "both.pem", tmp_path / "both.pem", ca)
        server = Server(make_app(door), door, "localhost", tls=tls)
        url = f"https://localhost:{await server.start()}/health"
        if ca is not None:
            with pytest.raises(httpx.TransportError):
                await _get(url, context)
            client.configure_cert(context)
        assert (await _get(url, context)).status_code == 200
        with pytest.raises(httpx.TransportError):
            await _get(url.replace("https", "http"), context)
        await server.stop(0)
        door.draining = False
    await asyncio.sleep(0)


async def _get(url: str, context: ssl.SSLContext) -> httpx.Response:
    async with httpx.AsyncClient(verify=context) as client:
        return await client.get(url)
