"""Keeping a job's ranks alive on its nodes."""
