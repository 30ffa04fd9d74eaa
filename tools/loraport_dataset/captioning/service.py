"""Where a vision model is and how it is asked, before anything is sent."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from loraport.errors import SpecError

Structured = Literal["json_schema", "json_object", "none"]
"""What `response_format` asks for: the schema, any JSON object, or nothing (the request has no such field)."""

_PATH = "/chat/completions"


@dataclass(frozen=True)
class Service:
    """Where the model is and how it is asked. `timeout` is the seconds a whole answer may take."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    structured: Structured = "json_schema"
    timeout: float = 120.0
    attempts: int = 5
    max_tokens: int | None = None

    @property
    def address(self) -> str:
        """The URL that is asked."""
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/")
        return urlunsplit(parts._replace(path=path if path.endswith(_PATH) else path + _PATH))

    @property
    def shown(self) -> str:
        """The address for people, without its query."""
        return self.address.partition("?")[0]

    @property
    def is_here(self) -> bool:
        """Whether the endpoint is on this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")


def check_service(service: Service) -> None:
    """Raises SpecError for a URL or a key that no request can be made with; the message holds neither a key nor a
    password."""
    try:
        parts = urlsplit(service.url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise SpecError(
            "--endpoint is not a URL of a service.", hint="Write it like http://localhost:8000/v1 (scheme, host, path)."
        )
    if parts.username is not None or parts.password is not None:
        raise SpecError(
            "--endpoint holds a user name or password, which every list of processes shows.",
            hint="Take it out of the URL; a key comes from an environment variable (--key-env NAME).",
        )
    if not service.model.strip() or not service.model.isprintable():
        raise SpecError("--model is not a name.", hint="Give the name that the service knows the model by.")
    if service.key is not None and not (service.key.isascii() and service.key.isprintable()):
        raise SpecError(
            "The key in the environment holds characters that no HTTP header can carry.",
            hint="Set it anew, without line breaks or typographic signs.",
        )
