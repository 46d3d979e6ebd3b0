"""Quantised weights: formats of codes and scales, and how files name them."""
