"""Pictures: of a study, of two side by side, and of the training that came before."""
