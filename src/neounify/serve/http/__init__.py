"""The HTTP layer: OpenAI's routes over any `Service` (`serve/service.py`)."""

from neounify.deprecation import moved
from neounify.serve.http.app import create_app
from neounify.serve.http.config import HttpConfig, Limits, parse_keys

__all__ = ["HttpConfig", "Limits", "create_app", "parse_keys"]

__getattr__ = moved(__name__, "neounify.serve.http.config", {"HttpSettings": "HttpConfig"})
