import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.core.routing import Routing
from moesaic.telemetry.trace import SCHEMA_VERSION, RoutingTrace, TraceMetadata
from moesaic.telemetry.writer import TraceWriter

METADATA = TraceMetadata(
    model="toy",
    recipe="mixtral",
    layer_names=("model.layers.0.mlp", "model.layers.1.mlp"),
    num_experts=(4, 3),
    top_k=2,
    token_text=("a", "\n", "\udcc3", "$</script>"),
    domains=("code", "prose"),
)
COLUMNS = ("sequence", "position", "layer", "choice", "token_id", "expert", "weight", "score", "kept", "domain")


def routing(num_tokens: int, num_experts: int, valid_T: torch.Tensor | None = None) -> Routing:
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    scores_TE = logits_TE.softmax(-1)
    weight_TK, expert_TK = scores_TE.topk(2)
    return Routing.from_choices(expert_TK, weight_TK, logits_TE, scores_TE, valid_T)


def written(num_tokens: int = 5) -> RoutingTrace:
    writer = TraceWriter(METADATA)
    for layer, num_experts in enumerate(METADATA.num_experts):
        writer.add(
            layer,
            routing(num_tokens, num_experts),
            torch.arange(num_tokens) % 4,
            torch.arange(num_tokens),
            torch.zeros(num_tokens, dtype=torch.long),
            torch.full((num_tokens,), 1),
        )
    return writer.trace()


def assert_same(first: RoutingTrace, second: RoutingTrace) -> None:
    assert first.metadata == second.metadata
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == getattr(second, name).dtype


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 63])
def test_a_trace_comes_back_from_disk_as_it_went(tmp_path, num_tokens):
    trace = written(num_tokens)
    assert trace.num_rows == num_tokens * 2 * 2
    assert trace.num_tokens == num_tokens
    trace.save(tmp_path / "new" / "trace.parquet")
    assert_same(RoutingTrace.load(tmp_path / "new" / "trace.parquet"), trace)


def test_each_row_is_the_routers_own_choice_weight_and_score():
    table = routing(5, 4)
    writer = TraceWriter(METADATA)
    writer.add(0, table, torch.arange(5), torch.arange(10, 15), torch.full((5,), 9), None)
    trace = writer.trace()
    np.testing.assert_array_equal(trace.expert, table.expert_N)
    np.testing.assert_array_equal(trace.weight, table.weight_N)
    np.testing.assert_array_equal(trace.score, table.scores_TE.gather(1, table.expert_N.view(5, 2)).flatten())
    np.testing.assert_array_equal(trace.choice, [0, 1] * 5)
    np.testing.assert_array_equal(trace.token_id, np.repeat(np.arange(5), 2))
    np.testing.assert_array_equal(trace.position, np.repeat(np.arange(10, 15), 2))
    np.testing.assert_array_equal(trace.sequence, [9] * 10)
    np.testing.assert_array_equal(trace.domain, [-1] * 10)
    assert trace.kept.all()


def test_padding_is_left_out_and_dropped_rows_stay_and_say_so():
    table = routing(4, 4, valid_T=torch.tensor([True, False, True, False]))
    kept_N = table.kept_N.clone()
    kept_N[5] = False
    writer = TraceWriter(METADATA)
    writer.add(0, replace(table, kept_N=kept_N), None, torch.arange(4), torch.zeros(4, dtype=torch.long))
    trace = writer.trace()
    np.testing.assert_array_equal(trace.position, [0, 0, 2, 2])
    np.testing.assert_array_equal(trace.kept, [True, True, True, False])
    np.testing.assert_array_equal(trace.token_id, [-1] * 4)


def test_the_writer_keeps_narrow_columns_and_nothing_of_the_graph():
    table = routing(8, 4)
    weight_N = table.weight_N.clone().requires_grad_()
    writer = TraceWriter(METADATA)
    writer.add(0, replace(table, weight_N=weight_N), None, torch.arange(8), torch.zeros(8, dtype=torch.long))
    assert writer.num_rows == 16
    assert sum(getattr(writer.trace(), name).nbytes for name in COLUMNS) == 16 * 31


def test_domains_met_on_the_way_can_be_named_at_the_end():
    writer = TraceWriter(replace(METADATA, domains=()))
    writer.add(0, routing(1, 4), None, torch.zeros(1).long(), torch.zeros(1).long(), torch.ones(1).long())
    assert writer.trace(METADATA).metadata.domains == ("code", "prose")


def test_joined_traces_keep_their_sequences_apart_and_their_domains_by_name():
    first = written(3)
    second = replace(written(2), metadata=replace(METADATA, domains=("law", "code")))
    third = replace(first, domain=np.full(first.num_rows, -1))
    joined = RoutingTrace.concatenate([first, second, third])
    assert joined.metadata.domains == ("code", "prose", "law")
    assert joined.num_tokens == 8
    assert [set(joined.domain[joined.sequence == number]) for number in range(3)] == [{1}, {0}, {-1}]


def test_traces_of_different_models_do_not_join():
    other = replace(written(), metadata=replace(METADATA, token_text=("b",)))
    with pytest.raises(ConfigError) as error:
        RoutingTrace.concatenate([written(), other])
    assert str(error.value) == (
        "Only traces of one model can be joined, but trace 1 has another token_text than trace 0. "
        "Join traces that were recorded from the same model and tokenizer."
    )
    with pytest.raises(ConfigError, match=r"^concatenate needs at least one trace, got none\.$"):
        RoutingTrace.concatenate([])


@pytest.mark.parametrize(("first", "second", "joined"), [(2, 2, 2), (2, 1, None), (2, None, None), (None, None, None)])
def test_joined_traces_have_a_number_of_choices_if_all_have_the_same(first, second, joined):
    traces = [replace(written(), metadata=replace(METADATA, top_k=top_k)) for top_k in (first, second)]
    assert RoutingTrace.concatenate(traces).metadata.top_k == joined


def test_a_trace_without_a_number_of_choices_comes_back_from_disk(tmp_path):
    trace = replace(written(), metadata=replace(METADATA, top_k=None))
    assert_same(RoutingTrace.load(trace.save(tmp_path / "trace.parquet")), trace)


def test_a_trace_of_schema_1_is_read(tmp_path):
    old = replace(written(), metadata=replace(METADATA, schema_version=1))
    assert_same(RoutingTrace.load(old.save(tmp_path / "trace.parquet")), old)


def test_columns_that_point_outside_the_metadata_are_refused():
    trace = written()
    expert = trace.expert.copy()
    expert[12] = 3
    with pytest.raises(ConfigError) as error:
        replace(trace, expert=expert)
    assert str(error.value) == (
        "Layer 1 has 3 experts, but row 12 names expert 3. Give metadata of the model that was traced."
    )
    with pytest.raises(ConfigError) as error:
        replace(trace, domain=np.full(trace.num_rows, 6))
    assert str(error.value) == (
        "The domain column must lie in -1..1 (metadata.domains has 2), got 6..6. Give metadata that names every domain."
    )
    with pytest.raises(ConfigError, match="Every column of a trace must have the same number of rows"):
        replace(trace, kept=trace.kept[:3])


def test_metadata_must_count_the_experts_of_every_layer():
    with pytest.raises(ConfigError) as error:
        replace(METADATA, num_experts=(4,))
    assert str(error.value) == (
        "layer_names and num_experts must have one entry for each MoE layer, got 2 names and 1 counts. "
        "Give both, in depth order."
    )
    with pytest.raises(ConfigError, match=r"at least 1 in every layer, got \(4, 0\)"):
        replace(METADATA, num_experts=(4, 0))


@pytest.mark.parametrize(
    ("layer", "num_experts", "num_positions", "message"),
    [
        (2, 4, 3, "layer must be in 0..1, got 2. Name it in the metadata first."),
        (
            1,
            4,
            3,
            "Layer 1 has 3 experts in the metadata, but this routing has 4. "
            "Give metadata of the model that is being traced.",
        ),
        (
            0,
            4,
            6,
            "position_T must have one entry for each of the routing's 3 tokens, got shape (6,). "
            "Flatten it as the tokens were flattened.",
        ),
    ],
)
def test_the_writer_refuses_what_does_not_fit(layer, num_experts, num_positions, message):
    with pytest.raises(ConfigError) as error:
        TraceWriter(METADATA).add(
            layer, routing(3, num_experts), None, torch.arange(num_positions), torch.zeros(3, dtype=torch.long)
        )
    assert str(error.value) == message


def test_a_missing_file_is_not_called_a_damaged_one(tmp_path):
    with pytest.raises(CheckpointError) as error:
        RoutingTrace.load(tmp_path / "gone.parquet")
    assert str(error.value) == (
        f"A routing trace was expected at {tmp_path / 'gone.parquet'}, which does not exist. "
        "Record one and save it there."
    )
    with pytest.raises(CheckpointError, match="which is a folder"):
        RoutingTrace.load(tmp_path)


@pytest.mark.parametrize("content", ["truncated", "truncated inside", "foreign", "empty", "footer only"])
def test_a_file_that_is_no_whole_parquet_is_named_with_a_way_out(tmp_path, content):
    path = written(63).save(tmp_path / "trace.parquet")
    whole = path.read_bytes()
    pieces = {
        "truncated": whole[: len(whole) // 2],
        "truncated inside": whole[:40] + bytes(200) + whole[240:],
        "foreign": b"step,loss\n1,2\n" * 40,
        "empty": b"",
        "footer only": whole[-12:],
    }
    path.write_bytes(pieces[content])
    with pytest.raises(CheckpointError) as error:
        RoutingTrace.load(path)
    assert str(error.value) == (
        f"{path} is no readable Parquet file: it is another kind of file, cut short or damaged. "
        "Record the trace again, or give the path of a file that RoutingTrace.save wrote."
    )


def test_somebody_elses_parquet_is_not_a_trace(tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"expert": [1, 2]}), path)
    with pytest.raises(CheckpointError) as error:
        RoutingTrace.load(path)
    assert str(error.value) == (
        f"{path} is a Parquet file, but not a routing trace. Give the path of a file that RoutingTrace.save wrote."
    )


def rewrite(path, description: bytes, drop: tuple[str, ...] = ()) -> None:
    table = pq.read_table(path).drop_columns(list(drop))
    pq.write_table(table.replace_schema_metadata({b"moesaic.routing_trace": description}), path)


def test_a_newer_schema_asks_for_an_update(tmp_path):
    path = written().save(tmp_path / "trace.parquet")
    rewrite(path, json.dumps(asdict(METADATA) | {"schema_version": 8, "colour": "blue"}).encode())
    with pytest.raises(CheckpointError) as error:
        RoutingTrace.load(path)
    assert str(error.value) == (
        f"{path} has trace schema version 8, and this Moesaic reads up to {SCHEMA_VERSION}. "
        "Update Moesaic, or record the trace again."
    )


@pytest.mark.parametrize("description", [b"{", b"[]", b"{}", b'{"schema_version": 1, "model": "x"}'])
def test_a_damaged_description_is_said_to_be_one(tmp_path, description):
    path = written().save(tmp_path / "trace.parquet")
    rewrite(path, description)
    with pytest.raises(CheckpointError) as error:
        RoutingTrace.load(path)
    assert str(error.value) == f"{path} is a routing trace whose description is damaged. Record it again."


def test_missing_columns_and_contradictions_are_named(tmp_path):
    path = written().save(tmp_path / "trace.parquet")
    rewrite(path, json.dumps(asdict(METADATA)).encode(), drop=("kept", "score"))
    with pytest.raises(CheckpointError, match="without the columns score, kept: something else has rewritten it"):
        RoutingTrace.load(path)
    path = written().save(path)
    rewrite(path, json.dumps(asdict(METADATA) | {"num_experts": [2, 2]}).encode())
    with pytest.raises(CheckpointError, match=r"contradicts itself\. Layer 0 has 2 experts"):
        RoutingTrace.load(path)


def test_a_save_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = written(3).save(tmp_path / "trace.parquet")
    before = path.read_bytes()

    def disk_full(_table, file, **_options):
        file.write(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", disk_full)
    with pytest.raises(CheckpointError) as error:
        written(7).save(path)
    assert str(error.value) == (
        f"The routing trace could not be written to {path}: No space left on device. "
        "Free some space or give another path; what stood there before is untouched."
    )
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_below_a_file_cannot_be_written_and_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        written(3).save(tmp_path / "file" / "trace.parquet")
