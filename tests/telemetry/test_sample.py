from dataclasses import replace

import numpy as np
import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.telemetry.trace import RoutingTrace
from moesaic.telemetry.writer import TraceStream, TraceWriter
from tests.telemetry.test_trace import METADATA, assert_same, routing


def written(num_sequences, writer=None):
    writer = TraceWriter(METADATA) if writer is None else writer
    for start in range(0, num_sequences, 7):
        sequence_T = torch.arange(start, min(start + 7, num_sequences)).repeat_interleave(3)
        for layer, num_experts in enumerate(METADATA.num_experts):
            table = routing(len(sequence_T), num_experts)
            writer.add(layer, table, None, torch.arange(3).repeat(len(sequence_T) // 3), sequence_T)
    return writer


def test_a_sample_has_whole_sequences_and_about_as_many_as_were_asked_for():
    trace = written(2000).trace()
    sample = trace.sample(0.3)
    kept = np.unique(sample.sequence)
    assert len(kept) == pytest.approx(600, abs=60)
    assert sample.num_rows == len(kept) * 12
    assert_same(sample, replace(trace.where(np.isin(trace.sequence, kept)), metadata=sample.metadata))
    assert sample.metadata.sampled == 0.3
    # Not every third: neighbours are kept or not without regard to each other.
    assert len(np.unique(np.diff(kept))) > 5


def test_a_recording_that_samples_keeps_what_sampling_it_later_would(tmp_path):
    whole = written(400).trace()
    small = whole.sample(0.25)
    assert_same(written(400, TraceWriter(METADATA, sample=0.25)).trace(), small)
    stream = TraceStream(METADATA, tmp_path / "small.parquet", rows_held=100, sample=0.25)
    written(400, stream).close(stream.metadata)
    assert_same(RoutingTrace.load(tmp_path / "small.parquet"), small)
    path = whole.save(tmp_path / "whole.parquet")
    assert_same(RoutingTrace.load(path, sample=0.25), small)


def test_a_sample_of_a_sample_draws_anew():
    trace = written(2000).trace()
    twice = trace.sample(0.5).sample(0.5)
    assert len(np.unique(twice.sequence)) == pytest.approx(500, abs=60)
    assert twice.metadata.sampled == 0.25


def test_joined_samples_of_different_size_do_not_know_their_share():
    trace = written(50).trace()
    assert RoutingTrace.concatenate([trace, trace.sample(0.5)]).metadata.sampled is None
    assert RoutingTrace.concatenate([trace.sample(0.5), trace.sample(0.5)]).sample(0.5).metadata.sampled == 0.25


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share, tmp_path):
    trace = written(2).trace()
    path = trace.save(tmp_path / "trace.parquet")
    for ask in (
        trace.sample,
        lambda sample: RoutingTrace.load(path, sample=sample),
        lambda s: TraceWriter(METADATA, s),
    ):
        with pytest.raises(ConfigError) as error:
            ask(share)
        assert str(error.value) == (
            f"sample must be above 0 and at most 1, got {share}. Give the share of sequences to keep."
        )


def test_recording_a_model_writes_down_the_sequences_of_the_sample(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    import moesaic as mz

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = mz.sparsify(LlamaForCausalLM(config), "mixtral", num_experts=4, top_k=2).eval()
    batches = torch.randint(0, 64, (8, 5, 6))

    def recorded(**options):
        with torch.no_grad(), mz.record(model, **options) as trace:
            for batch in batches:
                model(input_ids=batch)
        return trace

    small = recorded(sample=0.4)
    assert 0 < small.num_rows < 8 * 5 * 6 * 2
    assert_same(small, recorded().sample(0.4))
    recorded(sample=0.4, to=tmp_path / "small.parquet")
    assert_same(RoutingTrace.load(tmp_path / "small.parquet"), small)
    with pytest.raises(ConfigError, match="above 0 and at most 1, got 2"), mz.record(model, sample=2):
        pass
