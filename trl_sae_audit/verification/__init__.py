"""Predicted against measured change."""
