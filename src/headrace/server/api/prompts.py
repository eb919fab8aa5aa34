"""From messages, texts or ids to prompts that fit the model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from headrace.core.errors import ContextTooLong, InvalidRequest
from headrace.core.protocols import ModelCard
from headrace.server.api.schemas import ChatBody, CompletionBody, Message, TokenizeBody
from headrace.server.serving import Serving

if TYPE_CHECKING:
    from headrace.models.text.tokenizer import Tokenizer

INLINE_CHARACTERS = 2048
"""Texts up to this length are tokenised on the event loop: a thread would cost more than it saves."""

ROLES = ("system", "developer", "user", "assistant")
_OWN_TEMPLATE_NAMES = frozenset(
    {"messages", "add_generation_prompt", "tokenize", "tools", "documents", "chat_template"}
)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids, with its text where an echo needs it."""

    tokens: tuple[int, ...]
    text: str = ""


async def chat_prompt(serving: Serving, tokenizer: Tokenizer, body: ChatBody | TokenizeBody) -> tuple[int, ...]:
    """Token ids of ``body.messages`` through the model's chat template."""
    messages = plain_messages(body.messages or [])
    extra = body.chat_template_kwargs or {}
    taken = _OWN_TEMPLATE_NAMES & extra.keys()
    if taken:
        raise InvalidRequest(
            f"chat_template_kwargs cannot set {', '.join(sorted(taken))}", field="chat_template_kwargs"
        )
    generation = body.add_generation_prompt is not False
    size = sum(len(message["content"]) for message in messages)
    tokens = await off_loop(
        serving, size, "messages", lambda: tokenizer.chat(messages, add_generation_prompt=generation, **extra)
    )
    return tuple(tokens)


def plain_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as templates know them: a role and one text.

    Raises:
        InvalidRequest: an unknown role, a part that is no text, tool calls.
    """
    plain = []
    for number, message in enumerate(messages):
        field = f"messages[{number}]"
        if message.role in ("tool", "function") or (message.model_extra or {}).get("tool_calls"):
            raise InvalidRequest(f"{field}: tools are not served by this version", field="messages")
        if message.role not in ROLES:
            raise InvalidRequest(f"{field}.role is unknown: give one of {', '.join(ROLES)}", field="messages")
        role = "system" if message.role == "developer" else message.role
        plain.append({"role": role, "content": _text_of(message, field)})
    return plain


def _text_of(message: Message, field: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role == "assistant":
            return ""
        raise InvalidRequest(f"{field}.content is missing", field="messages")
    texts = []
    for part in message.content:
        if part.type != "text":
            raise InvalidRequest(
                f"{field}.content has a part of type {part.type[:40]!r}: this model reads text only", field="messages"
            )
        if part.text is None:
            raise InvalidRequest(f"{field}.content has a text part without text", field="messages")
        texts.append(part.text)
    return "\n".join(texts)


async def completion_prompts(serving: Serving, tokenizer: Tokenizer, body: CompletionBody) -> list[Prompt]:
    """The prompts of ``body``; texts are tokenised, ids taken as they are (and decoded for ``echo``)."""
    given = body.prompt
    if isinstance(given, str):
        items: list[str | list[int]] = [given]
    elif given and isinstance(given[0], int):
        items = [given]
    else:
        items = list(given)  # type: ignore[arg-type]
    if not items:
        raise InvalidRequest("prompt is an empty list: give at least one prompt", field="prompt")
    count = len(items) * (body.n or 1)
    if count > serving.settings.max_choices:
        raise InvalidRequest(
            f"{len(items)} prompts times n={body.n or 1} are {count} answers: at most {serving.settings.max_choices}",
            field="prompt",
        )
    special, echo = body.add_special_tokens is not False, bool(body.echo)
    size = sum(len(item) for item in items)
    return await off_loop(serving, size, "prompt", lambda: [_prompt(tokenizer, item, special, echo) for item in items])


def _prompt(tokenizer: Tokenizer, item: str | list[int], special: bool, echo: bool) -> Prompt:
    if isinstance(item, str):
        return Prompt(tuple(tokenizer.encode(item, add_special_tokens=special)), item)
    if echo and any(token >= tokenizer.vocab_size for token in item):
        raise InvalidRequest(f"prompt holds a token id outside 0..{tokenizer.vocab_size - 1}", field="prompt")
    return Prompt(tuple(item), tokenizer.decode(item) if echo else "")


async def off_loop(serving: Serving, characters: int, field: str, work: Callable[[], T]) -> T:
    """Run ``work`` on ``characters`` of text, in a thread when that is much; errors without a field get ``field``."""
    try:
        return work() if characters <= INLINE_CHARACTERS else await serving.in_thread(work)
    except InvalidRequest as error:
        error.field = error.field or field
        raise


def fit(
    card: ModelCard, prompts: Sequence[Sequence[int]], asked: int | None, *, field: str, default: int | None
) -> int:
    """The number of tokens to generate at most.

    Args:
        card: the model.
        prompts: token ids of each prompt.
        asked: what the client asked for.
        field: the name it used.
        default: what to take when it did not, cut to what fits; None is all that fits.

    Raises:
        ContextTooLong: a prompt, or a prompt with what the client asked for, does not fit the context.
        InvalidRequest: a prompt without tokens.
    """
    if any(not prompt for prompt in prompts):
        raise InvalidRequest("prompt holds no token: give at least one", field="prompt")
    longest = max(len(prompt) for prompt in prompts)
    room = card.context - longest
    if room < 1:
        raise ContextTooLong(
            f"the prompt has {longest} tokens, but prompt and answer together may have {card.context}: shorten the prompt",
            field="messages" if default is None else "prompt",
        )
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise ContextTooLong(
            f"the prompt has {longest} tokens and {field} is {asked}, {longest + asked} together, but the model's context "
            f"holds {card.context}: lower {field} to {room} or shorten the prompt",
            field=field,
        )
    return asked
