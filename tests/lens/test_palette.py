"""Colours are told apart by readers with each kind of colour blindness: by simulation, in CIE Lab.

Source: Machado, Oliveira and Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision Deficiency",
the matrices of severity 1.0, in linear RGB.
"""

from itertools import combinations

import numpy as np
import pytest

from moesaic.lens import palette

VISIONS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.180437], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])


def linear(colour):
    value = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(colour, vision):
    ratio = TO_XYZ @ np.clip(np.asarray(VISIONS[vision]) @ linear(colour), 0, 1) / WHITE
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def closest(colours, vision):
    """Distance of the two colours that are hardest to tell apart."""
    seen = [lab(colour, vision) for colour in colours]
    return min(np.linalg.norm(one - other) for one, other in combinations(seen, 2))


def contrast(one, other):
    light, dark = sorted(float(linear(colour) @ TO_XYZ[1]) for colour in (one, other))[::-1]
    return (light + 0.05) / (dark + 0.05)


def test_the_measure_knows_red_from_green_only_where_the_eye_does():
    assert closest(["#c00000", "#007000"], "normal") > 100
    assert closest(["#8a6a00", "#6f7b20"], "deuteranopia") < closest(["#8a6a00", "#6f7b20"], "normal")
    assert lab("#ffffff", "normal") == pytest.approx([100, 0, 0], abs=0.1)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("dark", [False, True])
def test_nine_experts_are_told_apart(vision, dark):
    assert closest([pair[dark] for pair in palette.expert_colours(9)], vision) > 12


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("dark", [False, True])
def test_more_and_less_and_the_runs_are_told_apart(vision, dark):
    form = palette._DARK if dark else {colour: colour for colour in palette._DARK}
    assert closest([form[palette.MORE], form[palette.LESS]], vision) > 60
    assert closest([form[colour] for colour in (palette.SPARSE, palette.DENSE, *palette.OTHERS)], vision) > 12


@pytest.mark.parametrize("dark", [False, True])
def test_letters_are_read_and_lines_are_seen_on_their_paper(dark):
    form = palette._DARK if dark else {colour: colour for colour in palette._DARK}
    assert contrast(form[palette.INK], form[palette.PAPER]) > 12
    assert contrast(form[palette.MUTED], form[palette.PAPER]) > 4.5
    for colour in (palette.SPARSE, palette.DENSE, *palette.OTHERS):
        assert contrast(form[colour], form[palette.PAPER]) > 3
