"""Rewards: their kinds, their combination, and samples that have none."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neounify.bundled import bundled_model
from neounify.errors import ConfigError
from neounify.post_train.prompts import PromptCase, PromptConfig, build_prompts
from neounify.post_train.reward_kinds import Output, png_base64, text_similarity
from neounify.post_train.rewards import RewardConfig, Rewarded, RewardFailure, Rewards, build_reward
from neounify.scenes.bench.perceive import perceive
from neounify.scenes.world.facts import FULL_STYLE, CaptionStyle, facts_of
from neounify.scenes.world.language import caption
from neounify.scenes.world.render import render
from neounify.scenes.world.scene import scene_config
from neounify.train.recipe import read_recipe

BLACK = np.zeros((64, 64, 3), np.uint8)
CASE = PromptCase(prompt="a red circle", width=64, height=64, record={"text": "Open now"})


def program(name: str, **options: Any) -> RewardConfig:
    return RewardConfig(kind="program", name=f"support.rewards:{name}", **options)


def rewarded_by(
    rewards: Rewards, outputs: Sequence[Output], cases: Sequence[PromptCase]
) -> Rewarded:
    """The rewards of a batch, checked as an iteration of training checks them."""
    rewarded = rewards.measure(outputs, cases)
    rewards.check(rewarded)
    return rewarded


# --- scenes ---


def test_scenes_reward_what_the_benchmark_accepts() -> None:
    world = scene_config("default")
    prompts = build_prompts(PromptConfig(categories={"edit": 1.0}), (64, 64), 32)
    reward = build_reward(RewardConfig())
    for number in range(6):
        case = prompts.case(number)
        edited = np.asarray(render(case.target.target, world, 64))
        done, untouched, black = reward([edited, np.asarray(case.images[0]), BLACK], [case] * 3)
        assert done == {"strict": 1.0, "achieved": 1.0, "unchanged": 1.0, "total": 1.0}
        assert untouched["strict"] == 0
        assert black["total"] == min(black["achieved"], black["unchanged"]) < 1


def test_an_edits_reward_is_the_least_of_its_parts() -> None:
    """The target reached, with a grey veil over the rest: 27 dB of the 30 that are asked for."""
    world = scene_config("default")
    prompts = build_prompts(PromptConfig(categories={"edit": 1.0}), (64, 64), 32)
    case = next(c for c in map(prompts.case, range(20)) if c.target.kind == "recolour")
    edited = np.asarray(render(case.target.target, world, 64)).astype(int)
    veiled = np.clip(edited + np.where(edited < 128, 11, -11), 0, 255).astype(np.uint8)
    rewarded = rewarded_by(Rewards([RewardConfig()]), [veiled], [case])
    parts = {name: float(values[0]) for name, values in rewarded.parts.items()}
    assert parts["strict"] == 0
    assert (
        rewarded.total[0] == pytest.approx(parts["unchanged"]) == pytest.approx(27.3 / 30, abs=0.02)
    )


def test_scenes_split_a_painting_by_attribute() -> None:
    prompts = build_prompts(PromptConfig(categories={"attribution": 1.0}), (64, 64), 32)
    case = prompts.case(0)
    [parts] = build_reward(RewardConfig())([BLACK], [case])
    assert parts["strict"] == 0
    assert 0 <= parts["share"] < 1


def test_scenes_reward_answers_and_captions() -> None:
    world = scene_config("default")
    names = [f"question/{kind}" for kind in ("where", "relation", "count", "exists", "size")]
    reward = build_reward(RewardConfig())
    for name in names:
        prompts = build_prompts(PromptConfig(categories={name: 1.0}), (64, 64), 32, answers=True)
        for number in range(4):
            case = prompts.case(number)
            assert case.category == name
            assert perceive(np.asarray(case.images[0]), world).objects is not None
            right = case.target.question.answer
            rows = reward([f"It is {right}.", "hm"], [case] * 2)
            assert rows == [{"strict": 1.0}, {"strict": 0.0}]
    prompts = build_prompts(PromptConfig(categories={"caption": 1.0}), (64, 64), 32, answers=True)
    case = prompts.case(0)
    facts = facts_of(case.target.scene, world, FULL_STYLE)
    right, nonsense = reward([caption(facts), "hm"], [case] * 2)
    assert right == {"strict": 1.0, "share": 1.0}
    assert nonsense == {"strict": 0.0, "share": 0.0}
    part, *_ = reward([caption(facts_of(case.target.scene, world, CaptionStyle()))], [case])
    assert part["strict"] == 0
    assert 0 < part["share"] < 1


def test_answers_of_a_file() -> None:
    case = PromptCase(prompt="Who?", width=64, height=64, record={"answer": "Ada Lovelace"})
    rewards = Rewards([RewardConfig(kind="answer")])
    rewarded = rewarded_by(rewards, ["ada  lovelace.", "Ada Lovelice"], [case] * 2)
    assert rewarded.parts["strict"].tolist() == [1.0, 0.0]
    assert rewarded.parts["share"].tolist() == [1.0, pytest.approx(10 / 11)]


# --- combination ---


def test_rewards_of_one_kind_have_parts_with_their_number() -> None:
    two = [program("brightness"), program("brightness", weight=2.0), RewardConfig(kind="answer")]
    rewards = Rewards(two, max_failed=1.0)
    assert rewards.labels == ["program-1", "program-2", "answer"]
    rewarded = rewarded_by(rewards, [255 - BLACK, BLACK], [CASE, CASE])
    expected = {f"program-{n}/{part}" for n in (1, 2) for part in ("bright", "dark")}
    assert set(rewarded.parts) == expected
    assert rewarded.failures[0].startswith("answer reward of ")


def test_a_program_in_the_folder_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_reward_helper.py").write_text("LEVEL = 0.25\n")
    (tmp_path / "own_reward.py").write_text(
        "from own_reward_helper import LEVEL\n\n"
        "def level(outputs, cases):\n    return [{'level': LEVEL} for _ in outputs]\n"
    )
    (tmp_path / "symtable.py").write_text("raise RuntimeError('not the library')\n")
    config = RewardConfig(kind="program", name="own_reward:level")
    with pytest.raises(ConfigError, match="own_reward:level: cannot be imported"):
        Rewards([config])
    before = list(sys.path)
    rewarded = rewarded_by(Rewards([config], folder=tmp_path), [BLACK], [CASE])
    assert rewarded.total.tolist() == [0.25]
    assert sys.path == before
    library = RewardConfig(kind="program", name="symtable:symtable")
    monkeypatch.delitem(sys.modules, "symtable", raising=False)
    assert Rewards([library], folder=tmp_path).rewards[0] is sys.modules["symtable"].symtable
    assert str(tmp_path) not in str(sys.modules["symtable"].__file__)


def test_a_recipe_knows_the_folder_of_its_file(tmp_path: Path) -> None:
    text = 'name = "a"\nmodel = { preset = "scenes" }\nstages = [{ name = "b", steps = 1 }]\n'
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    assert read_recipe(file).folder == tmp_path
    file.write_text('folder = "/tmp"\n' + text)
    with pytest.raises(ConfigError, match="folder is not a field of a recipe"):
        read_recipe(file)


def test_weights_of_a_part_that_does_not_exist() -> None:
    with pytest.raises(RewardFailure, match="weights name sharp, its parts are bright, dark"):
        rewarded_by(
            Rewards([program("brightness", weights={"bright": 1.0, "sharp": 1.0})]), [BLACK], [CASE]
        )


def test_weights_and_minimum() -> None:
    white = np.full_like(BLACK, 255)
    images, cases = [BLACK, white], [CASE, CASE]
    assert rewarded_by(Rewards([program("brightness")]), images, cases).total.tolist() == [
        0.25,
        0.75,
    ]
    weighted = program("brightness", weights={"bright": 3.0, "dark": 1.0})
    assert rewarded_by(Rewards([weighted]), images, cases).total.tolist() == [0.125, 0.875]
    least = program("brightness", minimum=True)
    assert rewarded_by(Rewards([least]), images, cases).total.tolist() == [0.0, 0.5]
    two = Rewards([program("brightness", weight=3.0), program("fails_on_black")], max_failed=1.0)
    rewarded = rewarded_by(two, images, cases)
    assert np.isnan(rewarded.total[0])
    assert rewarded.total[1] == pytest.approx((3 * 0.75 + 1) / 4)
    assert set(rewarded.parts) == {"program-1/bright", "program-1/dark", "program-2/light"}


# --- samples without a reward ---


def test_an_error_costs_one_sample() -> None:
    rewards = Rewards([program("fails_on_black")], max_failed=0.5)
    white = np.full_like(BLACK, 255)
    rewarded = rewarded_by(rewards, [white, BLACK, white], [CASE] * 3)
    assert np.isnan(rewarded.total).tolist() == [False, True, False]
    assert rewards.failed == 1
    assert "no light" in rewarded.failures[0]
    with pytest.raises(RewardFailure, match="2 of 3 images have no reward"):
        rewarded_by(rewards, [BLACK, BLACK, white], [CASE] * 3)


def test_values_that_are_no_rewards() -> None:
    rewarded = rewarded_by(
        Rewards([program("out_of_range")], max_failed=0.9), [BLACK] * 6, [CASE] * 6
    )
    assert np.isnan(rewarded.total).tolist() == [True] * 5 + [False]
    expected = ("got 1.5", "got nan", "no number: much", "named parts", "got good")
    for message, part in zip(rewarded.failures, expected, strict=True):
        assert part in message


def test_a_program_that_takes_too_long() -> None:
    rewards = Rewards([program("sleeps", timeout=0.05)], max_failed=1.0)
    started = time.monotonic()
    rewarded = rewarded_by(rewards, [BLACK], [CASE])
    assert time.monotonic() - started < 0.9
    assert np.isnan(rewarded.total).all()
    assert "no result after 0.05 s" in rewarded.failures[0]


# --- services, judges, readers ---


class _Service(BaseHTTPRequestHandler):
    """Rewards by the length of the prompt; the first request is refused with 503."""

    requests = 0
    received: Mapping[str, Any] = {}

    def do_POST(self) -> None:
        cls = type(self)
        cls.requests += 1
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if cls.requests == 1:
            self.send_error(503)
            return
        items = json.loads(body)["items"]
        cls.received = items[0]
        answer = json.dumps({"rewards": [{"length": len(i["prompt"]) / 100} for i in items]})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_: Any) -> None:
        """Keep the output of tests clean."""


@pytest.fixture
def service() -> Iterator[str]:
    _Service.requests = 0
    server = HTTPServer(("127.0.0.1", 0), _Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/reward"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_service_is_tried_again(service: str) -> None:
    reward = build_reward(RewardConfig(kind="http", url=service, timeout=5.0, retries=1))
    assert reward([BLACK, BLACK], [CASE, CASE]) == [{"length": 0.12}] * 2
    assert _Service.requests == 2
    assert _Service.received["record"] == {"text": "Open now"}
    assert "image" in _Service.received
    reward(["an answer"], [CASE])
    assert _Service.received["text"] == "an answer"
    assert "image" not in _Service.received
    with pytest.raises(RewardFailure, match="have no reward"):
        rewarded_by(
            Rewards([RewardConfig(kind="http", url="http://127.0.0.1:9/", retries=0)]),
            [BLACK],
            [CASE],
        )


def test_a_reader_and_text_similarity() -> None:
    reward = build_reward(RewardConfig(kind="ocr", reader="support.rewards:reads_open"))
    [parts] = reward([BLACK], [CASE])
    assert parts["text"] == pytest.approx(1 - 1 / 7)
    assert text_similarity("", "abc") == 0
    assert text_similarity("ABC ", "a bc") == 1
    assert text_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)


def test_a_model_as_judge() -> None:
    question = "Is there a circle in the image?"
    config = RewardConfig(kind="judge", checkpoint=str(bundled_model()), question=question)
    world = scene_config("default")
    prompts = build_prompts(PromptConfig(categories={"edit": 1.0}), (64, 64), 32)
    images = [render(prompts.case(n).target.source, world, 64) for n in range(4)]
    rows = build_reward(config)(images, [CASE] * 4)
    assert all(row["yes"] in (0.0, 1.0) for row in rows)
    with pytest.raises(ConfigError, match="question may hold"):
        build_reward(RewardConfig(kind="judge", checkpoint="x", question="{who}?"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "http"}, "needs url"),
        ({"kind": "http", "url": "file:///etc/passwd"}, "must begin with http"),
        ({"kind": "program"}, "needs name"),
        ({"weight": 0.0}, "weight"),
    ],
)
def test_configs_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**options)


def test_programs_that_cannot_be_loaded() -> None:
    for name, message in (
        ("nothing:here", "cannot be imported"),
        ("support.rewards:LEVELS", "is a callable"),
        ("no name", "does not name a reward"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_reward(RewardConfig(kind="program", name=name))


def test_a_service_that_is_down_is_asked_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(request: Any, **_: Any) -> Any:
        asked.append(request.full_url)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    config = RewardConfig(kind="http", url="http://127.0.0.1:9/", retries=0, batch=4)
    with pytest.raises(RewardFailure, match=r"8 of 8 images have no reward.*refused.*1 times"):
        rewarded_by(Rewards([config]), [BLACK] * 8, [CASE] * 8)
    assert len(asked) == 2


def test_images_reach_a_service_aspng_base64(tmp_path: Path) -> None:

    image = Image.open(io.BytesIO(base64.b64decode(png_base64(BLACK))))
    assert image.format == "PNG"
    assert image.size == (64, 64)
