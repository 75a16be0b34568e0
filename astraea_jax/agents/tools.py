"""Defines tools: plain Python functions that a model may call.

``@tool`` derives a tool's name, description and JSON schema from the function's signature and docstring. Everything
that can go wrong in a call (bad arguments, an exception, a timeout, a result that is not JSON) becomes a text for the
model to read.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import json
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints, overload

from astraea_jax.agents.tool_types import Kind, ToolError, kind_of

MAX_RESULT_CHARS = 16_384
"""Longer results are cut, and say so, because one tool must not fill the model's context."""

MAX_ERROR_CHARS = 1_000

MAX_THREADS = 64
"""Threads of one tool that do not wait for agents. Further calls of it wait for a free one; other tools do not."""

SLOT_POLL_S = 0.01
"""Seconds between two looks for a free thread. Calls may come from several event loops, so they poll."""


@dataclass(frozen=True, eq=False)
class Tool:
    """A function that a model may call. :func:`tool` makes it; calling it calls the function."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments."""
    function: Callable[..., Any]
    timeout_s: float
    kinds: Mapping[str, Kind] | None
    """Checks and converts the argument of each name; None: the function checks them itself."""
    _threads: threading.Semaphore = field(init=False, default_factory=lambda: threading.Semaphore(MAX_THREADS))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def wrapped(self, function: Callable[..., Any]) -> Tool:
        """Return a copy that looks the same to the model but calls ``function``, for example to measure it."""
        return replace(self, function=function)

    def schema(self) -> dict[str, Any]:
        """Return the description that OpenAI's API and chat templates use."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """Run the tool and return its result, or an error, as text. Nothing but ``CancelledError`` is raised.

        An async function runs in the current event loop and is cancelled at its timeout; it must not block. A sync
        function runs in a daemon thread of its own. Python cannot end a thread: one that never returns occupies one of
        this tool's ``MAX_THREADS`` until the process ends, and its result is dropped. Nothing else waits for it.
        """
        try:
            values = self._read(arguments)
        except (ValueError, TypeError, RecursionError) as error:
            return error_text(f"bad arguments: {error}")
        running = asyncio.ensure_future(self._run(values))
        try:
            await asyncio.wait({running}, timeout=self.timeout_s)
            if not running.done():
                return error_text(f"{self.name} did not answer within {self.timeout_s:g} s")
            if running.cancelled():
                return error_text(f"{self.name} was cancelled")
            return running.result()
        finally:
            running.cancel()

    def _read(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Check JSON arguments against the signature, and convert them (an enum's value to its member).

        Raises:
            ValueError: an argument is unknown, missing or of another type; none is dropped or made up.
        """
        if not isinstance(arguments, Mapping):
            raise ValueError("expected an object of named arguments")
        if self.kinds is None:
            return dict(arguments)
        if unknown := [name for name in arguments if name not in self.kinds]:
            raise ValueError(f"unknown {_names(unknown)}; {self.name} takes {_names(self.kinds) or 'none'}")
        if missing := [name for name in self.parameters["required"] if name not in arguments]:
            raise ValueError(f"missing {_names(missing)}")
        values = {}
        for name, value in arguments.items():
            try:
                values[name] = self.kinds[name].read(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return values

    async def _run(self, values: dict[str, Any]) -> str:
        try:
            if inspect.iscoroutinefunction(self.function):
                return result_text(await self.function(**values))
            result = await self._in_thread(values)
            return result if isinstance(result, str) else result_text(await result)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # SystemExit and its like would end the event loop, and every agent in it
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # that is the user's
            return _raised(error)

    async def _in_thread(self, values: dict[str, Any]) -> str | Awaitable[Any]:
        """Return the result's text, or what is still to be awaited: a decorator may hide that a function is async."""
        while not self._threads.acquire(blocking=False):
            await asyncio.sleep(SLOT_POLL_S)
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[str | Awaitable[Any]] = loop.create_future()
        context = contextvars.copy_context()

        def work() -> None:
            _own.slot = self._threads
            try:
                returned = context.run(self.function, **values)
                result = returned if inspect.isawaitable(returned) else result_text(returned)
            except BaseException as error:  # nothing may escape: the caller waits for an outcome
                result = _raised(error)
            finally:
                self._threads.release()
            with contextlib.suppress(RuntimeError):  # the event loop has closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, outcome, result)

        try:
            threading.Thread(target=work, name=f"tool-{self.name}", daemon=True).start()
        except BaseException:
            self._threads.release()
            raise
        return await outcome


_own = threading.local()
"""``slot``: what counts the present thread, if a tool runs in it."""


@contextlib.contextmanager
def thread_lent() -> Iterator[None]:
    """Count the present thread as free, since it waits for agents, which may call the very tool that runs in it."""
    slot: threading.Semaphore | None = getattr(_own, "slot", None)
    if slot is None:
        yield
        return
    slot.release()
    try:
        yield
    finally:
        slot.acquire()


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(*, name: str | None = None, timeout_s: float = 60.0) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None, /, *, name: str | None = None, timeout_s: float = 60.0
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a tool of a function: ``@tool``, or ``@tool(name="search", timeout_s=5)``.

    The model reads the parameters' annotations (str, int, float, bool, list, dict, Literal, Enum, unions of these) and
    the ``Args:`` section of a Google-style docstring. Parameters with a default are optional.

    Raises:
        ToolError: the signature or the docstring cannot be described to a model; the message says which part and why.
    """
    if function is None:
        return lambda function: _make(function, name, timeout_s)
    return _make(function, name, timeout_s)


def error_text(message: str) -> str:
    """Return the result of a failed call as the model reads it."""
    return json.dumps({"error": _bounded(message, MAX_ERROR_CHARS)}, ensure_ascii=False)


def result_text(result: object) -> str:
    """Return a tool's result as the model reads it: a string as it is, anything else as JSON, cut when very long."""
    if isinstance(result, str):
        return _bounded(result)
    try:
        return _bounded(json.dumps(result, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError) as error:
        return error_text(f"the tool returned a {type(result).__name__} that is not JSON: {error}")


def _bounded(text: str, limit: int = MAX_RESULT_CHARS) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be tokenised
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… [cut: {len(text)} characters in all]"


def _raised(error: BaseException) -> str:
    try:
        message = str(error)
    except Exception:  # an exception whose own __str__ fails is still only a failed call
        message = ""
    return error_text(f"{type(error).__name__}: {message}" if message else type(error).__name__)


def _settle(outcome: asyncio.Future[str | Awaitable[Any]], result: str | Awaitable[Any]) -> None:
    if not outcome.done():
        outcome.set_result(result)
    elif inspect.iscoroutine(result):  # the call has timed out: it will not be awaited
        result.close()


def _names(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _make(function: Callable[..., Any], name: str | None, timeout_s: float) -> Tool:
    name = name or str(getattr(function, "__name__", ""))
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ToolError(f"{name!r} is no name for a tool: use letters, digits, _ and -, or pass name=")
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not timeout_s > 0:
        raise ToolError(f"tool {name}: timeout_s must be positive seconds, not {timeout_s!r}")
    try:
        signature = inspect.signature(function)
        hints = get_type_hints(function)
    except Exception as error:  # annotations are arbitrary expressions, and some built-in functions have no signature
        raise ToolError(f"tool {name}: the signature or an annotation cannot be read: {error}") from error
    description, documented = _docstring(function)
    kinds: dict[str, Kind] = {}
    properties: dict[str, Any] = {}
    required = []
    for parameter in signature.parameters.values():
        where = f"tool {name}, parameter {parameter.name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolError(f"{where}: a model passes arguments by name, so *args, **kwargs and / cannot be used")
        if parameter.name not in hints:
            raise ToolError(f"{where}: annotate its type")
        kind = kinds[parameter.name] = kind_of(hints[parameter.name], where)
        properties[parameter.name] = dict(kind.schema)
        if parameter.name in documented:
            properties[parameter.name]["description"] = documented.pop(parameter.name)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    if documented:
        raise ToolError(f"tool {name}: the docstring describes {_names(documented)}, not in the signature")
    parameters = {"type": "object", "properties": properties, "required": required}
    return Tool(name, description, parameters, function, timeout_s, kinds)


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Split a Google-style docstring into its description and its arguments; the lines of each are joined."""
    head, *rest = re.split(r"(?:^|\n)Args:\n", inspect.getdoc(function) or "", maxsplit=1)
    description = re.split(r"(?:^|\n)(?:Returns|Raises|Yields|Examples?|Note):\n", head)[0]
    arguments: dict[str, str] = {}
    name, indent = "", None
    for line in "".join(rest).splitlines():
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        if depth == 0:  # the next section
            break
        if depth == indent and (entry := re.match(r"(\w+)(?: \([^)]*\))?: *(.*)", line.lstrip())):
            name, arguments[entry[1]] = entry[1], entry[2]
        elif name:
            arguments[name] = f"{arguments[name]} {line.strip()}".strip()
    return " ".join(description.split()), arguments
