"""Requests that mean to cost a server memory or time: (path, content type, body) by name."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from typing import Any

from serve.http.hostile_clips import clips, video_bodies
from serve.http.hostile_images import large_files, png, saved, small_files
from support.http_server import png as plain_png

Sent = tuple[str, str, bytes]
CHAT, EDITS, GENERATIONS = "/v1/chat/completions", "/v1/images/edits", "/v1/images/generations"
VIDEOS, JSON = "/v1/videos", "application/json"
_BOUNDARY = "xxBOUNDARYxx"
_FORM = f"multipart/form-data; boundary={_BOUNDARY}"
K, M = 1000, 1000 * 1000
__all__ = ["large_requests", "small_clips", "small_requests"]


def chat(content: Any, **fields: Any) -> Sent:
    """A chat completion of one token."""
    messages = [{"role": "user", "content": content}]
    return CHAT, JSON, json.dumps({"messages": messages, "max_tokens": 1} | fields).encode()


def raw_chat(start: bytes) -> Sent:
    """A chat completion with something in front of its messages."""
    return CHAT, JSON, b"{" + start + b', "messages": [{"role": "user", "content": "x"}]}'


def looking(files: Sequence[bytes]) -> Sent:
    """A question about images."""
    urls = ["data:image/png;base64," + base64.b64encode(file).decode() for file in files]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return chat([*parts, {"type": "text", "text": "?"}])


def watching(files: Sequence[bytes], **fields: Any) -> Sent:
    """A question about clips."""
    urls = ["data:video/mp4;base64," + base64.b64encode(file).decode() for file in files]
    return watching_at(urls, **fields)


def watching_at(urls: Sequence[str], **fields: Any) -> Sent:
    parts = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    return chat([*parts, {"type": "text", "text": "?"}], **fields)


def form(*parts: tuple[str, bytes]) -> Sent:
    """A multipart form of (headers behind "form-data; ", content)."""
    body = b"".join(
        f"--{_BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n"
        for head, data in parts
    )
    return EDITS, _FORM, body + f"--{_BOUNDARY}--\r\n".encode()


def editing(file: bytes) -> Sent:
    """An edit of a file in one step."""
    image = ('name="image"; filename="a"', file)
    return form(('name="prompt"', b"x"), ('name="steps"', b"1"), ('name="size"', b"64x64"), image)


def field(name: str, data: bytes = b"x") -> tuple[str, bytes]:
    return f'name="{name}"', data


def _deep(count: int) -> Any:
    value: Any = {"type": "string"}
    for _ in range(count):
        value = {"type": "object", "properties": {"a": value}}
    return value


def _tool(number: int) -> dict[str, Any]:
    schema = {"type": "object", "properties": {f"a{number}": {"type": "string"}}}
    return {"type": "function", "function": {"name": f"f{number}", "parameters": schema}}


def _schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


def small_requests() -> Iterator[tuple[str, Sent]]:
    """Requests of less than a megabyte each."""
    yield from _small_images()
    yield from _small_json()
    yield from _small_texts()
    yield from _small_forms()
    yield from small_clips()


def small_clips() -> Iterator[tuple[str, Sent]]:
    """Questions about clips, and videos to generate."""
    files = clips()
    for name, file in files.items():
        yield name, watching([file])
    yield "4 gifs of 8 times 9 MP", watching([files["a gif of 8 times 9 MP"]] * 4)
    yield "5 clips", watching([files["half a clip"]] * 5)
    for url in (
        "http://127.0.0.1:9/a.mp4",
        "file:///dev/zero",
        "data:video/mp4," + "%41" * 200 * K,
    ):
        yield f"a clip at {url[:16]}", watching_at([url])
    kwargs = {"video": {"fps": 1e308, "num_frames": 10**9}}
    yield "frames without end", watching([files["4 billion times"]], media_io_kwargs=kwargs)
    yield "a form of a clip", editing(files["a gif of 8 times 9 MP"])
    for name, fields in video_bodies():
        yield name, (VIDEOS, JSON, json.dumps(fields).encode())


def _small_images() -> Iterator[tuple[str, Sent]]:
    files = small_files()
    for name, file in files.items():
        yield name, looking([file]) if len(file) < 600 * K else editing(file)
    bit, palette = files["png of 50 MP, one bit"], files["png of 50 MP, palette"]
    yield "16 pngs of 50 MP, one bit", looking([bit] * 16)
    yield "8 pngs of 50 MP, palette", looking([palette] * 8)
    yield "16 pngs of 6 MP, one bit", looking([png((2500, 2500))] * 16)
    yield "17 images", looking([plain_png()] * 17)
    yield "16 copies of one WebP", looking([files["webp of 12 MP"]] * 16)
    yield "an edit of 49 MP", editing(files["png of 49 MP, grey 16"])


def _small_json() -> Iterator[tuple[str, Sent]]:
    yield "100k zeros", raw_chat(b'"a": [' + b"0," * 100 * K + b"0]")
    yield "400k zeros", raw_chat(b'"a": [' + b"0," * 400 * K + b"0]")
    yield "300k empty lists", raw_chat(b'"a": [' + b"[]," * 300 * K + b"0]")
    yield "90k unknown keys", raw_chat(b",".join(b'"k%d":1' % n for n in range(90 * K)))
    yield "19k unknown keys", raw_chat(b",".join(b'"k%d":1' % n for n in range(19 * K)))
    yield "19k wrong messages", (CHAT, JSON, b'{"messages": [' + b"1," * 19 * K + b"1]}")
    yield (
        "a thousand wrong messages",
        chat("x", messages=[{"role": "x", "content": [{}] * 40}] * 990),
    )
    yield "900k open lists", raw_chat(b'"a": ' + b"[" * 900 * K)
    yield "100k open objects", raw_chat(b'"a":{' * 100 * K)
    yield "an integer of 900k digits", raw_chat(b'"seed": ' + b"9" * 900 * K)
    yield "a fraction of 900k digits", raw_chat(b'"temperature": 0.' + b"9" * 900 * K)
    yield "40k integers of 20 digits", raw_chat(b'"a": [' + b",".join([b"9" * 20] * 40 * K) + b"]")
    yield "a key of 900k characters", raw_chat(b'"' + b"k" * 900 * K + b'": 1')
    yield "a model of 900k characters", chat("x", model="m" * 900 * K)
    yield "a bias of all tokens", chat("x", logit_bias={str(n): 1 for n in range(19 * K)})
    for name, text in {
        "an image of spaces": "![a](data:image/" + " " * 150 * K,
        "images of spaces": ("![](" + " " * 200) * 500,
        "images of results": ("![](/v1/results/" + "a" * 400) * 300,
    }.items():
        turns = [{"role": "assistant", "content": text}, {"role": "user", "content": "x"}]
        yield f"an answer with {name}", chat("x", messages=turns)
    yield "many roles", chat("x", messages=[{"role": "system", "content": "x"}] * 1000)
    yield "1001 messages", chat("x", messages=[{"role": "user", "content": "x"}] * 1001)
    yield "1000 parts", chat([{"type": "text", "text": "x"}] * 1000)


def _small_texts() -> Iterator[tuple[str, Sent]]:
    yield "900k characters", chat("x" * 900 * K)
    yield "100k spaces", chat(" " * 100 * K)
    yield "100k letters", chat("a" * 100 * K)
    yield "96k signs", chat(".,;:" * 24 * K)
    yield "75k emoji", chat("\U0001f600" * 75 * K)
    yield "99k accents on one letter", chat("a" + "\u0301" * 99 * K)
    yield "12k image marks", chat("<image>" * 12 * K)
    yield "9k special tokens", chat("<|im_end|>" * 9 * K)
    yield "17 stops", chat("x", stop=["a"] * 17)
    yield "long stops", chat("x", stop=["a" * 1000] * 16)
    yield "1000 tools", chat("x", tools=[_tool(n) for n in range(1000)])
    yield "a deep schema", chat("x", response_format=_schema(_deep(25)))
    yield (
        "a wide schema",
        chat("x", response_format=_schema({"enum": [f"v{n}" for n in range(20 * K)]})),
    )
    yield (
        "a slow pattern",
        chat("x", response_format=_schema({"type": "string", "pattern": "(a|a)*" * 2000 + "$"})),
    )
    yield (
        "a schema of many repeats",
        chat(
            "x", response_format=_schema({"type": "string", "minLength": 10**9, "maxLength": 10**9})
        ),
    )
    yield (
        "a negative prompt of 900k",
        (
            GENERATIONS,
            JSON,
            json.dumps({"prompt": "x", "steps": 1, "negative_prompt": "y " * 450 * K}).encode(),
        ),
    )
    yield (
        "a prompt of 100k words",
        (GENERATIONS, JSON, json.dumps({"prompt": "red circle " * 9 * K, "steps": 1}).encode()),
    )
    yield (
        "2048 pixels a side",
        (GENERATIONS, JSON, b'{"prompt": "x", "steps": 1, "size": "2048x2048"}'),
    )
    yield (
        "a sliver of an image",
        (GENERATIONS, JSON, b'{"prompt": "x", "steps": 1, "size": "999999x32"}'),
    )


def _small_forms() -> Iterator[tuple[str, Sent]]:
    yield "a form of 1000 fields", form(*[field(f"f{n}") for n in range(1000)])
    yield "a form of 60 unknown fields", form(*[field(f"f{n}") for n in range(60)], field("prompt"))
    yield "a form of 900k in one field", form(field("prompt", b"x" * 900 * K))
    yield "a form of 20 files", form(*[('name="image"; filename="a"', plain_png())] * 20)
    yield "a form with long headers", form((f'name="{"a" * 900 * K}"', b"x"))
    yield "a form with many parameters", form(('name="a"' + "; a=b" * 150 * K, b"x"))
    yield "a form of line ends", form(('name="image"; filename="a"', b"\r\n" * 450 * K))
    yield (
        "a form of near boundaries",
        form(('name="image"; filename="a"', f"\r\n--{_BOUNDARY[:-1]}".encode() * 40 * K)),
    )
    yield "a form without an end", (EDITS, _FORM, b"\r\n" * 450 * K)
    yield "a boundary of 30k", (EDITS, f"multipart/form-data; boundary={'b' * 30 * K}", b"x" * K)
    yield "text for JSON", (CHAT, "text/plain", b"x" * 900 * K)


def large_requests() -> Iterator[tuple[str, Sent]]:
    """Requests of up to the limit of a body, 64 MiB."""
    size = 60 * M
    for name, file in large_files().items():
        yield f"{name}, in JSON", looking([file])
    files = large_files()
    for name in ("png of 14 MP, not packed", "jpeg of fill bytes", "no image at all"):
        yield f"{name}, in a form", editing(files[name])
    noise = saved(files_image(), "JPEG", quality=98)
    yield "16 large photos", looking([noise] * min(16, size * 3 // 4 // len(noise)))
    yield "30M zeros", raw_chat(b'"a": [' + b"0," * (30 * M) + b"0]")
    yield "a million unknown keys", raw_chat(b",".join(b'"k%d":1' % n for n in range(M)))
    yield "60M open lists", raw_chat(b'"a": ' + b"[" * size)
    yield "an integer of 60M digits", raw_chat(b'"seed": ' + b"9" * size)
    yield "a prompt of 60M letters", raw_chat(b'"model": "' + b"x" * size + b'"')
    yield "a prompt of 10M escapes", raw_chat(b'"model": "' + b"\\u0041" * (10 * M) + b'"')
    yield "a prompt of 15M emoji", raw_chat(b'"model": "' + "\U0001f600".encode() * (15 * M) + b'"')
    yield "60M spaces", raw_chat(b'"n": 1' + b" " * size)
    yield "a URL of 20M percent signs", url(b"%41" * (20 * M))
    yield "a URL of white space", url(b" " * size)
    yield "a URL that is no base64", url(b"*" * size)
    yield "a URL with one emoji", url(b"A" * size + "\U0001f600".encode())
    yield "a form of 60M in one field", form(field("prompt", b"x" * size))
    yield "a form of line ends", form(('name="image"; filename="a"', b"\r\n" * (size // 2)))
    yield "a body over the limit", (CHAT, JSON, bytes(70 * M))


def url(content: bytes) -> Sent:
    """A question about the image behind a data URL."""
    part = b'{"type": "image_url", "image_url": {"url": "data:image/png;base64,' + content + b'"}}'
    return CHAT, JSON, b'{"messages": [{"role": "user", "content": [' + part + b"]}]}"


def files_image() -> Any:
    """A photo-like image of 9 million pixels."""
    from PIL import Image

    return Image.effect_noise((3000, 3000), 60).convert("RGB")
