"""Publishes which blocks are cached, as vLLM's KV events, for routers that send requests to where their KV lies."""
