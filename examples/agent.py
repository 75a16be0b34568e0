"""Agents of the bundled model with tools of your own: python examples/agent.py"""

from astraea_jax import LLM, tool

PRICES = {47: 14, 82: 9, 31: 65}


@tool
def price(article: int) -> int:
    """Price of one piece.

    Args:
        article: its number
    """
    return PRICES[article]


@tool(timeout_s=5)
async def calculator(expression: str) -> int:
    """Value of a sum.

    Args:
        expression: such as "3*14+2*9"
    """
    products = (product.split("*") for product in expression.split("+"))
    return sum(int(a) * int(b) for a, b in products)


QUESTIONS = ["What is the total price of 3 lamps no. 47 and 2 chairs no. 82?", "How much do 5 clocks no. 31 cost?"]
SYSTEM = {"role": "system", "content": "You answer questions about the shop."}

with LLM("astraea-tiny") as llm:
    for program in llm.chat([[SYSTEM, {"role": "user", "content": q}] for q in QUESTIONS], tools=[price, calculator]):
        calls = [run.name for segment in program.segments for run in segment.tools]
        print(f"{program.text}  ({len(program.segments)} segments, tools: {', '.join(calls)})")
