"""The command line: one file for each verb."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the ``moesaic`` command, and end the process with 0, 1 (failed) or 2 (bad arguments)."""
    from moesaic.cli.app import run

    sys.exit(run())
