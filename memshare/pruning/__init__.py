"""Keeping a pool small: which memories go first, by policy, down to a cap."""
