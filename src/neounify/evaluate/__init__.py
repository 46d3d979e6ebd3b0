"""Evaluation of any model on any data: similarity of images, rates with confidence intervals."""
