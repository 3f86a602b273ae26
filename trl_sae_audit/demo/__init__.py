"""The whole loop in the lab, told as it goes: audit, flag, filter, shape, train, compare. `trl-sae-audit demo` runs it."""
