"""From the pictures and captions that people have to shards."""
