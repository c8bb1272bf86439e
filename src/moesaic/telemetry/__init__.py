"""Telemetry: a Routing becomes a few numbers at once, or rows of a trace on disk."""

from moesaic.telemetry.summary import RoutingSummary
from moesaic.telemetry.trace import RoutingTrace, TraceMetadata
from moesaic.telemetry.writer import TraceStream, TraceWriter

__all__ = ["RoutingSummary", "RoutingTrace", "TraceMetadata", "TraceStream", "TraceWriter"]
