"""The table of tokens: for each the expert that takes most of it, layer by layer."""

from __future__ import annotations

from moesaic.lens.measures import token_table
from moesaic.lens.study import Study
from moesaic.lens.tables import Cell, Column, Table
from moesaic.lens.tokens import token_text

# Over all layers: keeps the page of a large vocabulary at a few megabytes.
_MOST_ROWS = 1500
_MOST_TOKENS = 300
# Below this a share says little.
_LEAST_TIMES = 10


def preferred_experts(study: Study) -> Table | None:
    """The commonest tokens and their preferred experts; None where the trace knows no tokens."""
    if not (study.trace.token_id >= 0).any():
        return None
    limit = min(_MOST_TOKENS, _MOST_ROWS // len(study.shown))
    rows: list[tuple[Cell, ...]] = []
    for layer in study.shown:
        found = token_table(study.trace, layer, min_tokens=_LEAST_TIMES)
        for place in range(min(limit, len(found.token_id_V))):
            share, base = float(found.share_V[place]), float(found.base_V[place])
            rows.append(
                (
                    token_text(study.trace, int(found.token_id_V[place])), study.labels[layer],
                    int(found.count_V[place]), int(found.expert_V[place]), share,
                    float(found.low_V[place]), float(found.high_V[place]), base,
                    share / base if base > 0 else None,
                )
            )  # fmt: skip
    return Table(
        name="tokens",
        title="Which expert takes a token first",
        columns=(
            Column(name="token"),
            Column(name="layer", picks=True),
            Column(name="n", form=",d"),
            Column(name="expert", form="d"),
            Column(name="takes", form=".0%"),
            Column(name="from", form=".0%"),
            Column(name="to", form=".0%"),
            Column(name="chance", form=".0%"),
            Column(name="ratio", form=".1f"),
        ),
        rows=rows,
    )
