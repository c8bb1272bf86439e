import json
import math
from dataclasses import replace

import numpy as np
import pytest

from moesaic.lens import drawing
from moesaic.telemetry.trace import RoutingTrace, TraceMetadata

DOMAINS = ("code", "literature", "mathematics")
BYTES = tuple(bytes([number]).decode("utf-8", "surrogateescape") for number in range(256))


def make_trace(rows, *, num_experts=(4,), top_k=2, domains=DOMAINS, token_text=BYTES, **names):
    """A trace from (sequence, position, layer, choice, token, expert, domain) tuples, with equal weights."""
    columns = np.asarray(rows, dtype=np.int64).reshape(-1, 7).T
    named = dict(zip(("sequence", "position", "layer", "choice", "token_id", "expert", "domain"), columns, strict=True))
    metadata = TraceMetadata(
        model=names.get("model", "runs/toy"),
        recipe=names.get("recipe", "mixtral"),
        layer_names=names.get("layer_names", tuple(f"model.layers.{n}.mlp" for n in range(len(num_experts)))),
        num_experts=num_experts,
        top_k=top_k,
        token_text=token_text,
        domains=domains,
    )
    count = columns.shape[1]
    half = np.full(count, 0.5)
    return RoutingTrace(metadata=metadata, **named, weight=half, score=half, kept=np.ones(count, dtype=bool))


def random_trace(*, num_experts=(4, 4), top_k=2, num_sequences=12, length=32, lean=0.0, seed=0, **options):
    """Byte tokens of three domains; ``lean`` is how strongly domain d is drawn to expert d of the last layer."""
    rng = np.random.default_rng(seed)
    text = b"def f(x):\n    return x\n", b"It was, in truth, a fine day. ", b"Solve 4*x = 12 for x.\n3\n"
    rows = []
    for sequence in range(num_sequences):
        domain = sequence % 3
        for layer, experts in enumerate(num_experts):
            logits = rng.normal(size=(length, experts))
            if layer == len(num_experts) - 1 and experts > domain:
                logits[:, domain] += lean
            order = np.argsort(-logits, axis=1)[:, :top_k]
            rows += [
                (sequence, position, layer, choice, text[domain][position % len(text[domain])], expert, domain)
                for position in range(length)
                for choice, expert in enumerate(order[position])
            ]
    return make_trace(rows, num_experts=num_experts, top_k=top_k, **options)


def without_domains(trace):
    return replace(trace, domain=np.full(trace.num_rows, -1))


def write_run(folder, trace, *, dense=False, steps=40, offset=0.0, domains=DOMAINS, names=None):
    """A run folder as training writes it, with made-up numbers that fall as losses do."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    layers = dict(zip(names or trace.metadata.layer_names, trace.metadata.num_experts, strict=True))
    bits = {}
    for step in range(1, steps + 1):
        line = {"kind": "train", "step": step, "tokens": step * 64, "loss": 1.4 + offset + 4 * math.exp(-step / 9)}
        line |= {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 900.0, "aux": {}}
        if not dense:
            line["load"] = {name: [1 / count] * count for name, count in layers.items()}
            line["load_max_over_mean"] = dict.fromkeys(layers, 1 + 1 / step)
            line["drop_rate"] = dict.fromkeys(layers, 0.1 / step)
            line["router_entropy"] = {name: math.log(count) * 0.8 for name, count in layers.items()}
        lines.append(line)
        if step % 10 == 0:
            bits = {name: 1.5 + offset + number / 4 + 1 / step for number, name in enumerate(domains)}
            bits["mean"] = sum(bits.values()) / len(bits)
            lines.append({"kind": "eval", "step": step, "tokens": step * 64, "bits_per_byte": bits})
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"bits_per_byte": bits, "total_params": 1000 if dense else 3000, "active_params": 1000}
    summary |= {"tokens": steps * 64, "tokens_per_s": 900.0}
    summary |= {"load_max_over_mean": None if dense else 1.2, "drop_rate": None if dense else 0.01}
    (folder / "summary.json").write_text(json.dumps({"dense" if dense else "moe": summary}))
    return folder


@pytest.fixture(autouse=True)
def _no_png(monkeypatch):
    """Half of a page's time is its PNG files; those that look at them have pages made once for the module."""
    monkeypatch.setattr(drawing, "_png", lambda *_: b"no picture")


@pytest.fixture(name="make_trace")
def _make_trace():
    return make_trace


@pytest.fixture(name="random_trace")
def _random_trace():
    return random_trace


@pytest.fixture(name="without_domains")
def _without_domains():
    return without_domains


@pytest.fixture(name="write_run")
def _write_run():
    return write_run
