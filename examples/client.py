"""An agent against a server: astraea-jax serve, and then python examples/client.py [HOST:PORT]"""

import asyncio
import sys

from astraea_jax import tool
from astraea_jax.agents.loop import run_program
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.lab.shop import make_tasks
from astraea_jax.models import resolve
from astraea_jax.models.tokenizer import Tokenizer


async def main(address: str) -> None:
    tokenizer = Tokenizer.from_folder(resolve("astraea-tiny"))  # of the model that is served
    async with Client(address, tokenizer, salt="example") as client:
        for task in make_tasks(seed=1, split="test", count=3):  # questions for the bundled model, with their tools
            tools = [tool(function) for function in task.tools()]
            program = await run_program(client, task.messages(), tools)
            print(f"{task.question}  {program.text}")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "localhost:9000"))
