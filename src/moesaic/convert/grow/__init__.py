"""From dense to sparse: copies, parts, or several models."""
