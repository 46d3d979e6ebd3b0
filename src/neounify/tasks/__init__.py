"""Requests and one program per task: its engine commands, without any I/O."""
