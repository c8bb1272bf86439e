"""What ``torch.compile`` leaves to Python: who hears a routing, or gives one, changes from forward to forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Break the graph at each call of a function, and run it and all that it calls as Python.

    A graph would hold what was so when it was made: a sink that is gone, a listener that has left.
    """
    return cast(Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def uncompiled_itself(function: Function) -> Function:
    """Break the graph at each call of a function; what it calls is compiled as before."""
    return cast(Function, torch.compiler.disable(function, recursive=False))  # type: ignore[no-untyped-call]
