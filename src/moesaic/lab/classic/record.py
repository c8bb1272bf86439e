"""Figures that are kept as soon as they are there, so that an experiment goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesaic.core.errors import CheckpointError
from moesaic.lab.page import text


class Record:
    """What runs gave, by a name for each, in a JSON file.

    Args:
        path: of the file; read if it is there.
        plan: the numbers that all runs depend on. A file with others is of another experiment.
    Raises:
        CheckpointError: if the file cannot be read, or is of another plan.
    """

    def __init__(self, path: Path, plan: dict[str, Any]):
        self.path, self.plan = path, json.loads(json.dumps(plan))
        self.runs: dict[str, Any] = {}
        if not path.exists():
            return
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.runs, plan = dict(kept["runs"]), kept["plan"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"Figures could not be read from {path}: {error}. Take another folder.") from error
        if plan != self.plan:
            raise CheckpointError(
                f"{path} has the figures of other settings, {plan}; asked for were {self.plan}. Take another folder."
            )

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What a run gave before, or gives now."""
        if name not in self.runs:
            self.runs[name] = json.loads(json.dumps(make()))
            text(self.path, json.dumps({"plan": self.plan, "runs": self.runs}) + "\n")
        return self.runs[name]
