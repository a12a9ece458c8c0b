"""Keeping a pool small: which memories go first, by policy, down to a cap."""

from memshare.pruning.evidence import Entry, Evidence
from memshare.pruning.policies import Policy, PruneError, find_policy, policy_names
from memshare.pruning.prune import PruneReport, check_caps, hold_caps, prune

__all__ = [
    "Entry",
    "Evidence",
    "Policy",
    "PruneError",
    "PruneReport",
    "check_caps",
    "find_policy",
    "hold_caps",
    "policy_names",
    "prune",
]
