"""The experiments of 1991 and 1994 again."""

from moesaic.lab.classic.record import Record
from moesaic.lab.classic.robot_arm import RobotArm, planar_arm, read_arm
from moesaic.lab.classic.vowels import Vowels, drawn_vowels, read_vowels

__all__ = ["Record", "RobotArm", "Vowels", "drawn_vowels", "planar_arm", "read_arm", "read_vowels"]
