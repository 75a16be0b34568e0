"""Scheduling of whole agent programs: pure Python and NumPy, no JAX, no I/O.

Imported as ``astraea_jax.scheduler``; deterministic given its inputs and a clock.
"""
