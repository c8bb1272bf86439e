"""The load of the whole batch of an optimizer step, for balance losses that read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from moesaic.hf.layers import blocks
from moesaic.hf.reports import Place, Report, needs_batch_load
from moesaic.hf.scope import listening
from moesaic.hf.watching import places


class GlobalBatch:
    """Adds up the loads of each layer over the forwards of one optimizer step.

    Args:
        places: the blocks that it counts.
    """

    wants_balance = False

    def __init__(self, places: Mapping[nn.Module, Place]) -> None:
        self.places = places
        self._load_E: dict[nn.Module, Tensor] = {}

    def step(self) -> None:
        """Begin a new batch; call it after each optimizer step."""
        self._load_E.clear()

    def hear(self, _place: Place, _report: Report) -> None:
        """Nothing: loads come when the forward is over, summed over ranks."""

    def batch_load_E(self, block: nn.Module, load_E: Tensor) -> Tensor:
        """Add the load of one forward of a block, and give that of the step so far."""
        before_E = self._load_E.get(block)
        self._load_E[block] = load_E if before_E is None else before_E + load_E
        return self._load_E[block]


def uses_global_batch(model: nn.Module) -> bool:
    """Whether a balance loss of a model reads the load of the whole batch."""
    return any(needs_batch_load(term) for block in blocks(model).values() for term in block.terms)


@contextmanager
def global_batch(model: nn.Module) -> Iterator[GlobalBatch]:
    """Let :func:`~moesaic.balance.global_batch_loss` see all forwards of an optimizer step that start within.

    Each forward in training reads the load of all forwards since the last ``step()``, itself included, over all ranks:
    the last one that of the whole batch, the first one its own. Without this, a forward sees its own load, over all
    ranks. :class:`moesaic.train.BalanceCallback` does it in a Trainer.

        with moesaic.hf.global_batch(model) as batch:
            for micro_batches in steps:
                for inputs in micro_batches:
                    model(**inputs).loss.backward()
                optimizer.step()
                batch.step()

    Source: Qiu et al. 2025, arXiv:2501.11873, section 3.
    Raises:
        ConfigError: if the model has no MoE layers.
    """
    batch = GlobalBatch(places(model))
    with listening(batch):
        yield batch
