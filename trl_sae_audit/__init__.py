"""See what a reward really teaches: SAE feature attribution for TRL training runs."""

__version__ = "0.1.0"
