"""The file by other people's readers, and a file that is cut off anywhere."""

import json
from importlib.util import find_spec

import numpy as np
import pyarrow.parquet as parquet
import pytest

from moesaic.core.errors import CheckpointError
from moesaic.telemetry.trace import COLUMNS, RoutingTrace
from tests.telemetry.test_trace import METADATA, written


@pytest.fixture(name="path")
def _path(tmp_path):
    return written(40).save(tmp_path / "trace.parquet")


def needs(library):
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed: that it reads a trace was not tried")


def test_pandas_reads_every_column(path):
    needs("pandas")
    import pandas

    table = pandas.read_parquet(path)
    trace = RoutingTrace.load(path)
    assert list(table.columns) == list(COLUMNS)
    for name, dtype in COLUMNS.items():
        np.testing.assert_array_equal(table[name].to_numpy(), getattr(trace, name))
        assert table[name].dtype == np.dtype(dtype)


def test_polars_reads_every_column_and_the_metadata(path):
    needs("polars")
    import polars

    table = polars.read_parquet(path)
    trace = RoutingTrace.load(path)
    for name in COLUMNS:
        np.testing.assert_array_equal(table[name].to_numpy(), getattr(trace, name))
    described = polars.read_parquet_metadata(path)["moesaic.routing_trace"]
    assert json.loads(described)["layer_names"] == list(METADATA.layer_names)


def test_duckdb_counts_as_the_trace_does_and_reads_the_metadata(path):
    needs("duckdb")
    import duckdb

    trace = RoutingTrace.load(path)
    counted = duckdb.sql(f"select layer, expert, count(*) from '{path}' group by all order by all").fetchall()
    assert {(layer, expert): count for layer, expert, count in counted} == {
        (layer, expert): int(((trace.layer == layer) & (trace.expert == expert)).sum())
        for layer, expert in set(zip(trace.layer.tolist(), trace.expert.tolist(), strict=True))
    }
    ((described,),) = duckdb.sql(
        f"select decode(value) from parquet_kv_metadata('{path}') where decode(key) = 'moesaic.routing_trace'"
    ).fetchall()
    assert json.loads(described)["num_experts"] == list(METADATA.num_experts)


def test_pyarrow_reads_the_metadata(path):
    described = json.loads(parquet.read_schema(path).metadata[b"moesaic.routing_trace"])
    assert described["domains"] == list(METADATA.domains)
    assert described["sampled"] == 1.0


@pytest.mark.parametrize("left", [0, 1, 3, 4, 5, 8, 100, 0.25, 0.5, 0.9, 0.99, -20, -9, -8, -7, -4, -1])
def test_a_file_that_ends_anywhere_before_its_end_is_refused_by_name(path, left):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    for read in (RoutingTrace.load, RoutingTrace.metadata_of, lambda one: list(RoutingTrace.parts(one))):
        with pytest.raises(CheckpointError, match=f"^{path} is no readable Parquet file: .* cut short"):
            read(path)
