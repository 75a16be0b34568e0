"""Decoder definitions, their configurations, checkpoint readers and tokenizers.

Imported as ``astraea_jax.models``; imports nothing of ``astraea_jax`` and nothing of ``scheduler``.
"""
