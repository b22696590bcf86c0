"""Data: from a data set directory to the exact batch of a step. Determinism lives here."""
