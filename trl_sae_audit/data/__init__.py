"""Datasets, wherever they are: preference pairs and texts."""
