"""Training: one loop for every stage and every size of model."""
