"""Benchmarks against Ray's own iterator: ``python -m benchmarks [--quick] [names...]``."""
