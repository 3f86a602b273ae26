"""Lookahead: what an optimizer step on the audited data would do to the features."""
