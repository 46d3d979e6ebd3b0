"""Synthetic scenes: a world of flat shapes, and SceneBench, which measures models on it."""
