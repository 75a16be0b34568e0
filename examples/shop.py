"""A question for the bundled model, and the three tools that it knows. Results are text, as every SDK takes them."""

from __future__ import annotations

PRICES, STOCKS = {47: 14, 82: 9}, {47: 120, 82: 8}
SYSTEM = "You answer questions about the shop."
QUESTION = "What is the total price of 3 lamps no. 47 and 2 chairs no. 82?"


def price(article: int) -> str:
    """Price of one piece."""
    return str(PRICES[article])


def stock(article: int) -> str:
    """How many are in stock."""
    return str(STOCKS[article])


def calculator(expression: str) -> str:
    """Value of a sum."""
    return str(sum(int(a) * int(b) for a, b in (product.split("*") for product in expression.split("+"))))


FUNCTIONS = {"price": price, "stock": stock, "calculator": calculator}
ARGUMENTS = {
    "price": {"article": {"type": "integer"}},
    "stock": {"article": {"type": "integer"}},
    "calculator": {"expression": {"type": "string"}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": FUNCTIONS[name].__doc__,
            "parameters": {"type": "object", "properties": arguments, "required": [*arguments]},
        },
    }
    for name, arguments in ARGUMENTS.items()
]
"""The tools as OpenAI's API describes them. Frameworks make these of the functions themselves."""
