"""An OpenAI-compatible service on 127.0.0.1 that answers by a script and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """One answer over HTTP; `body` is sent as it is, after `delay` seconds, or in single bytes `drip` seconds apart."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0
    hang_up: bool = False


@dataclass
class Asked:
    """A request that came in, and when."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    moment: float

    def user_texts(self) -> list[str]:
        texts: list[str] = []
        for message in self.body["messages"]:
            content = message["content"]
            texts.append(content if isinstance(content, str) else content[-1]["text"])
        return texts


def said(text: Any, finish: str = "stop", **message: Any) -> Reply:
    """A chat completion with this text; anything but a text is sent as JSON."""
    content = text if isinstance(text, str) else json.dumps(text)
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return Reply(body=json.dumps({"choices": [choice], "usage": usage}).encode())


def failed(status: int, message: str = "no", **headers: str) -> Reply:
    """An error as OpenAI words it; `retry_after` becomes a header."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, json.dumps({"error": {"message": message}}).encode(), named)


class VisionService:
    """`answer` is called with each request (from several threads) and says what is replied."""

    def __init__(self, answer: Callable[[Asked], Reply]):
        self.answer = answer
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def _handler(service) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = Asked(self.path, dict(self.headers), body, time.monotonic())
                with service._lock:
                    service.asked.append(asked)
                    service._now += 1
                    service.most_at_once = max(service.most_at_once, service._now)
                try:
                    self._reply(service.answer(asked))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with service._lock:
                        service._now -= 1

            def _reply(self, reply: Reply) -> None:
                if reply.hang_up:
                    self.close_connection = True
                    return
                time.sleep(reply.delay)
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                if not reply.drip:
                    self.wfile.write(reply.body)
                    return
                for byte in reply.body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(reply.drip)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler

    @contextmanager
    def running(self) -> Iterator[VisionService]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()
