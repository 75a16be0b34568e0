"""OpenAI's SDK against a server: astraea-jax serve, and then python examples/openai_sdk.py [URL]"""

import json
import sys

from openai import OpenAI
from shop import FUNCTIONS, QUESTION, SYSTEM, TOOLS

client = OpenAI(base_url=(sys.argv[1] if sys.argv[1:] else "http://localhost:8000") + "/v1", api_key="none")
messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
while True:
    answer = client.chat.completions.create(
        model="astraea-tiny",
        messages=messages,
        tools=TOOLS,
        extra_headers={"X-Session-ID": "shopper-1"},  # names the program that these requests are
    )
    message = answer.choices[0].message
    messages.append(message)
    if not message.tool_calls:
        break
    for call in message.tool_calls:
        result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
print(message.content)
