"""The mathematics of one optimizer step, and its accumulation over a run."""
