"""Batches from a JSONL file: lines read and checked, done together, resumed."""
