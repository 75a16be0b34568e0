"""An agent framework, pydantic-ai, against a server: astraea-jax serve, and then python examples/framework.py [URL]"""

import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from shop import QUESTION, SYSTEM, calculator, price, stock

url = sys.argv[1] if sys.argv[1:] else "http://localhost:8000"
model = OpenAIChatModel("astraea-tiny", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
agent = Agent(model, system_prompt=SYSTEM, tools=[price, stock, calculator])
print(agent.run_sync(QUESTION).output)  # names no session: the server recognises what goes on
