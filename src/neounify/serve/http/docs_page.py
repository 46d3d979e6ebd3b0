"""The page at /docs: the API as plain HTML, made from its OpenAPI description."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%;font-size:.9rem}"
    "td,th{border-bottom:1px solid #8884;padding:.25rem .5rem;text-align:left;vertical-align:top}"
    "code{font-size:.95em}:root{color-scheme:light dark}"
    # On a phone a table's columns would be wider than the screen: cells go below each other.
    "@media(max-width:40rem){table,tbody,tr,td{display:block}tr:has(th),td:empty{display:none}"
    "tr{border-bottom:1px solid #8884}td{border:0;padding:.1rem 0}"
    "h2,h3,p,td{overflow-wrap:anywhere}}"
)

_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
DOCS_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}
"""Headers of the page: nothing but its own style."""


def docs_page(api: Mapping[str, Any]) -> str:
    """The whole page; it loads nothing from anywhere."""
    title = escape(api["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style><h1>{title}</h1><p>{escape(api['info']['description'])}</p>"
        '<p>For programs: <a href="openapi.json">openapi.json</a></p>'
        + "".join(_operations(api))
        + "<h2>Types</h2>"
        + "".join(_types(api))
        + "</html>"
    )


def _operations(api: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation.get('summary', ''))}. "
            yield f"{escape(operation.get('description', ''))}</p>"
            contents = operation.get("requestBody", {}).get("content", {})
            for media_type, content in contents.items():
                yield f"<p>Body: <code>{escape(media_type)}</code></p>"
                yield _fields(_resolve(content["schema"], api))
            for media_type, content in operation["responses"]["200"]["content"].items():
                kind = _type(content.get("schema", {"type": ""}))
                yield f"<p>Answer: <code>{escape(media_type)}</code> {escape(kind)}</p>"


def _types(api: Mapping[str, Any]) -> Iterator[str]:
    """Everything that bodies and answers are made of, but the bodies themselves."""
    for name, schema in api["components"]["schemas"].items():
        if not name.endswith("Body"):
            yield f"<h3>{escape(name)}</h3><p>{escape(schema.get('description', ''))}</p>"
            yield _fields(schema)


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = (
        f"<tr><td><code>{escape(name)}</code><td>{escape(_type(field))}"
        f"<td>{_default(name, field, required)}<td>{escape(field.get('description', ''))}"
        for name, field in schema.get("properties", {}).items()
    )
    return f"<table><tr><th>field<th>type<th>default<th>meaning{''.join(rows)}</table>"


def _default(name: str, field: Mapping[str, Any], required: list[str]) -> str:
    if name in required:
        return "required"
    default = field.get("default")
    return "" if default is None else f"<code>{escape(str(default))}</code>"


def _type(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in field:
        kinds = (_type(f) for f in field["anyOf"])
        return " | ".join(k for k in kinds if k != "null")
    kind = str(field.get("type", "any"))
    return f"list of {_type(field['items'])}" if kind == "array" and "items" in field else kind


def _resolve(schema: Mapping[str, Any], api: Mapping[str, Any]) -> Mapping[str, Any]:
    name = schema.get("$ref", "").rsplit("/", 1)[-1]
    found: Mapping[str, Any] = api["components"]["schemas"][name] if name else schema
    return found
