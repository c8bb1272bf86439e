"""Checkpoints: read tensor by tensor, written shard by shard, with books that must balance."""
