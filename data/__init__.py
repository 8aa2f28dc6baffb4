"""Input: sources of examples, and the one pipeline that orders, shards, augments and batches."""
