"""Evaluation of any model on any data: metrics of images and rates of success."""
