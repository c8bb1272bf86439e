"""Mixtures that transformers ships: one declarative spec of their routers; our kernels and losses under them."""
