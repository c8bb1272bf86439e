"""What the service did, in the text form that Prometheus reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from moesaic.serve.engine import Engine
from moesaic.serve.heard import Heard
from moesaic.serve.model import ServedModel

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPED = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


class Meter:
    """Counts answered requests by path and status; used in one thread.

    Args:
        paths: that are counted by name; all others together, so that nobody can make the list grow.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self.paths = frozenset(paths)
        self.requests: Counter[tuple[str, int]] = Counter()

    def answered(self, path: str, status: int) -> None:
        """Count one."""
        self.requests[path if path in self.paths else "other", status] += 1


def prometheus_text(meter: Meter, engine: Engine, heard: Heard, served: ServedModel) -> str:
    """All figures of a service.

    Args:
        meter: requests.
        engine: answers.
        heard: what experts took.
        served: the model, for the names of its layers.
    Source:
        Prometheus text exposition format 0.0.4.
    """
    requests = [({"path": path, "status": str(status)}, count) for (path, status), count in meter.requests.items()]
    tokens = [({"kind": "prompt"}, engine.prompt_tokens), ({"kind": "completion"}, engine.completion_tokens)]
    lines = [
        *_family("requests_total", "counter", "HTTP requests answered, by path and status.", requests),
        *_family(
            "answers_total",
            "counter",
            "Answers by how they ended.",
            [({"outcome": outcome}, count) for outcome, count in engine.outcomes.items()],
        ),
        *_family("answers_active", "gauge", "Answers that are being written.", [({}, engine.num_active)]),
        *_family("requests_waiting", "gauge", "Requests that wait to begin.", [({}, engine.num_waiting)]),
        *_family("tokens_total", "counter", "Tokens of complete answers.", tokens),
        *_family("tokens_read_total", "counter", "Tokens that the model has read.", [({}, heard.from_service)]),
        *_family(
            "expert_choices_total",
            "counter",
            "Choices that each expert got, dropped ones included.",
            _by_expert(served, [heard.load(layer).tolist() for layer in range(len(served.layers))]),
        ),
        *_family(
            "expert_dropped_total",
            "counter",
            "Choices that each expert dropped for lack of room.",
            _by_expert(served, [heard.dropped(layer).tolist() for layer in range(len(served.layers))]),
        ),
    ]
    return "\n".join(lines) + "\n"


def _by_expert(served: ServedModel, counts: list[list[int]]) -> list[tuple[dict[str, str], int]]:
    return [
        ({"layer": name, "expert": str(expert)}, count)
        for name, row in zip(served.layers, counts, strict=True)
        for expert, count in enumerate(row)
    ]


def _family(name: str, kind: str, what: str, rows: list[tuple[dict[str, str], int]]) -> Iterator[str]:
    yield f"# HELP moesaic_{name} {what}"
    yield f"# TYPE moesaic_{name} {kind}"
    for labels, value in rows:
        yield f"moesaic_{name}{_written(labels)} {value}"


def _written(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{value.translate(_ESCAPED)}"' for name, value in labels.items())
    return "{" + ",".join(pairs) + "}"
