"""Benchmarks: `unlearn-ds bench` lists them."""
