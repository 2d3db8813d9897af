"""Text to batches: collections, runs, negatives, templates, batching."""
