"""What a conversion proves: a probe on both models, and the receipt."""
