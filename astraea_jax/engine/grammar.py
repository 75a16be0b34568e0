"""Compiles grammars that constrain what a request generates, and follows texts through them.

llguidance does the work: it tells which tokens may come next. It limits its own work, per step and for a whole grammar.
"""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from astraea_jax.engine.call_grammar import calls_as_lark, json_options
from astraea_jax.engine.call_syntax import syntax_of
from astraea_jax.engine.lark_text import LarkText, Thought
from astraea_jax.engine.schema_limits import checked_lark, checked_regex, checked_schema
from astraea_jax.errors import RequestError
from astraea_jax.models.tokenizer import Tokenizer

LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000,
    step_lexer_fuel=50_000,
    max_lexer_states=20_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)
"""About 50 ms for a grammar, and some milliseconds for a step."""

CACHED_GRAMMARS = 128
CACHED_CHARS = 2_097_152
"""Length of the sources of all cached grammars together."""


class Matcher:
    """Follows one text through a grammar, token by token.

    Args:
        grammar: what it follows.
        start: of the library, at the start of a text, for this matcher only.
        vocabulary: tokens that it knows.
    """

    free = False

    def __init__(self, grammar: Grammar, start: LLMatcher, vocabulary: int):
        self._grammar = grammar
        self._matcher = start
        self._mask = allocate_token_bitmask(1, vocabulary)
        self._accepted: list[int] = []
        self._alone = False

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing may follow it."""
        return self._matcher.is_stopped()

    def fill(self, row: np.ndarray) -> None:
        """Write which tokens may come next into ``row [ceil(V / 32)]`` int32: bit t % 32 of word t // 32 is token t.

        The model's vocabulary V may be larger than the tokenizer's, or smaller. Where the text may end, the tokens that
        end a turn are allowed.

        Raises:
            RequestError: the grammar has become too complex.
        """
        fill_next_token_bitmask(self._matcher, self._mask)
        if self._matcher.is_error() and self._start_over():
            fill_next_token_bitmask(self._matcher, self._mask)
        if self._matcher.is_error():  # the library has filled in the end of the turn
            raise RequestError(f"the grammar became too complex: {_first_line(self._matcher.get_error())}")
        words = min(row.size, self._mask.size)
        row[:words] = self._mask[0, :words]
        row[words:] = 0

    def accept(self, token: int) -> bool:
        """Go on by a token; False: the grammar does not allow it here, and the matcher is of no more use."""
        accepted = self._matcher.consume_token(token) or (self._start_over() and self._matcher.consume_token(token))
        self._accepted.append(token)
        return accepted

    def _start_over(self) -> bool:
        """Follow the text again with a lexer of its own, if other texts may have brought the shared one to its limits.

        False: that fails, too, or would not help.
        """
        if self._alone or "lexer error" not in self._matcher.get_error():
            return False
        self._alone = True
        self._matcher = self._grammar.start_alone()
        return self._matcher.consume_tokens(self._accepted)


class Grammar:
    """A compiled grammar, which any number of requests may share.

    Its matchers share a lexer, which learns from each of them, so that it gets faster, and has limits, so that it may
    fail one day; then the grammar is compiled again.

    Args:
        build: makes a matcher of the library, at the start of a text.
        vocabulary: tokens that it knows.

    Raises:
        RequestError: the grammar cannot be compiled.
    """

    def __init__(self, build: Callable[[], LLMatcher], vocabulary: int):
        self._build = build
        self._vocabulary = vocabulary
        self._start: LLMatcher | None = _usable(build())

    def matcher(self) -> Matcher:
        """Begin at the start of a text."""
        start = self._start = self._start or self._build()
        return Matcher(self, start.deep_copy(), self._vocabulary)

    def start_alone(self) -> LLMatcher:
        """Compile again for one text, because the shared lexer has failed; texts that begin from now share another."""
        self._start = None
        return self._build()


def _usable(start: LLMatcher) -> LLMatcher:
    """The same if some text can begin with it: what shows only at the first step would fail a running request.

    Raises:
        RequestError: it cannot be used; the message says why.
    """
    error: str = start.get_error()
    for _ in range(2):  # the lexer notes at one step what it reports at the next
        first = start.deep_copy()
        mask = np.frombuffer(first.compute_bitmask(), np.uint8)
        error = error or first.get_error()
    if error and not error.startswith("NoExtension"):
        raise RequestError(f"the grammar cannot be compiled: {_first_line(error)}")
    if error or not mask.any() or (first.is_stopped() and not first.is_accepting()):
        raise RequestError("the grammar cannot be compiled: no text matches it")
    return start


class GrammarCompiler:
    """Compiles grammars for one tokenizer and caches them. Any thread may call it but that of a serving loop.

    Every method that returns a grammar raises :class:`~astraea_jax.errors.RequestError` if it cannot be compiled within
    the limits, or if the tokenizer is of a kind that no grammar can be followed in. A ``thought`` may stand before what
    the grammar constrains.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._source = tokenizer
        self._reading = threading.Lock()
        self._read: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._cache: OrderedDict[Hashable, tuple[int, Grammar]] = OrderedDict()
        self._cached_chars = 0

    def prepare(self) -> None:
        """Read the vocabulary now. It takes about a second for 150,000 tokens, and no other thread runs meanwhile.

        Raises:
            RequestError: no grammar can be followed in a tokenizer of this kind.
        """
        self._tokens  # noqa: B018

    def json_schema(self, schema: Mapping[str, Any] | str, *, thought: Thought | None = None) -> Grammar:
        """JSON by a schema, an object or its text. Properties come in the order of the schema."""
        return self._compiled("json_schema", json_options(checked_schema(schema), lenient=False), thought)

    def json_object(self, *, thought: Thought | None = None) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"}, thought=thought)

    def regex(self, pattern: str, *, thought: Thought | None = None) -> Grammar:
        """Text that matches a regular expression of Rust's regex library as a whole: it has no look-around."""
        source = json.loads(LLMatcher.grammar_from_regex(checked_regex(pattern)))
        return self._compiled("lark_grammar", source["grammars"][0]["lark_grammar"], thought)

    def lark(self, source: str, *, thought: Thought | None = None) -> Grammar:
        """Text by a Lark grammar as llguidance extends the language."""
        return self._compiled("lark_grammar", checked_lark(source), thought)

    def tool_calls(
        self,
        tools: Sequence[Mapping[str, Any]],
        name: str | None = None,
        parallel: bool = True,
        format: str = "hermes",
        *,
        required: bool = True,
        thought: Thought | None = None,
    ) -> Grammar:
        """A turn that calls tools in the model's own format.

        Args:
            tools: OpenAI-shaped; see :func:`~.call_grammar.calls_as_lark`.
            name: the only tool that may be called; None: any.
            parallel: allow several calls.
            format: name of the model's call format.
            required: the turn is nothing but calls; otherwise calls may stand in text.
            thought: what may come first.
        """
        syntax = syntax_of(format, self._text.control_tokens, self._source.template_text)
        lark = calls_as_lark(tools, syntax, self._text, name=name, parallel=parallel, required=required)
        return self._compiled("lark_grammar", lark, thought)

    @functools.cached_property
    def _text(self) -> LarkText:
        added = self._source.added_tokens().items()
        return LarkText({text: i for text, i in added if self._tokens.is_special_token(i)})

    @property
    def _tokens(self) -> LLTokenizer:
        with self._reading:
            if self._read is None:
                self._read = _read_tokens(self._source)
            return self._read

    def _compiled(self, kind: str, source: Any, thought: Thought | None) -> Grammar:
        """The grammar of a source, from the cache if it is there."""
        grammars = [{kind: source}]
        if thought is not None:
            grammars = [{"lark_grammar": self._text.thought(thought)}, {"name": "body", kind: source}]
        text = json.dumps({"grammars": grammars})
        with self._lock:
            if text in self._cache:
                self._cache.move_to_end(text)
                return self._cache[text][1]
        grammar = _with_deep_stack(lambda: self._compile(text)).result()
        with self._lock:
            if text not in self._cache:
                self._cache[text] = len(text), grammar
                self._cached_chars += len(text)
            while len(self._cache) > CACHED_GRAMMARS or self._cached_chars > CACHED_CHARS:
                _, (chars, _) = self._cache.popitem(last=False)
                self._cached_chars -= chars
        return grammar

    def _compile(self, text: str) -> Grammar:
        tokens = self._tokens
        try:
            return Grammar(lambda: LLMatcher(tokens, text, log_level=0, limits=LIMITS), tokens.vocab_size)
        except (KeyboardInterrupt, SystemExit, RequestError):
            raise
        except BaseException as panic:  # panics of the library are no Exception
            raise RequestError("the grammar cannot be compiled; simplify it") from panic


def _read_tokens(tokenizer: Tokenizer) -> LLTokenizer:
    ends = [i for i in sorted(tokenizer.eos_ids) if i < tokenizer.vocab_size]
    if not ends:
        raise RequestError("the model's tokenizer has no token that ends a turn, so no grammar can be followed")
    try:
        return LLTokenizer(tokenizer.to_json(), eos_token=ends)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of the library are no Exception
        raise RequestError("no grammar can be followed in the model's tokenizer, which is not byte-level") from error


COMPILE_THREADS = 2
STACK_BYTES = 268_435_456
"""Address space, of which a thread occupies what it uses. The library recurses along references between rules and would
run over the usual 8 MiB at about a thousand of them."""

_threads = ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="astraea-grammar")
_starting = threading.Lock()


def _with_deep_stack(work: Callable[[], Grammar]) -> Future[Grammar]:
    with _starting:
        before = threading.stack_size(STACK_BYTES)
        try:
            return _threads.submit(work)  # starts a thread if there are too few
        finally:
            threading.stack_size(before)


def _first_line(error: str) -> str:
    return error.strip().split("\n", 1)[0][:200]
