"""Structured output: grammars compiled beside the step loop and their state along a sequence.

xgrammar does the work; it is imported with the first structured request. Tokens are offered to it as the bytes our own
decoder makes of them, so a grammar accepts exactly the text a client will see; special tokens never count as text.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrace.core.errors import InvalidRequest
from headrace.core.request import Structure
from headrace.engine.structured import schema

if TYPE_CHECKING:
    from headrace.models.text.tokenizer import Tokenizer

MAX_SPEC = 64 * 1024
MAX_CHOICES = 1024
MAX_WHITESPACE = 1
"""Characters of white space between two JSON tokens: answers come compact, and a small model cannot wander off into blanks."""

_ROOT = re.compile(r"^\s*root\s*::=", re.MULTILINE)


def validate(structure: Structure) -> None:
    """Refuse what is wrong with a structure and cheap to see, before it is queued.

    Raises:
        InvalidRequest: naming the field, what is wrong and the remedy.
    """
    _source(structure)


def _source(structure: Structure) -> str:
    """What the compiler gets for ``structure``."""
    field, spec = field_of(structure), structure.spec
    if len(spec.encode(errors="replace")) > MAX_SPEC:
        raise InvalidRequest(
            f"{field}: the {structure.kind} is longer than {MAX_SPEC // 1024} KiB: shorten it", field=field
        )
    if structure.kind == "json_object":
        return "{}"
    if structure.kind == "json_schema":
        return json.dumps(schema.parse(spec, field))
    if structure.kind == "choice":
        return _choice_grammar(spec, field)
    if not spec.strip():
        raise InvalidRequest(f"{field}: the {structure.kind} is empty: give one, or leave it out", field=field)
    if structure.kind == "ebnf" and not _ROOT.search(spec):
        raise InvalidRequest(f"{field}: the grammar has no rule named root: begin with root ::= ...", field=field)
    return spec


def field_of(structure: Structure) -> str:
    """The request field that errors about ``structure`` name."""
    return "response_format" if structure.kind.startswith("json") else "structured_outputs"


def _choice_grammar(spec: str, field: str) -> str:
    try:
        choices = json.loads(spec)
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise InvalidRequest(f"{field}: choice needs a list of one or more texts, none of them empty", field=field)
    if len(choices) > MAX_CHOICES:
        raise InvalidRequest(f"{field}: choice has {len(choices)} entries: at most {MAX_CHOICES}", field=field)
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar ready to start; shared by all sequences that obey it."""

    handle: Any
    stop_ids: tuple[int, ...]
    vocab_size: int


class GrammarState:
    """Where one sequence stands in its grammar."""

    def __init__(self, compiled: CompiledGrammar, matcher: Any = None) -> None:
        import xgrammar

        self._compiled = compiled
        self._matcher = matcher or xgrammar.GrammarMatcher(compiled.handle)
        self._words = np.empty(-(-compiled.vocab_size // 32), np.int32)
        self._ended: bool | None = None

    def fill(self, words: NDArray[np.int32]) -> bool:
        """Write the allowed tokens to ``words``, int32[ceil(vocabulary / 32)], bit ``t % 32`` of word ``t // 32``.

        Returns:
            False when every token is allowed (``words`` is then left alone).
        """
        import torch

        if self._matcher.is_terminated():
            words[:] = 0
            for token in self._compiled.stop_ids:
                words.view(np.uint32)[token // 32] |= np.uint32(1 << (token % 32))
            return True
        return bool(self._matcher.fill_next_token_bitmask(torch.from_numpy(words).unsqueeze(0), 0))

    def accept(self, token: int) -> bool:
        """Advance by a token; False (and no change) when the grammar does not allow it."""
        self._ended = None
        return not self._matcher.is_terminated() and bool(self._matcher.accept_token(token))

    @property
    def terminated(self) -> bool:
        """True when the text is complete and nothing but its end can follow."""
        if self._ended is None:
            self._ended = self._matcher.is_terminated() or (self._matcher.is_completed() and not self._continues())
        return self._ended

    def _continues(self) -> bool:
        """Whether any token besides a stop token is allowed."""
        self._words[:] = -1
        if not self.fill(self._words):
            return True
        unsigned = self._words.view(np.uint32)
        for token in self._compiled.stop_ids:
            unsigned[token // 32] &= np.uint32(~(1 << (token % 32)) & 0xFFFFFFFF)
        return bool(unsigned.any())

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` accepted tokens."""
        self._ended = None
        if count:
            self._matcher.rollback(count)

    def fork(self) -> GrammarState:
        """An independent state at the same place."""
        return GrammarState(self._compiled, self._matcher.fork())


Compiled: TypeAlias = "Future[CompiledGrammar]"


@dataclass(slots=True)
class _Job:
    structure: Structure
    future: Compiled


class GrammarCompiler:
    """Compiles grammars in a background thread, one at a time, and keeps the most recent ones.

    A grammar that takes longer than ``time_limit_s`` fails; its thread cannot be interrupted, so another takes over, and
    while ``_MAX_STUCK`` are stuck new grammars are refused.

    Args:
        tokenizer: a :class:`headrace.models.text.tokenizer.Tokenizer`, or the folder to load one from when first needed.
        vocab_size: width of the logits.
        stop_ids: ids that may follow a complete text.
        capacity: compiled grammars kept.
        time_limit_s: seconds a compilation may take.
    """

    _MAX_STUCK = 2

    def __init__(
        self,
        tokenizer: Tokenizer | str | Path,
        vocab_size: int,
        stop_ids: tuple[int, ...],
        *,
        capacity: int = 64,
        time_limit_s: float = 20.0,
    ) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._stop_ids = tuple(token for token in stop_ids if 0 <= token < vocab_size)
        self._capacity, self._time_limit_s = capacity, time_limit_s
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, str], Compiled] = OrderedDict()
        self._jobs: deque[_Job] = deque()
        self._worker: threading.Thread | None = None
        self._stuck = 0
        self._backends: dict[bool, Any] = {}
        self._loading = threading.Lock()

    def compile(self, structure: Structure) -> Compiled:
        """A future of the compiled grammar; equal structures share one. It fails with :class:`InvalidRequest`."""
        key = (structure.kind, structure.spec)
        with self._lock:
            future = self._cache.get(key)
            if future is not None and not (future.done() and future.exception()):
                self._cache.move_to_end(key)
                return future
            future = Future()
            future.set_running_or_notify_cancel()  # shared: one waiter's cancel must not take it from the others
            self._cache[key] = future
            self._cache.move_to_end(key)
            if len(self._cache) > self._capacity:
                self._cache.popitem(last=False)
            if self._stuck >= self._MAX_STUCK:
                future.set_exception(_too_slow(structure, "the compiler is busy with other slow ones; try again later"))
                return future
            self._jobs.append(_Job(structure, future))
            if self._worker is None:
                self._start_worker()
        return future

    def start(self, compiled: CompiledGrammar) -> GrammarState:
        """The state of a sequence before its first token."""
        return GrammarState(compiled)

    def _start_worker(self) -> None:
        self._worker = threading.Thread(target=self._work, name="grammar-compiler", daemon=True)
        self._worker.start()

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            with self._lock:
                if self._worker is not me:
                    self._stuck -= 1
                    return
                if not self._jobs:
                    self._worker = None
                    return
                job = self._jobs.popleft()
            self._run(job)

    def _run(self, job: _Job) -> None:
        try:
            backend = self._backend(job.structure.kind.startswith("json"))
        except Exception as error:
            job.future.set_exception(error)
            return
        timer = threading.Timer(self._time_limit_s, self._expire, (job, threading.current_thread()))
        timer.daemon = True
        timer.start()
        try:
            outcome: Any = self._compiled(backend, job.structure)
        except Exception as error:  # handed to whoever waits
            outcome = error
        timer.cancel()
        with self._lock:
            if job.future.done():
                return
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)

    def _expire(self, job: _Job, worker: threading.Thread) -> None:
        with self._lock:
            if job.future.done() or self._worker is not worker:
                return
            job.future.set_exception(
                _too_slow(job.structure, f"it takes longer than {self._time_limit_s:g} s to compile; simplify it")
            )
            self._stuck += 1
            self._worker = None
            if self._jobs and self._stuck < self._MAX_STUCK:
                self._start_worker()
            while self._jobs and self._worker is None:
                waiting = self._jobs.popleft()
                waiting.future.set_exception(_too_slow(waiting.structure, "the compiler is busy; try again later"))

    def _compiled(self, backend: Any, structure: Structure) -> CompiledGrammar:
        source = _source(structure)
        build: dict[str, Callable[[], Any]] = {
            "json_schema": lambda: backend.compile_json_schema(source, max_whitespace_cnt=MAX_WHITESPACE),
            "json_object": lambda: backend.compile_json_schema('{"type": "object"}', max_whitespace_cnt=MAX_WHITESPACE),
            "regex": lambda: backend.compile_regex(source),
            "choice": lambda: backend.compile_grammar(source),
            "ebnf": lambda: backend.compile_grammar(source),
        }
        try:
            handle = build[structure.kind]()
        except RuntimeError as error:
            field = field_of(structure)
            raise InvalidRequest(
                f"{field}: the {structure.kind} cannot be used ({_reason(error)}): correct it", field=field
            ) from error
        return CompiledGrammar(handle, self._stop_ids, self._vocab_size)

    def _backend(self, json_only: bool) -> Any:
        """The xgrammar compiler for JSON or for free text, made when first needed."""
        with self._loading:
            if json_only not in self._backends:
                import xgrammar

                from headrace.models.text.tokenizer import Tokenizer

                if not isinstance(self._tokenizer, Tokenizer):
                    self._tokenizer = Tokenizer(self._tokenizer)
                info = xgrammar.TokenizerInfo(
                    _vocabulary(self._tokenizer, self._vocab_size, json_only),
                    xgrammar.VocabType.RAW,
                    vocab_size=self._vocab_size,
                    stop_token_ids=list(self._stop_ids),
                )
                self._backends[json_only] = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
            return self._backends[json_only]


def _vocabulary(tokenizer: Tokenizer, size: int, json_only: bool) -> list[bytes]:
    """Bytes of each token; empty ones are never allowed.

    JSON forbids raw control characters in strings, which the compiler lets through in some; so for JSON, tokens with any
    but the line feed are left out (white space needs no more).
    """
    pieces = [b"" if token in tokenizer.special_ids else tokenizer.token_bytes(token) for token in range(size)]
    if json_only:
        controls = bytes(byte for byte in range(32) if byte != 10)
        pieces = [b"" if piece.translate(None, controls) != piece else piece for piece in pieces]
    return pieces


def _too_slow(structure: Structure, why: str) -> InvalidRequest:
    field = field_of(structure)
    return InvalidRequest(f"{field}: the {structure.kind} was given up: {why}", field=field)


def _reason(error: RuntimeError) -> str:
    """The compiler's complaint without time stamp, file and line."""
    text = re.sub(r"^(\[[\d:]+\] )?\S+\.(cc|h):\d+: ", "", str(error).strip())
    return text.splitlines()[0][:300].rstrip(". ") if text else "it is malformed"
