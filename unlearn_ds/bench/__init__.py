"""Benchmarks: `unlearn-ds bench kernels|loss|loader|step|evaluation`."""
