"""`import moesaic` is light: what it may not load, and what it may cost."""

import json
import subprocess
import sys

HEAVY = (
    "transformers",
    "matplotlib",
    "pyarrow",
    "datasets",
    "triton",
    "tokenizers",
    "accelerate",
    "tensorboard",
    "sklearn",
)
MAX_COST_S = 0.3
TRIES = 5

LOADED = f"""
import json, sys
import torch
before = set(sys.modules)
import moesaic
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(loaded & set({HEAVY!r}))))
"""

# What the import costs by itself: torch stands, files are warm. Processor time, so that busy neighbours do not count.
COST = """
import time
import torch
start_s = time.process_time()
import moesaic
print(time.process_time() - start_s)
"""


def _run(source: str) -> str:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_nothing_heavy():
    assert json.loads(_run(LOADED)) == []


def test_importing_costs_little_beyond_torch():
    """The least of a few runs, and no more runs than it takes: noise only ever adds."""
    cost_s = float("inf")
    for _ in range(TRIES):
        cost_s = min(cost_s, float(_run(COST)))
        if cost_s < MAX_COST_S:
            return
    raise AssertionError(f"import moesaic takes {cost_s:.2f} s beyond torch, allowed {MAX_COST_S} s")


def test_every_public_name_is_listed_and_importing_a_wrong_one_says_so():
    names = json.loads(
        _run("import json, moesaic; print(json.dumps([n for n in moesaic.__all__ if n not in dir(moesaic)]))")
    )
    assert names == []
    assert "module 'moesaic' has no attribute 'nonsense'" in _run(
        "import moesaic\ntry:\n    moesaic.nonsense\nexcept AttributeError as error:\n    print(error)"
    )
