"""Traces to measure: drawn at random in every awkward form, or with a structure planted in them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from moesaic.telemetry.trace import RoutingTrace, TraceMetadata

DOMAINS = ("code", "prose", "sums")


def trace_of(rows, *, num_experts, domains=DOMAINS, top_k=None, kept=None):
    """A trace from (sequence, position, layer, choice, token, expert, domain) tuples."""
    columns = np.asarray(rows, dtype=np.int64).reshape(-1, 7).T
    names = ("sequence", "position", "layer", "choice", "token_id", "expert", "domain")
    metadata = TraceMetadata(
        model="drawn",
        layer_names=tuple(f"layers.{number}" for number in range(len(num_experts))),
        num_experts=tuple(num_experts),
        top_k=top_k,
        domains=domains,
    )
    count = columns.shape[1]
    return RoutingTrace(
        metadata=metadata,
        **dict(zip(names, columns, strict=True)),
        weight=np.ones(count),
        score=np.ones(count),
        kept=np.ones(count, dtype=bool) if kept is None else kept,
    )


def rows_of(trace):
    """The tuples that ``trace_of`` was made from."""
    columns = (trace.sequence, trace.position, trace.layer, trace.choice, trace.token_id, trace.expert, trace.domain)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def drawn_rows(rng, *, num_experts, most, lengths, vocabulary, gaps=0.1, unknown=0.1):
    """Tokens with none to ``most`` experts in each layer, some positions left out, some texts without a domain."""
    rows = []
    for sequence, length in enumerate(lengths):
        domain = -1 if rng.random() < unknown else int(rng.integers(0, len(DOMAINS)))
        for position in range(length):
            if rng.random() < gaps:
                continue
            token = -1 if rng.random() < 0.05 else int(rng.integers(0, vocabulary))
            for layer, experts in enumerate(num_experts):
                count = int(rng.integers(0, min(most, experts) + 1))
                chosen = rng.permutation(experts)[:count]
                rows += [(sequence, position, layer, choice, token, int(e), domain) for choice, e in enumerate(chosen)]
    return [rows[index] for index in rng.permutation(len(rows))]


@st.composite
def drawn_traces(draw):
    """Small traces in which anything may happen that the format allows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_experts = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    rows = drawn_rows(
        rng,
        num_experts=num_experts,
        most=draw(st.integers(1, 4)),
        lengths=draw(st.lists(st.integers(0, 9), min_size=1, max_size=5)),
        vocabulary=draw(st.integers(1, 6)),
    )
    return trace_of(rows, num_experts=num_experts, kept=rng.random(len(rows)) < 0.8)


def routed(expert_TK, *, token_T, length, domain_S=None, num_experts=None, domains=DOMAINS):
    """A trace of one layer from each token's experts; ``length`` tokens make a sequence."""
    expert_TK = np.asarray(expert_TK)
    num_tokens, top_k = expert_TK.shape
    index_N = np.repeat(np.arange(num_tokens), top_k)
    sequence_N = index_N // length
    domain_N = np.zeros(len(index_N)) if domain_S is None else np.asarray(domain_S)[sequence_N]
    rows = np.stack(
        [sequence_N, index_N % length, np.zeros(len(index_N)), np.tile(np.arange(top_k), num_tokens),
         np.asarray(token_T)[index_N], expert_TK.ravel(), domain_N], axis=1,
    )  # fmt: skip
    return trace_of(rows, num_experts=(num_experts or int(expert_TK.max()) + 1,), top_k=top_k, domains=domains)


def sets(rng, num_tokens, num_experts, top_k):
    """Each token's experts, every set of ``top_k`` as likely as any other."""
    return rng.random((num_tokens, num_experts)).argsort(axis=1)[:, :top_k]
