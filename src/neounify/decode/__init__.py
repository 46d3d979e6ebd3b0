"""Decoding of token ids: the sampler, and the state of a sequence; text belongs to the tasks."""
