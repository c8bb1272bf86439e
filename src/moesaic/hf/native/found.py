"""Which modules of a model are adopted: routers, blocks that route, experts that transformers' interface reaches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.hf.native.router import Adopted
from moesaic.hf.native.rows import ROWS
from moesaic.hf.native.surgery import SURGERY
from moesaic.hf.native.table import Row, attribute
from moesaic.hf.wrapped import plain_path


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A module to adopt.

    Attributes:
        path: of the module.
        module: itself.
        block: the module around it.
        native: its class in transformers.
    """

    path: str
    module: nn.Module
    block: nn.Module
    native: type[nn.Module]


def find(model: nn.Module) -> tuple[list[Found], list[Found], list[Found]]:
    """Modules that report routings; others that change class; experts that transformers' interface reaches."""
    routers: list[Found] = []
    others: list[Found] = []
    interface: list[Found] = []
    modules = {plain_path(path): module for path, module in model.named_modules()}
    for path, module in model.named_modules():
        native = native_class(module)
        found = Found(path=path, module=module, block=modules[plain_path(path).rpartition(".")[0]], native=native)
        surgery = SURGERY.get(native.__name__)
        if surgery is not None:
            (others if surgery.reads is None else routers).append(found)
        elif native.__name__ in ROWS and ROWS[native.__name__].parts:
            routers.append(found)
        elif is_interface(module):
            interface.append(found)
    if not routers:
        _refuse(model, interface)
    described = {one.block for one in routers}
    for one in interface:
        # The router stands beside its experts.
        if one.block not in described:
            _refuse(model, [one])
    return routers, others, interface


def _refuse(model: nn.Module, undescribed: list[Found]) -> None:
    if undescribed:
        one = undescribed[0]
        beside = ", ".join(type(part).__name__ for name, part in one.block.named_children() if part is not one.module)
        raise ConfigError(
            f"adopt needs routers that Moesaic can describe, got experts ({one.native.__name__}) at {one.path} with "
            f"none of them beside ({beside or 'nothing is there'}). Use a family of the table in docs/families.md."
        )
    raise ConfigError(
        f"adopt needs a transformers model with MoE layers, got {type(model).__name__} without one that is known. "
        "Make a dense model sparse with moesaic.sparsify; the families are in docs/families.md."
    )


def row_of(one: Found) -> tuple[nn.Module, Row]:
    """The module whose attributes are read, and how."""
    surgery = SURGERY.get(one.native.__name__)
    router = one.module if surgery is None or not surgery.reads else attribute(one.module, surgery.reads)
    return router, ROWS[native_class(router).__name__]


def is_interface(module: nn.Module) -> bool:
    """Whether transformers' experts interface runs a module."""
    return "_is_expert_parallel" in module.__dict__ and "has_gate" in module.__dict__


def native_class(module: nn.Module) -> type[nn.Module]:
    """The class of transformers that a module is of, adopted or not."""
    if isinstance(module, Adopted):
        return type(module).native_class
    return type(module)
