"""A small shop: questions that take several tool calls, the tools, and the right answers.

``astraea-tiny`` is trained on these tasks; the demo and the evaluation run held-out ones. Every task has its own prices
and stocks, which only the tools reveal, so the model must call them, copy their results and use the calculator.
"""

from __future__ import annotations

import ast
import hashlib
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count as numbers
from typing import Any, Literal

NOUNS = (
    *("lamp", "chair", "table", "mug", "plate", "spoon", "clock", "mirror"),
    *("pillow", "basket", "candle", "vase", "carpet", "bottle", "ladder", "mat"),
)
ARTICLES = range(10, 100)
"""Article numbers; things are called by noun and number, such as "lamp no. 47"."""

SYSTEM = "You answer questions about the shop."

Split = Literal["train", "test"]
"""A task is in the test split if the hash of its question falls into a fixed tenth.

No question is in both splits, but the same items and amounts can be, in other words and at other prices.
"""


class Catalogue:
    """Prices and stocks of one task."""

    def __init__(self, seed: int):
        self._seed = seed

    def price(self, article: int) -> int:
        """Price of one piece.

        Args:
            article: its number
        """
        return self._number("price", article)

    def stock(self, article: int) -> int:
        """How many are in stock.

        Args:
            article: its number
        """
        return self._number("stock", article)

    def _number(self, what: str, article: int) -> int:
        if article not in ARTICLES:
            raise ValueError(f"there is no article {article}")
        return random.Random(f"{self._seed} {what} {article}").randint(2, 99)


OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def calculator(expression: str) -> int:
    """Value of a sum.

    Args:
        expression: whole numbers with + - * and brackets, such as "3*14+2*9"
    """
    if len(expression) > 200:
        raise ValueError("the expression is longer than 200 characters")

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int() as number) if not isinstance(number, bool):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
        raise ValueError("only whole numbers, + - * and brackets are understood")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"not a sum: {expression!r}") from error


@dataclass(frozen=True)
class Call:
    """A tool call and what it returns."""

    name: str
    arguments: dict[str, str | int]
    result: int


@dataclass(frozen=True)
class Task:
    """One question, the calls that solve it, and its answer."""

    question: str
    calls: tuple[Call, ...]
    reply: str
    catalogue: Catalogue

    @property
    def answer(self) -> int:
        """The number that the reply must contain."""
        return self.calls[-1].result

    def tools(self) -> list[Callable[..., int]]:
        """The tools, as plain functions on this task's catalogue."""
        return [self.catalogue.price, self.catalogue.stock, calculator]

    def messages(self) -> list[dict[str, Any]]:
        """The messages that ask the question."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.question}]

    def solution(self) -> list[dict[str, Any]]:
        """The whole conversation of an agent that does everything right."""
        conversation = self.messages()
        for call in self.calls:
            function = {"name": call.name, "arguments": call.arguments}
            entry = {"type": "function", "function": function}
            conversation.append({"role": "assistant", "content": "", "tool_calls": [entry]})
            conversation.append({"role": "tool", "name": call.name, "content": str(call.result)})
        return [*conversation, {"role": "assistant", "content": self.reply}]

    def is_right(self, text: str) -> bool:
        """Whether the last number in ``text`` is the answer."""
        found = re.findall(r"-?\d+", text)
        return bool(found) and int(found[-1]) == self.answer


def split_of(question: str) -> Split:
    """The split of a question, by its hash."""
    return "test" if hashlib.sha256(question.encode()).digest()[0] < 26 else "train"


def make_tasks(*, seed: int, split: Split, count: int) -> list[Task]:
    """Make ``count`` tasks of a split; the same for the same seed."""
    return list(_first(count, (task for task in _stream(seed) if split_of(task.question) == split)))


def _stream(seed: int) -> Iterator[Task]:
    for number in numbers():
        rng = random.Random(f"{seed} {number}")
        family = rng.choices(FAMILIES, WEIGHTS)[0]
        yield family(rng, Catalogue(rng.getrandbits(48)))


def _first(count: int, tasks: Iterator[Task]) -> Iterator[Task]:
    for _, task in zip(range(count), tasks, strict=False):
        yield task


@dataclass(frozen=True)
class _Thing:
    noun: str
    article: int

    def __str__(self) -> str:
        return f"{self.noun} no. {self.article}"

    def times(self, amount: int) -> str:
        return f"{amount} {self.noun}{'s' * (amount > 1)} no. {self.article}"


def _things(rng: random.Random, count: int) -> list[_Thing]:
    """Things of different kinds."""
    pairs = zip(rng.sample(NOUNS, count), rng.sample(ARTICLES, count), strict=True)
    return [_Thing(noun, article) for noun, article in pairs]


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _ask(catalogue: Catalogue, what: str, thing: _Thing) -> Call:
    return Call(what, {"article": thing.article}, getattr(catalogue, what)(thing.article))


def _sum(expression: str) -> Call:
    return Call("calculator", {"expression": expression}, calculator(expression))


def _order(rng: random.Random, catalogue: Catalogue, count: int) -> tuple[str, list[Call], list[str]]:
    """Draw an order of ``count`` things: its words, the price calls, and the products to add."""
    things = _things(rng, count)
    amounts = [rng.randint(1 if count > 1 else 2, 9) for _ in things]
    prices = [_ask(catalogue, "price", thing) for thing in things]
    wish = _listed([thing.times(amount) for amount, thing in zip(amounts, things, strict=True)])
    return wish, prices, [f"{amount}*{call.result}" for amount, call in zip(amounts, prices, strict=True)]


def _total(rng: random.Random, catalogue: Catalogue) -> Task:
    """Price of several amounts: three to six requests."""
    wish, prices, products = _order(rng, catalogue, rng.choices((1, 2, 3, 4), (2, 4, 3, 1))[0])
    question = rng.choice(
        ("What is the total price of {}?", "How much do {} cost?", "I want {}. What do I pay?", "Total price of {}?")
    )
    total = _sum("+".join(products))
    return Task(question.format(wish), (*prices, total), f"The total is {total.result}.", catalogue)


def _change(rng: random.Random, catalogue: Catalogue) -> Task:
    """Change from a sum paid for one or two amounts: three or four requests."""
    wish, prices, products = _order(rng, catalogue, rng.randint(1, 2))
    paid = 10 * (calculator("+".join(products)) // 10 + rng.randint(1, 20))
    question = rng.choice(("I buy {0} and pay {1}. What is my change?", "I pay {1} for {0}. How much comes back?"))
    left = _sum("-".join([str(paid), *products]))
    return Task(question.format(wish, paid), (*prices, left), f"The change is {left.result}.", catalogue)


def _difference(rng: random.Random, catalogue: Catalogue) -> Task:
    """Ask how much more one thing costs than another: four requests."""
    dear, cheap = sorted(_things(rng, 2), key=lambda thing: catalogue.price(thing.article), reverse=True)
    question = rng.choice(("How much more does {} cost than {}?", "By how much is {} dearer than {}?"))
    prices = [_ask(catalogue, "price", thing) for thing in (dear, cheap)]
    gap = _sum("-".join(str(call.result) for call in prices))
    return Task(question.format(dear, cheap), (*prices, gap), f"The difference is {gap.result}.", catalogue)


def _stock_left(rng: random.Random, catalogue: Catalogue) -> Task:
    """Task of what is left of one thing: three requests."""
    [thing] = _things(rng, 1)
    stock = _ask(catalogue, "stock", thing)
    sold = rng.randint(1, stock.result - 1)
    question = rng.choice(("We sell {}. How many are left?", "How many are left if we sell {}?"))
    left = _sum(f"{stock.result}-{sold}")
    return Task(question.format(thing.times(sold)), (stock, left), f"There are {left.result} left.", catalogue)


def _stock_value(rng: random.Random, catalogue: Catalogue) -> Task:
    """Task of what the stock of one thing is worth: four requests."""
    [thing] = _things(rng, 1)
    question = rng.choice(("What is our stock of {} worth?", "How much is all our stock of {} worth?"))
    stock, price = (_ask(catalogue, what, thing) for what in ("stock", "price"))
    worth = _sum(f"{stock.result}*{price.result}")
    return Task(question.format(thing), (stock, price, worth), f"The stock is worth {worth.result}.", catalogue)


FAMILIES = (_total, _change, _difference, _stock_left, _stock_value)
WEIGHTS = (8, 4, 2, 2, 1)
