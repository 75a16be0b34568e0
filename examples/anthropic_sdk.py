"""Anthropic's SDK against a server: astraea-jax serve, and then python examples/anthropic_sdk.py [URL]"""

import sys

from anthropic import Anthropic, beta_tool
from shop import QUESTION, SYSTEM, calculator, price, stock

client = Anthropic(base_url=sys.argv[1] if sys.argv[1:] else "http://localhost:8000", api_key="none")
runner = client.beta.messages.tool_runner(
    model="astraea-tiny",
    max_tokens=200,
    system=SYSTEM,
    tools=[beta_tool(function) for function in (price, stock, calculator)],
    messages=[{"role": "user", "content": QUESTION}],
    extra_headers={"X-Session-ID": "shopper-2"},
)
print(runner.until_done().content[0].text)
