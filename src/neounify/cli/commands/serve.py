"""`neounify serve`."""

from __future__ import annotations

from neounify.cli.models import resolve_model
from neounify.cli.options import ReportOptions
from neounify.cli.serve_options import (
    AccessOptions,
    EngineOptions,
    ListenOptions,
    ReplicaOptions,
    SafetyOptions,
    ServeModelOptions,
)
from neounify.runtime import lasting_imports


def serve(
    *,
    model: ServeModelOptions,
    listen: ListenOptions,
    engines: EngineOptions,
    access: AccessOptions,
    safety: SafetyOptions,
    replicas: ReplicaOptions,
    report: ReportOptions,
) -> None:
    """Serve a model: an OpenAI-compatible API, and a page for the browser.

    Many requests are answered at once; text does not wait behind images. Without --model the
    small model of the package is served.

    \b
      neounify serve
      neounify serve --model FOLDER --mode separate --port 8080 --api-keys keys.txt
    """
    resolve_model(model.model)
    with lasting_imports():
        from neounify.cli.serving import serve_model

    serve_model(model, listen, engines, access, safety, replicas, report)
