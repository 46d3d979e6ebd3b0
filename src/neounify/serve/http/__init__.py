"""The HTTP layer: OpenAI's routes over any `Service` (`serve/service.py`)."""

from neounify.serve.http.app import create_app
from neounify.serve.http.config import HttpConfig, Limits, parse_keys

__all__ = ["HttpConfig", "Limits", "create_app", "parse_keys"]
