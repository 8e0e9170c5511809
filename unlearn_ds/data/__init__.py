"""Corpora on disk, the plan of a step, and the loader that feeds it."""
