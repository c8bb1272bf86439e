"""The command line: one file for each verb."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the ``moesaic`` command, and end the process with 0, 1 (failed) or 2 (bad arguments)."""
    # PyTorch then asks Linux for pages of 2 MiB for large tensors: weights are read up to a fifth faster from them, and
    # new tensors cost fewer interrupts. It looks once, when the first tensor is made.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from moesaic.cli.app import run

    sys.exit(run())
