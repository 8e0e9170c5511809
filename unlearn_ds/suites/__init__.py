"""Benchmarks of the field in one command, written as Open-Unlearning writes them: questions, their tables, the logs."""
