"""Which tensors are alive; it stands in :mod:`moesaic.core.living`, since the planner's check needs it too."""

from moesaic.core.living import Living

__all__ = ["Living"]
