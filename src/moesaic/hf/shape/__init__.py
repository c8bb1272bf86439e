"""From a configuration of transformers to a shape: which parts a model has, and how many weights in each."""

from moesaic.hf.shape.model import shape_of, shape_of_config

__all__ = ["shape_of", "shape_of_config"]
