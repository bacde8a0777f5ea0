"""Benchmarks against references; run as `python -m bench`.

Nothing imports this package except tests.
"""
