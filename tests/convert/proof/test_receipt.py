"""The receipt says what was done, in a line for people and in JSON for programs, and can be checked later."""

import json
import re

import pytest

from moesaic.convert.native.export import export
from moesaic.convert.proof.check import check_folder
from moesaic.convert.proof.receipt import Receipt
from moesaic.core.errors import CheckpointError
from tests.convert.backbones import sparse
from tests.convert.checkpoint.test_source import tensors_of, write
from tests.convert.test_run import identity

RECEIPT = Receipt(
    method="upcycle",
    source="dense",
    target="SparseLlamaForCausalLM",
    tensors_in=120,
    tensors_out=90,
    kept=70,
    consumed=45,
    made=20,
    dropped={"a": "tied to b", "c": "not read", "d": "not read", "e": "not read", "f": "not read"},
    promised=1e-5,
    num_params=1_000_000,
    size_bytes=4_000_000,
)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "4.00 MB; not probed."),
        (
            {"largest_logit_difference": 3.14e-7, "probe_tokens": 120, "probe_dtype": "float64", "equal_routes": 1.0},
            "4.00 MB; largest logit difference 3.1e-07 (promised 1e-05), 100.00% of routes equal, on 120 tokens in "
            "float64.",
        ),
        (
            {"largest_logit_difference": 2.5, "probe_tokens": 7, "probe_dtype": "float32", "promised": None}
            | {"size_bytes": 2_300_000_000},
            "2.30 GB; largest logit difference 2.5e+00 (nothing promised), on 7 tokens in float32.",
        ),
        ({"probe_tokens": 7, "probe_dtype": "float32"}, "4.00 MB; nothing to compare, on 7 tokens in float32."),
    ],
)
def test_the_line_for_people(changes, line):
    receipt = Receipt(**{name: getattr(RECEIPT, name) for name in Receipt.__slots__} | changes)
    start = "upcycle: 120 tensors in, 90 out (70 kept, 45 consumed, 20 made, 5 dropped), "
    assert str(receipt) == start + line


def test_what_is_written_is_read_back(tmp_path):
    (tmp_path / "receipt.json").write_text(RECEIPT.to_json())
    assert Receipt.load(tmp_path) == RECEIPT
    values = json.loads(RECEIPT.to_json())
    assert values["format_version"] == 1
    assert values["dropped"]["a"] == "tied to b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "has no readable receipt.json"),
        ('{"format_version": 1}', "has no readable receipt.json"),
        ('{"format_version": 7}', "is of format 7, this version of Moesaic reads format 1"),
    ],
)
def test_a_receipt_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "receipt.json").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Receipt.load(tmp_path)


def test_a_folder_is_what_its_receipt_says_until_it_is_changed(tmp_path):
    out = tmp_path / "out"
    receipt = export(sparse("llama", "mixtral"), out=out).receipt
    assert check_folder(out) == receipt
    assert set(receipt.files) == {"config.json", "generation_config.json", "model.safetensors"}
    (out / "README.md").write_text("mine")
    assert check_folder(out) == receipt

    tensors = tensors_of(out)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    write(out, tensors | {name: tensors[name] + 1})
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written: its sha256 is"):
        check_folder(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors, which its receipt\.json lists"):
        check_folder(out)


def test_a_folder_without_a_receipt_is_refused(tmp_path):
    sparse("llama", "mixtral").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no readable receipt\.json"):
        check_folder(tmp_path)


def test_the_counts_add_up(tmp_path):
    receipt = export(sparse("llama", "deepseek-v3"), out=tmp_path / "out").receipt
    assert receipt.kept + receipt.consumed + len(receipt.dropped) == receipt.tensors_in
    assert receipt.kept + receipt.made == receipt.tensors_out
    assert receipt.stored_in is None
    assert receipt.stored_out == len(tensors_of(tmp_path / "out"))
    assert receipt.size_bytes == sum(tensor.numel() * 4 for tensor in tensors_of(tmp_path / "out").values())
    same = identity(tmp_path / "out", tmp_path / "again").receipt
    assert same.stored_in == same.stored_out == receipt.stored_out
