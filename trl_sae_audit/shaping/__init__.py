"""Rewards with a penalty on flagged features."""
