"""Look at every routing of a model while it runs, or take its balance losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moesaic.core.errors import ConfigError
from moesaic.core.routing import Routing
from moesaic.hf.layers import blocks, is_sparse
from moesaic.hf.reports import Place, Report
from moesaic.hf.scope import listening


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Seen:
    """One layer's routing in one forward.

    Attributes:
        layer: module path of the block.
        index: of the layer, in depth order.
        routing: the table, detached, with ``valid_T`` and ``sequence_T`` of the batch.
        input_ids_BP: what the layer's stack read; None for embeddings or images.
        training: whether the layer was in training mode.
    """

    layer: str
    index: int
    routing: Routing
    input_ids_BP: Tensor | None
    training: bool


@contextmanager
def observe(model: nn.Module, callback: Callable[[Seen], None]) -> Iterator[None]:
    """Call ``callback`` once for each MoE layer and forward that starts within, and never for recomputed activations.

    Only forwards in this thread are seen. Reduce what you get at once: keeping every table keeps gigabytes.

    Raises:
        ConfigError: if the model has no MoE layers.
    """
    with listening(_Observer(places(model), callback)):
        yield


@contextmanager
def adopted(model: nn.Module) -> Iterator[None]:
    """Adopt a mixture of transformers for a while, its experts untouched; nothing for models that are seen already.

    Raises:
        ConfigError: if the model has no MoE layers, or some that Moesaic cannot describe.
    """
    if is_sparse(model):
        yield
        return
    from moesaic.hf.native.adopt import adopt, is_native_mixture, release

    if not is_native_mixture(model):
        places(model)  # refuses it
    adopt(model, kernel=None)
    try:
        yield
    finally:
        release(model)


@contextmanager
def on_our_kernels(model: nn.Module) -> Iterator[None]:
    """Let our kernels run the experts of a mixture of transformers for a while, whoever runs them otherwise.

    One that is adopted already routes as it does; models of ours are left alone.

    Raises:
        ConfigError: if it is a mixture that Moesaic cannot describe, or cannot run.
    """
    from moesaic.hf.native.adopt import adopt, is_native_mixture
    from moesaic.hf.native.router import Adoption
    from moesaic.hf.native.undo import undo_to_now

    if not is_native_mixture(model):
        yield
        return
    undo, before = undo_to_now(model), {part: part.__dict__.get("_moesaic") for part in model.modules()}
    try:
        adopt(model)
        for part, adoption in before.items():
            if isinstance(adoption, Adoption):
                part.__dict__["_moesaic"] = adoption
        yield
    finally:
        undo()


class BalanceTerms:
    """The balance losses of the forwards that have run in a :func:`balance` block.

    Attributes:
        total: what joins the training loss: each loss times its coefficient, summed over layers and forwards; attached
            to the graph. None before the first forward, and if the recipe has no balance losses.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @property
    def means(self) -> dict[str, Tensor]:
        """Each loss by name, unscaled and detached, averaged over layers and forwards."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def add(self, report: Report) -> None:
        """Take in what one layer reports."""
        for name, loss in report.losses.items():
            scaled = report.scaled[name]
            self.total = scaled if self.total is None else self.total + scaled.to(self.total.device)
            value = loss.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1


@contextmanager
def balance(model: nn.Module) -> Iterator[BalanceTerms]:
    """Gather the balance losses of every forward that starts within, in evaluation mode too.

    For loops that compute their loss from logits, and for logs. ``output.loss`` stays what it is, and in training it
    has the balance losses already: add ``total`` only to a loss of your own. A loss that is rewarded for the model's
    predictions is among them where a forward gets labels.

        with moesaic.hf.balance(model) as terms:
            logits = model(input_ids, attention_mask=mask).logits
        loss = my_loss(logits, labels) + terms.total

    Raises:
        ConfigError: if the model has no MoE layers.
    """
    terms = BalanceTerms()
    with listening(_BalanceListener(places(model), terms)):
        yield terms


def places(model: nn.Module) -> dict[nn.Module, Place]:
    """Where each sparse block of a model stands.

    Raises:
        ConfigError: if it has none.
    """
    found: dict[nn.Module, Place] = {
        block: Place(layer=path, index=index) for index, (path, block) in enumerate(blocks(model).items())
    }
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no MoE layers to look at. Give a model that moesaic.sparsify has converted, "
            "or a mixture of transformers that moesaic.adopt has adopted."
        )
    return found


def detached(routing: Routing) -> Routing:
    """The table without its graph."""
    return cast(Routing, pytree.tree_map_only(Tensor, Tensor.detach, routing))


class _Observer:
    wants_balance = False
    batch_load_E = None

    def __init__(self, places: Mapping[nn.Module, Place], callback: Callable[[Seen], None]) -> None:
        self.places = places
        self.callback = callback

    def hear(self, place: Place, report: Report) -> None:
        self.callback(
            Seen(
                layer=place.layer,
                index=place.index,
                routing=detached(report.routing),
                input_ids_BP=report.frame.input_ids,
                training=report.block.training,
            )
        )


class _BalanceListener:
    wants_balance = True
    batch_load_E = None

    def __init__(self, places: Mapping[nn.Module, Place], terms: BalanceTerms) -> None:
        self.places = places
        self.terms = terms

    def hear(self, _place: Place, report: Report) -> None:
        self.terms.add(report)
