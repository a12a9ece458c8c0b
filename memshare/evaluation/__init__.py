"""Experiments, reports and plots."""
