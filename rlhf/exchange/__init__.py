"""Votes of other annotation programs in and out of a preference store: Argilla, Label Studio, pairs."""
