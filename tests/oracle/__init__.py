"""What every part means, in plain loops: one token, one expert, one number at a time, in float64.

Nothing here calls the library, and nothing here is clever. Numbers are torch scalars and rows, so that autograd gives
the gradients that fast code is compared with.
"""
