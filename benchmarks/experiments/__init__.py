"""Small controlled experiments: two ways side by side, all rates with their intervals."""
