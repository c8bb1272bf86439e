"""What each recipe means, from its settings alone: which parts, put together how. One file per family."""

from __future__ import annotations

from tests.oracle.case import Oracle
from tests.oracle.recipes import (
    adaptive,
    assignment,
    fixed,
    gshard,
    language_models,
    lora,
    noisy,
    soft,
    token_choice,
    unequal,
)

FAMILIES = (token_choice, language_models, adaptive, assignment, fixed, noisy, gshard, soft, lora, unequal)
ORACLES: dict[str, Oracle] = {name: oracle for family in FAMILIES for name, oracle in family.ORACLES.items()}
