"""Benchmarks, each beside its reference; run as `python -m bench`. Nothing imports this package except tests."""
