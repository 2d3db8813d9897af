"""Vectors and scores to runs and figures: encoding, search, BM25, measures, the pipeline."""
