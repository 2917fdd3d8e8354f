"""From an URL to a sample's bytes: where shards lie, their indexes, ranges of bytes."""
