"""One alphabet: the letters after a tensor's name are its dimensions.

``x_TD`` has shape (tokens, width); ``gate_EDF`` has shape (experts, width, expert hidden). A test reads every name in
the package and rejects a letter that is not here.
"""

ALPHABET = {
    "T": "tokens, all sequences of a batch laid end to end",
    "D": "width of the model",
    "E": "experts of one layer",
    "K": "choices of one token",
    "N": "rows of the routing table, one per (token, choice)",
    "M": "rows of one expert",
    "F": "hidden width of one expert",
    "C": "capacity, rows that one expert may take",
    "S": "slots, or sequences where a loss is taken per sequence",
    "G": "groups of experts",
    "B": "sequences in a batch",
    "P": "positions in a sequence",
    "L": "layers",
    "V": "vocabulary",
    "Q": "domains of text",
    "R": "rank of a low-rank map",
    "O": "outputs of an expert, where they are targets or classes",
    "A": "branches of a tree of gates",
}
