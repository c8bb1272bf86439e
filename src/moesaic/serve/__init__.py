"""A trained mixture behind HTTP: OpenAI's interface, figures for Prometheus, a page that shows each token's experts.

Needs FastAPI and uvicorn, the extra ``serve``; nothing is imported before a name is used.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.serve.model import ServedModel, load_served, prepare
    from moesaic.serve.service import running, serve
    from moesaic.serve.settings import Settings

_HOME = {
    "ServedModel": "model",
    "Settings": "settings",
    "load_served": "model",
    "prepare": "model",
    "running": "service",
    "serve": "service",
}

__all__ = ["ServedModel", "Settings", "load_served", "prepare", "running", "serve"]


def needs() -> None:
    """See that what a service is built on is installed.

    Raises:
        BackendError: naming what is not.
    """
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        from moesaic.core.errors import BackendError

        raise BackendError(
            f"moesaic serve needs fastapi and uvicorn, got no {' and no '.join(missing)}. "
            "Install them with: pip install 'moesaic[serve]'."
        )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moesaic.serve' has no attribute {name!r}")
    needs()
    return getattr(importlib.import_module(f"moesaic.serve.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
