"""From a mixture to a smaller one, or to a dense model."""
