"""Serving: an understanding and a generation engine behind one OpenAI-compatible server."""
