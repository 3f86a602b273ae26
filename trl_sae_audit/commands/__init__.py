"""The commands of `trl-sae-audit`, one module each."""
