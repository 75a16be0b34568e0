"""The engine of a replica; several processes are started by a real Ray only."""

from __future__ import annotations

import pytest

pytest.importorskip("ray.serve", reason="needs the [ray] extra (`make ray` installs it)")

from astraea_jax.errors import StartupError
from astraea_jax.frontends.ray_serve.loading import start_engine
from astraea_jax.frontends.ray_serve.options import Options
from astraea_jax.models.config import CheckpointError

SIZES = {"max_seqs": 8, "max_step_tokens": 32, "page_size": 4, "kv_bytes": 2 * 2**20, "dtype": "float32"}


def test_what_is_left_out_the_device_decides(random_folder):
    engine = start_engine(Options(str(random_folder), engine=SIZES))
    try:
        assert engine.live
        assert engine.config.max_seqs == 8
        assert engine.config.max_context is None
    finally:
        engine.shutdown(0)


@pytest.mark.parametrize(
    ("model", "engine", "error"),
    [("./no-such-folder", {}, CheckpointError), (None, {"max_seqs": 0}, StartupError)],
)
def test_what_cannot_be_served_says_why(random_folder, model, engine, error):
    with pytest.raises(error):
        start_engine(Options(model or str(random_folder), engine={**SIZES, **engine}))
