"""Preference data filtered by flagged features."""
