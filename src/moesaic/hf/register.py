"""Teach transformers' Auto classes to read Moesaic's folders, without importing transformers for it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Make our ``model_type`` names known to transformers: now if its Auto classes are loaded, else when they are."""
    if _AUTO_CONFIG in sys.modules:
        _add_to(sys.modules[_AUTO_CONFIG])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _add_to(auto_config: ModuleType) -> None:
    from moesaic.hf.auto import MoesaicConfig
    from moesaic.hf.config import MODEL_TYPE
    from moesaic.hf.lstm_config import LstmConfig

    auto_config.CONFIG_MAPPING.register(MODEL_TYPE, MoesaicConfig, exist_ok=True)
    auto_config.CONFIG_MAPPING.register(LstmConfig.model_type, LstmConfig, exist_ok=True)


class _WhenImported(MetaPathFinder):
    """Steps aside at once, and leaves its loader around the one module that it waited for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _add_to(module)
