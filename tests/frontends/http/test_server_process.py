"""HTTP of a serving process: beside gRPC, or alone; its flags; its end."""

import re
import signal

import httpx
import pytest

from astraea_jax.errors import StartupError
from astraea_jax.frontends.http.flags import sampling_defaults, warning
from astraea_jax.frontends.http.tenants import Keys

KEY = "key-of-a-tenant"


def test_one_process_has_both_doors_and_keys(serve):
    with serve(f"--api_key={KEY}", "--served_model_name=claude-3", "--max_body_bytes=2000") as server:
        [url] = re.findall(r"HTTP: ([^,\s]+)", server.said)
        assert f":{server.address.rpartition(':')[2]}/" not in url
        with httpx.Client(base_url=url, timeout=60, headers={"authorization": f"Bearer {KEY}"}) as client:
            names = [model["id"] for model in client.get("/models").json()["data"]]
            assert names[0] == "claude-3"
            body = {"model": "claude-3", "prompt": "a", "max_tokens": 2, "ignore_eos": True}
            answer = client.post("/completions", json=body).json()
            assert answer["usage"]["completion_tokens"] == 2
            assert client.post("/completions", json={"prompt": "a" * 3000}).status_code == 413
        assert httpx.get(f"{url}/models").status_code == 401
        assert httpx.get(url.replace("/v1", "/ready")).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(300) == 0


def test_http_alone(serve):
    with serve("--nogrpc") as server:
        assert httpx.get(f"http://{server.address}/ready").status_code == 200


def test_a_process_without_a_door_serves_nothing(serve_fails, random_folder):
    assert "no door" in serve_fails(f"--model={random_folder}", "--nogrpc", "--nohttp")


def test_who_is_warned():
    assert warning("127.0.0.1", Keys()) is None
    assert warning("::1", Keys()) is None
    assert warning("localhost", Keys()) is None
    assert warning("0.0.0.0", Keys([KEY])) is None
    for open_to_others in ("0.0.0.0", "10.0.0.1", "::", "server.example"):
        assert "api_key" in warning(open_to_others, Keys())


def test_sampling_that_a_model_recommends(tmp_path):
    file = tmp_path / "generation_config.json"
    assert sampling_defaults(tmp_path) == {}
    file.write_text('{"temperature": 0.6, "top_k": 20, "do_sample": true, "max_length": 5, "top_p": null}')
    assert sampling_defaults(tmp_path) == {"temperature": 0.6, "top_k": 20}
    file.write_text('{"do_sample": false, "temperature": 0.6}')
    assert sampling_defaults(tmp_path) == {"temperature": 0.0}
    file.write_text("{")
    with pytest.raises(StartupError):
        sampling_defaults(tmp_path)
