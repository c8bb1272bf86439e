"""The experiments of 1991 and 1994 again, and what their mixtures are worth beside today's choices."""

from moesaic.lab.classic.record import Record
from moesaic.lab.classic.robot_arm import RobotArm, planar_arm, read_arm
from moesaic.lab.classic.tabular import Tabular, digits, drawn_tables, quick_tables, read_tables
from moesaic.lab.classic.vowels import Vowels, drawn_vowels, read_vowels

__all__ = [
    "Record",
    "RobotArm",
    "Tabular",
    "Vowels",
    "digits",
    "drawn_tables",
    "drawn_vowels",
    "planar_arm",
    "quick_tables",
    "read_arm",
    "read_tables",
    "read_vowels",
]
