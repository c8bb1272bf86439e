"""A tiny random model of every Mixture-of-Experts family that transformers has, and inputs for it."""

from __future__ import annotations

import pytest
import transformers

from tests.hf.families.borrowed import BORROWED
from tests.hf.families.build import Tiny, tiny
from tests.hf.families.choices import choices, valid
from tests.hf.families.composite import COMPOSITE
from tests.hf.families.language import LANGUAGE
from tests.hf.families.variants import TRIED, VARIANTS

# The configs are written for this version; fields and families come and go with others.
WRITTEN_FOR = "5.23"
written_for_this_transformers = pytest.mark.skipif(
    not transformers.__version__.startswith(f"{WRITTEN_FOR}."),
    reason=f"the tiny families are written for transformers {WRITTEN_FOR}, this is {transformers.__version__}",
)

FAMILIES: tuple[str, ...] = tuple(sorted(LANGUAGE | COMPOSITE))
ALSO: tuple[str, ...] = tuple(sorted(BORROWED))

__all__ = [
    "ALSO",
    "FAMILIES",
    "TRIED",
    "VARIANTS",
    "WRITTEN_FOR",
    "Tiny",
    "choices",
    "tiny",
    "valid",
    "written_for_this_transformers",
]
