"""Measurements on a living model: each runs it in its own way and leaves it as it was."""
