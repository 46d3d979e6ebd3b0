"""`chat`: one question, and conversations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import neounify
from neounify.cli.display import printable
from neounify.pipeline import Pipeline
from support.clips import clip_bytes, numbered

SHORT = ("--max-new-tokens", "6", "--device", "cpu")


@pytest.fixture(scope="module")
def pipe(toy: Path) -> Pipeline:
    return neounify.load(toy, device="cpu")


def test_an_answer_on_stdout(run: Callable[..., Any], pipe: Pipeline, image_file: Path) -> None:
    ran = run("chat", "what is it?", "--image", image_file, *SHORT)
    want = pipe.chat("what is it?", image_file, max_new_tokens=6).text
    assert ran.code == 0
    assert ran.out == f"{want}\n"
    assert "cut off after 6 tokens" in ran.err


def test_an_answer_as_json(run: Callable[..., Any], pipe: Pipeline) -> None:
    ran = run("chat", "who?", *SHORT, "--temperature", 1, "--seed", 3, "--json", "-q")
    want = pipe.chat("who?", max_new_tokens=6, temperature=1.0, seed=3)
    assert ran.json["answer"] == want.text
    assert ran.json["answer_tokens"] == len(want.token_ids)
    assert ran.json["settings"]["seed"] == 3


def test_a_conversation_remembers(
    run: Callable[..., Any], pipe: Pipeline, image_file: Path
) -> None:
    lines = f"/image {image_file}\nwhat is it?\n\nand why?\n/save talk.json\n/exit\nnever read\n"
    ran = run("chat", *SHORT, input=lines)
    assert ran.code == 0
    first = pipe.chat("what is it?", image_file, max_new_tokens=6).text
    second = pipe.chat(
        [
            {"role": "user", "content": "<image>\nwhat is it?"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "and why?"},
        ],
        image_file,
        max_new_tokens=6,
    ).text
    saved = json.loads(Path("talk.json").read_text(encoding="utf-8"))
    answers = [m["content"] for m in saved["messages"] if m["role"] == "assistant"]
    assert answers == [first, second]
    assert ran.out == f"{first}\n{second}\n"
    # What was saved can be asked again.
    assert pipe.chat(saved["messages"][:1], saved["images"], max_new_tokens=6).text == first


def test_a_conversation_survives_mistakes(run: Callable[..., Any]) -> None:
    ran = run("chat", *SHORT, input="/image nowhere.png\n/fly\n/help\n/clear\nhow <image>?\nhi\n")
    assert ran.code == 0
    assert "nowhere.png: no such file" in ran.err
    assert "/fly is no command" in ran.err
    assert "/image FILE" in ran.err
    assert "1 <image> marks for 0 images" in ran.err
    assert len(ran.out.splitlines()) >= 1


def test_saving_twice_overwrites_nothing(run: Callable[..., Any]) -> None:
    run("chat", *SHORT, "-o", "talks", input="hi\n/save\n/save\n")
    assert sorted(p.name for p in Path("talks").iterdir()) == ["chat-2.json", "chat.json"]


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[31mb\x07c\n\td é 湖") == "a\ufffd[31mb\ufffdc\n\td é 湖"


def test_a_question_about_a_clip(
    run: Callable[..., Any], pipe: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(clip_bytes(numbered(20), sound=True))
    ran = run("chat", "what moves?", "--video", clip, "--fps", 5, "--max-frames", 4, *SHORT)
    assert caplog.messages == [f"{clip}: its sound is not heard"]
    want = pipe.chat("what moves?", video=clip, fps=5, max_frames=4, max_new_tokens=6).text
    assert ran.code == 0, ran.err
    assert ran.out == f"{want}\n"
    assert "clip.mp4: 4 of 20 frames, 2.0 s" in ran.err


def test_options_of_clips_need_a_clip(run: Callable[..., Any]) -> None:
    assert "need --video FILE" in run("chat", "what?", "--fps", 1, *SHORT).err
    both = run("chat", "--input", "x.jsonl", "--video", "clip.mp4", *SHORT)
    assert "files on the command line or --input, not both" in both.err
    assert "clip.mp4: no such file" in run("chat", "what?", "--video", "clip.mp4", *SHORT).err


def test_clips_in_a_conversation(run: Callable[..., Any], pipe: Pipeline, tmp_path: Path) -> None:
    first, second = tmp_path / "first.mp4", tmp_path / "second.mp4"
    first.write_bytes(clip_bytes(numbered(20)))
    second.write_bytes(clip_bytes(numbered(9)[::-1]))
    lines = f"what moves?\n/video '{second}'\nand <video> now?\n/save talk.json\n/exit\n"
    options = ("--fps", 2, "--max-frames", 3, *SHORT)
    ran = run("chat", "--video", first, *options, input=lines)
    assert ran.code == 0, ran.err
    asked: dict[str, Any] = {"fps": 2, "max_frames": 3, "max_new_tokens": 6}
    answer = pipe.chat("what moves?", video=first, **asked).text
    history = [
        {"role": "user", "content": "<video>what moves?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "and <video> now?"},
    ]
    later = pipe.chat(history, video=[first, second], **asked).text
    assert ran.out == f"{answer}\n{later}\n"
    assert "second.mp4: 2 of 9 frames, 0.9 s" in ran.err
    saved = json.loads(Path("talk.json").read_text(encoding="utf-8"))
    assert saved["messages"][:3] == history
    assert saved["video"] == [str(first), str(second)]


def test_a_conversation_survives_clips_that_cannot_be_read(run: Callable[..., Any]) -> None:
    ran = run("chat", *SHORT, input="/video nowhere.mp4\nwhat <video>?\nhi\n")
    assert ran.code == 0
    assert "nowhere.mp4: no such file" in ran.err
    assert "1 <video> marks for 0 clips" in ran.err
    assert len(ran.out.splitlines()) >= 1
