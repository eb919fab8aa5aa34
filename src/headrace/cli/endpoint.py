"""A client for any OpenAI-compatible server: streamed chat over httpx, errors turned into sentences."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from headrace.core.errors import EngineUnavailable, HeadraceError, InvalidRequest, ModelNotFound

if TYPE_CHECKING:
    import httpx

CONNECT_TIMEOUT_S = 10.0


@dataclass(slots=True)
class ChatDelta:
    """What one event of a stream brought: some text, why the answer ended, and with the last event the token counts."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)


def base_url(url: str) -> str:
    """``url`` as the folder of the API: without a final slash, and with ``/v1`` when it names a host only.

    Raises:
        InvalidRequest: it is no http or https address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InvalidRequest(f"--url {url!r} is no address: write it like http://127.0.0.1:8000/v1", field="url")
    return url.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")


class Endpoint:
    """One server, reached with httpx.

    Args:
        url: the API's folder, such as ``http://127.0.0.1:8000/v1``.
        api_key: sent as a bearer token when given.
        transport: what carries the requests, for tests; the network by default.
    """

    def __init__(self, url: str, api_key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        import httpx

        self.url = base_url(url)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        self._client = httpx.Client(headers=headers, timeout=timeout, transport=transport)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def first_model(self) -> str:
        """The name of the first model the server lists.

        Raises:
            ModelNotFound: it lists none.
            HeadraceError: it did not answer, or with an error.
        """
        import httpx

        try:
            response = self._client.get(f"{self.url}/models")
            if response.is_error:
                raise _refusal(response)
            served = [str(entry["id"]) for entry in response.json()["data"]]
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise self._nonsense("the list of models") from error
        if not served:
            raise ModelNotFound(f"{self.url} serves no model: name one with --model", field="model")
        return served[0]

    def stream(self, payload: dict[str, Any]) -> Iterator[ChatDelta]:
        """Send a chat request and yield its events; closing the iterator ends the request on the server.

        Raises:
            HeadraceError: the server cannot be reached, refused the request or broke off the answer.
        """
        import httpx

        body = {**payload, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise _refusal(response)
                for line in response.iter_lines():
                    if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                        yield self._event(data)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _event(self, data: str) -> ChatDelta:
        try:
            event = json.loads(data)
            if "error" in event:
                raise HeadraceError(f"the server broke off the answer: {event['error']['message']}")
            delta = ChatDelta(usage=event.get("usage") or {})
            for choice in event.get("choices") or ():
                delta.text += choice["delta"].get("content") or ""
                delta.finish_reason = choice.get("finish_reason")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._nonsense("an event of the stream") from error
        return delta

    def _unreachable(self, error: httpx.HTTPError) -> EngineUnavailable:
        import httpx

        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return EngineUnavailable(
                f"nothing answers at {self.url}: start a server with: headrace serve (or name another with --url)"
            )
        return EngineUnavailable(f"the connection to {self.url} broke off ({error}): is the server still running?")

    def _nonsense(self, what: str) -> HeadraceError:
        return HeadraceError(f"{self.url} did not send {what} as OpenAI's API does: does --url name the right server?")


def _refusal(response: httpx.Response) -> HeadraceError:
    """The error a response carries, as a sentence (OpenAI's error object where there is one)."""
    try:
        reason = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        reason = response.text.strip()[:200] or response.reason_phrase
    remedy = {
        401: "; give the key with --api-key or in OPENAI_API_KEY",
        404: "; does --url end in /v1?" if "model" not in reason else "",
    }
    return HeadraceError(f"the server refused ({response.status_code}): {reason}{remedy.get(response.status_code, '')}")
