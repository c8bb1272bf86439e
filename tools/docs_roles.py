"""Lets the reference show Sphinx roles in docstrings, such as ``:class:`~moesaic.Routing```, as plain code names."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`(~?)([\w.]+)`")


def _name(match: re.Match[str]) -> str:
    shown = match[2].split(".")[-1] if match[1] else match[2].lstrip(".")
    return f"`{shown}`"


class Roles(griffe.Extension):
    """Rewrites the docstrings of everything that is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_name, obj.docstring.value)
