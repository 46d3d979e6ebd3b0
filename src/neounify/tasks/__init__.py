"""Requests, and one program per task: which engine calls answer it, without any I/O."""
