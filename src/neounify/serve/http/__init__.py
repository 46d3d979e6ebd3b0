"""The HTTP layer: OpenAI's routes over anything that is `Answering`."""

from neounify.serve.http.app import create_app
from neounify.serve.http.hooks import FormatName, HttpHooks, PlainHooks
from neounify.serve.http.settings import HttpSettings, Limits, parse_keys

__all__ = [
    "FormatName",
    "HttpHooks",
    "HttpSettings",
    "Limits",
    "PlainHooks",
    "create_app",
    "parse_keys",
]
