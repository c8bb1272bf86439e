"""Kernels in C for CPUs, compiled when asked for and never by themselves: nothing else needs a compiler."""
