"""The HTTP layer: OpenAI's routes over any `Service` (`serve/service.py`)."""

from neounify.serve.http.app import create_app
from neounify.serve.http.media import HttpHooks, MarkingHooks
from neounify.serve.http.settings import HttpSettings, Limits, parse_keys

__all__ = [
    "HttpHooks",
    "HttpSettings",
    "Limits",
    "MarkingHooks",
    "create_app",
    "parse_keys",
]
