"""The whole loop in the lab, with narration: audit, flag, filter, shape, train, compare. `trl-sae-audit demo` runs it."""
