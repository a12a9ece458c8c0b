"""BERTScore, IR metrics and bootstrap intervals: pure functions."""
