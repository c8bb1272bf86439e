"""From a sparse model of ours to the family of transformers that computes the same."""
