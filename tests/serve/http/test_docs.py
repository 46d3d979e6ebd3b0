"""docs/serving-api.md: its Python runs, and it names every route, field and metric."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from neounify.serve.http import create_app
from neounify.serve.http.chat_schema import ChatBody
from neounify.serve.http.completions import CompletionBody
from neounify.serve.http.images import ImageBody
from neounify.serve.run import COUNTERS, GAUGES
from support.clips import clip_bytes, numbered
from support.http_server import png, running, to_image
from support.scripted_service import Scripted

PAGE = (Path(__file__).parents[3] / "docs" / "serving-api.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shapes.png").write_bytes(png())
    Path("clip.mp4").write_bytes(clip_bytes(numbered(4)))
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    with running(create_app(Scripted())) as url:
        exec(code.replace("http://127.0.0.1:8000", url) + "\nclient.close()", {})
    assert to_image(Path("circle.png").read_bytes()).size == (64, 64)
    printed = capsys.readouterr().out.split("\n")
    assert printed[:2] == ["You said: <image>", "What colour is the star?"]
    assert printed.count("image_generation.partial_image") == 2


def test_every_route_and_field_is_named() -> None:
    routes = create_app(Scripted()).openapi()["paths"]
    assert len(routes) >= 9
    table = PAGE[: PAGE.index("If the server has keys")]
    for route in routes:
        assert re.sub(r"{video_id}", "ID", re.sub(r"{name(:path)?}", "NAME", route)) in table
    bodies = (ChatBody, CompletionBody, ImageBody)
    for name in {name for body in bodies for name in body.model_fields}:
        assert re.search(rf"\b{name}\b", PAGE), name


def test_every_metric_is_named() -> None:
    metrics = [*(f"neounify_{name}" for name in GAUGES), *(f"neounify_{n}_total" for n in COUNTERS)]
    assert [name for name in metrics if f"`{name}`" not in PAGE] == []
