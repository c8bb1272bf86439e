"""Pretrained weights put through everything: made a mixture, trained on, questioned, and made smaller again."""

from moesaic.lab.pretrained.experiment import Experiment
from moesaic.lab.pretrained.page import words, write
from moesaic.lab.pretrained.plan import Plan, Story
from moesaic.lab.pretrained.quick import QUICK, little_text, tiny_model
from moesaic.lab.pretrained.smol import smollm2

__all__ = ["QUICK", "Experiment", "Plan", "Story", "little_text", "smollm2", "tiny_model", "words", "write"]
