"""Synthetic clips: a world of moving flat shapes, and MotionBench, which measures models on it."""
