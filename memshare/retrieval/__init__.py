"""Encoder, BM25, index, generations and the hot-swapping searcher."""
