"""The audit before training."""
