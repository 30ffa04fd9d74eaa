"""An OpenAI-compatible endpoint that sees pictures: `POST URL/chat/completions`.

The key comes from the environment and goes into one header. It is in no message, file or process list: whatever the
service says is searched for it before it is told on, and redirects are not followed.
"""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx2

from loraport.errors import BackendError, SpecError
from loraport_dataset.captioning.answers import Answer, Message, Refused, Unanswered
from loraport_dataset.captioning.pace import Pace, retry_after
from loraport_dataset.captioning.service import Service, check_service
from loraport_dataset.findings import printable

#: No caption is longer, and a service that sends on and on fills no memory.
MAX_ANSWER_BYTES = 4_000_000
#: A service that wants to be left alone for longer is one to come back to later.
LONGEST_WAIT = 600.0
#: Beside 5xx, what HTTP means to pass: request timeout, too early, too many requests.
_PASSING = (408, 425, 429)
_TOLD_CHARACTERS = 300


class Endpoint:
    """A describer over HTTP. One client for all workers; at most `attempts` requests for one answer.

    Too many requests (429), errors of the service (5xx) and of the network, and answers that are none are tried again:
    after what Retry-After asks for, else after a growing time.
    """

    def __init__(self, service: Service, pace: Pace):
        check_service(service)
        try:
            self._url = httpx2.URL(service.address)
        except httpx2.InvalidURL as error:
            raise SpecError(
                f"--endpoint is not a URL: {error}.", hint="Write it like http://localhost:8000/v1."
            ) from error
        self._service, self._pace = service, pace
        headers = {"Authorization": f"Bearer {service.key}"} if service.key else {}
        self._client = httpx2.AsyncClient(
            headers=headers,
            timeout=service.timeout,
            trust_env=not service.is_here,  # a proxy cannot reach what listens on this machine
            limits=httpx2.Limits(max_connections=None),
        )
        self._has_answered = False

    async def close(self) -> None:
        await self._client.aclose()

    async def answer(self, messages: list[Message], schema: dict[str, Any] | None) -> Answer:
        """Raises Unanswered and Refused for this picture, BackendError when the service can't be used at all."""
        body = json.dumps(self._request(messages, schema), ensure_ascii=False).encode()
        failures = 0
        while True:
            await self._pace.turn()
            try:
                status, headers, data = await self._post(body)
            except httpx2.HTTPError as error:
                problem = self._network_problem(error)
                wait = None
            except TimeoutError:
                problem, wait = f"no whole answer within {self._service.timeout:g} s", None
            else:
                self._has_answered = True
                answer = self._read(data) if status == 200 else None
                if answer is not None:
                    return answer
                problem = f"HTTP {status}{self._said(data)}"
                if status not in (200, *_PASSING) and status < 500:
                    raise self._final(status, problem)
                wait = retry_after(headers.get("retry-after"))
            failures += 1
            if failures >= self._service.attempts:
                raise Unanswered(f"{problem}, {failures} times" if failures > 1 else problem)
            if wait is None:
                await self._pace.back_off(failures)
            elif wait > LONGEST_WAIT:
                raise BackendError(
                    f"{self._service.shown} asks for no request within {wait:.0f} s ({problem}).",
                    hint="Run the same command again then: captions that are written are kept.",
                )
            else:
                self._pace.hold(wait)

    def _request(self, messages: list[Message], schema: dict[str, Any] | None) -> dict[str, Any]:
        request: dict[str, Any] = {"model": self._service.model, "messages": [_turn(message) for message in messages]}
        if schema is not None and self._service.structured == "json_schema":
            named = {"name": "caption", "strict": True, "schema": schema}
            request["response_format"] = {"type": "json_schema", "json_schema": named}
        elif schema is not None and self._service.structured == "json_object":
            request["response_format"] = {"type": "json_object"}
        if self._service.max_tokens is not None:
            request["max_tokens"] = self._service.max_tokens
        return request

    async def _post(self, body: bytes) -> tuple[int, httpx2.Headers, bytes]:
        headers = {"Content-Type": "application/json"}
        async with (
            asyncio.timeout(self._service.timeout),  # httpx's own is started anew by every byte
            self._client.stream("POST", self._url, content=body, headers=headers) as response,
        ):
            data = bytearray()
            async for part in response.aiter_bytes():
                data += part
                if len(data) > MAX_ANSWER_BYTES:
                    raise Refused(f"the answer is longer than {MAX_ANSWER_BYTES:,} bytes")
            return response.status_code, response.headers, bytes(data)

    def _network_problem(self, error: httpx2.HTTPError) -> str:
        problem = self._short(str(error)) or type(error).__name__
        refused = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.UnsupportedProtocol)
        if refused and not self._has_answered:
            raise BackendError(
                f"{self._service.shown} cannot be reached: {problem}.",
                hint="Is the service running, and is --endpoint its address? Nothing was written.",
            ) from None
        return f"the connection failed ({problem})"

    def _final(self, status: int, problem: str) -> Exception:
        if status in (401, 403):
            hint = "Give the key in an environment variable, and its name with --key-env."
        elif status in (404, 405):
            hint = "Is the address right (most end in /v1), and does the service have that --model?"
        elif status < 400:
            hint = "It sends us elsewhere, which is not followed: give the final address with --endpoint."
        elif status == 400 and self._service.structured == "json_schema":
            return Refused(f"{problem} (a service that knows no JSON schemas needs --structured json_object or none)")
        else:
            return Refused(problem)
        return BackendError(f"{self._service.shown} does not serve {self._service.model!r}: {problem}.", hint=hint)

    def _read(self, data: bytes) -> Answer | None:
        """None for what is no chat completion, such as the page of a proxy that is busy."""
        try:
            content = json.loads(data)
            choice = content["choices"][0]
            message, usage = choice["message"], content.get("usage") or {}
            if message.get("refusal"):
                raise Refused(f"the model declined: {self._short(str(message['refusal']))}")
            if choice.get("finish_reason") == "content_filter":
                raise Refused("the service's content filter stopped the answer")
            text = _text(message["content"])
            tokens = [usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
            counted = [count if isinstance(count, int) else 0 for count in tokens]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        return Answer(text, choice.get("finish_reason") == "length", *counted)

    def _said(self, data: bytes) -> str:
        """What the service says instead of an answer, as it is usually wrapped, without the key."""
        text = data.decode("utf-8", "replace")
        try:
            content = json.loads(text)
            error = content.get("error", content) if isinstance(content, dict) else content
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, RecursionError):
            pass
        return f": {self._short(text)}" if text.strip() else ""

    def _short(self, text: str) -> str:
        text = printable(" ".join(self._without_key(text).split()))
        return text if len(text) <= _TOLD_CHARACTERS else text[:_TOLD_CHARACTERS] + "…"

    def _without_key(self, text: str) -> str:
        return text.replace(self._service.key, "[key]") if self._service.key else text


def _text(content: Any) -> str:
    """The words of a message, which some services send in parts, and as null when the model said nothing. Half
    characters, which no file can hold, become question marks."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str | None):
        raise TypeError(f"{type(content)} is no text")
    return (content or "").encode("utf-8", "replace").decode()


def _turn(message: Message) -> dict[str, Any]:
    if message.picture is None:
        return {"role": message.role, "content": message.text}
    url = "data:image/jpeg;base64," + base64.b64encode(message.picture).decode()
    return {
        "role": message.role,
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": message.text}],
    }
