"""From embeddings and scores to runs and metrics: inference, search, BM25, the pipeline."""
