"""Agents of the bundled model with tools of your own: python examples/agent.py"""

from astraea_jax import LLM, tool

PRICES, STOCKS = {47: 14, 82: 9, 31: 65}, {47: 120, 82: 8, 31: 2}


@tool
def price(article: int) -> int:
    """Price of one piece."""
    return PRICES[article]


@tool
def stock(article: int) -> int:
    """How many are in stock."""
    return STOCKS[article]


@tool(timeout_s=5)
async def calculator(expression: str) -> int:
    """Value of a sum."""
    return sum(int(a) * int(b) for a, b in (product.split("*") for product in expression.split("+")))


QUESTIONS = ["What is the total price of 3 lamps no. 47 and 2 chairs no. 82?", "How much do 5 clocks no. 31 cost?"]
SYSTEM = {"role": "system", "content": "You answer questions about the shop."}

with LLM("astraea-tiny") as llm:
    chats = [[SYSTEM, {"role": "user", "content": question}] for question in QUESTIONS]
    for program in llm.chat(chats, tools=[price, stock, calculator]):
        calls = [run.name for request in program.requests for run in request.tools]
        print(f"{program.text}  ({len(program.requests)} requests, tools: {', '.join(calls)})")
