"""Batches from shards that are read from beginning to end."""
