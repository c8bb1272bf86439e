"""Where a service listens, who may ask, and how much."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from moesaic.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Where a service listens, who may ask, and how much at a time.

    Args:
        host: address to listen on; one that other machines reach needs an ``api_key``.
        port: to listen on; 0 for any that is free.
        api_key: what clients must send as ``Authorization: Bearer``; None to ask for none.
        allow_hosts: names by which the service may be called, besides ``localhost``, ``host`` and plain addresses.
            A page of another site can give its own name the address of this machine (DNS rebinding); it cannot give
            it one of these names.
        max_tokens: new tokens of one answer, at most.
        max_context: tokens that prompt and answer may have together, where the model itself allows more.
        max_active: answers that are written at a time, a token each in turn; each holds a cache of its text.
        max_waiting: requests that wait beside them; more are told to come again.
        max_body_bytes: of one request.
        grace_s: when the service stops, how long running answers may go on, in seconds.
    Raises:
        ConfigError: if a number is out of range, or other machines could ask without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    allow_hosts: tuple[str, ...] = ()
    max_tokens: int = 1024
    max_context: int = 8192
    max_active: int = 8
    max_waiting: int = 64
    max_body_bytes: int = 1_000_000
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        least = {"port": 0, "max_tokens": 1, "max_context": 2, "max_active": 1, "max_waiting": 0}
        least |= {"max_body_bytes": 1, "grace_s": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}. Give a larger number.")
        if self.port > 65535:
            raise ConfigError(f"port must be at most 65535, got {self.port}. Ports end there; 0 takes a free one.")
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.strip()):
            raise ConfigError("The API key must be plain ASCII and not empty, as it is sent in a header. Set another.")
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"Listening on {self.host or 'all addresses'} lets other machines ask, which needs an API key, got "
                "none. Give --api-key or set MOESAIC_API_KEY, or listen on 127.0.0.1."
            )

    def may_be_called(self, name: str) -> bool:
        """Whether a request for this host name is meant for this service.

        Args:
            name: without its port and brackets.
        """
        name = name.lower().rstrip(".")
        known = {"localhost", self.host.lower(), *(allowed.lower() for allowed in self.allow_hosts)}
        # An address in figures cannot be pointed elsewhere, so no other site can come under it.
        return name in known or _is_address(name)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
