"""Colours: told apart by colour-blind readers, one for each expert throughout, in a light and a dark form.

Figures are drawn in the light form. In the page every named colour becomes a CSS variable, so that the same drawing
follows the reader's light or dark setting.
"""

from __future__ import annotations

import colorsys
import re

INK, MUTED, LINE, PAPER = "#1c2024", "#667079", "#dfe3e8", "#fffffe"
MORE, LESS = "#e5882d", "#4a94c9"
SPARSE, DENSE = "#0b7285", "#8d959e"
DEPTH = ("#7a6fd6", "#2f93b0", "#4f9f4a", "#cf8a1c")
"""From the first layer to the last."""
OTHERS = ("#aa3377", "#b08a1e", "#4a5bd4", "#1f4d2e")

_DARK = {
    INK: "#e8eaed",
    MUTED: "#9aa4ae",
    LINE: "#343b43",
    PAPER: "#16191d",
    MORE: "#c9731f",
    LESS: "#3c83b8",
    SPARSE: "#4fc3d9",
    DENSE: "#98a1ab",
    OTHERS[0]: "#dc29ba",
    OTHERS[1]: "#bbb515",
    OTHERS[2]: "#277df4",
    OTHERS[3]: "#3d9662",
}
_NAMES = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper", MORE: "more", LESS: "less"}
_NAMES |= {SPARSE: "sparse", DENSE: "dense"} | {colour: f"other-{n}" for n, colour in enumerate(OTHERS)}

# Paul Tol's "muted" scheme for light pages; for dark ones near its hues, moved apart by search until the closest two
# are 23 apart in CIE Lab for readers with each kind of colour blindness (the light ones: 15).
_MUTED_SCHEME = (
    ("#cc6677", "#7e5c65"),
    ("#332288", "#7e74df"),
    ("#ddcc77", "#d5bb73"),
    ("#117733", "#28843c"),
    ("#88ccee", "#aad3f7"),
    ("#882255", "#d87aac"),
    ("#44aa99", "#6df3ca"),
    ("#999933", "#82920f"),
    ("#aa4499", "#b91495"),
)


def expert_colours(num_experts: int) -> list[tuple[str, str]]:
    """(light, dark) colour of each expert: nine that everyone can tell apart, a wheel of hues for more than nine."""
    if num_experts <= len(_MUTED_SCHEME):
        return list(_MUTED_SCHEME[:num_experts])
    colours = []
    for number in range(num_experts):
        # Steps of the golden angle keep neighbours far apart; three lightnesses help where hues come close.
        hue = number * 0.381966 % 1
        light = (0.36, 0.50, 0.62)[number % 3]
        colours.append((_hex(hue, light), _hex(hue, light + 0.14)))
    return colours


def css_variables(num_experts: int, *, dark: bool) -> str:
    """The declarations that give every named colour its value in one of the two forms."""
    pairs = [(name, _DARK[colour] if dark else colour) for colour, name in _NAMES.items()]
    pairs += [(f"e{number}", pair[dark]) for number, pair in enumerate(expert_colours(num_experts))]
    return " ".join(f"--{name}: {value};" for name, value in pairs)


def with_variables(svg: str, num_experts: int) -> str:
    """Put CSS variables in the place of every named colour in the style attributes of a drawing."""
    names = dict(_NAMES) | {pair[0]: f"e{number}" for number, pair in enumerate(expert_colours(num_experts))}
    pattern = re.compile("(?<=: )(" + "|".join(map(re.escape, names)) + ')(?=[;"])')
    return pattern.sub(lambda match: f"var(--{names[match[1]]})", svg)


def _hex(hue: float, lightness: float) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in colorsys.hls_to_rgb(hue, lightness, 0.45))
