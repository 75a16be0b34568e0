"""astraea_jax: a JAX serving engine that schedules whole LLM-agent programs."""
