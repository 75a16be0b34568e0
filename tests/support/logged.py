"""What the process logs meanwhile."""

from __future__ import annotations

import io
import logging
from contextlib import contextmanager

from astraea_jax.frontends.logs import ACCESS, configure


@contextmanager
def written(**how):
    """What is logged meanwhile."""
    text, level = io.StringIO(), ACCESS.level
    handler = logging.StreamHandler(text)
    configure(handler, **how)
    logging.getLogger().addHandler(handler)
    try:
        yield text
    finally:
        logging.getLogger().removeHandler(handler)
        ACCESS.setLevel(level)
