"""Measuring `neounify serve` from outside: load, a long soak, faults. Loopback only.

docs/serving-load.md says what is measured and how.
"""
