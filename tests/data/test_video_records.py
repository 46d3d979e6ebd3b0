"""Records, shards and folders that name clips: the frames that are read, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neounify.config import ModelConfig
from neounify.config.presets import MOTION, SCENES
from neounify.data.configs import read_data
from neounify.data.draws import GuidanceDropout
from neounify.data.encode import Encoded, Encoder
from neounify.data.preview import preview
from neounify.data.records import RecordRules, sample_from_record, sample_to_record
from neounify.data.sample import ClipFile, ClipReading, DataError, Sample, SampleText
from neounify.data.sources import FileSource
from neounify.model import Image, Noise, Text
from neounify.model.layout import Grid
from neounify.pipeline.videos import read_condition, read_frames
from neounify.tasks.chat import make_chat_request, prompt_of
from neounify.tasks.clips import frame_bounds
from neounify.tasks.program import Processor
from neounify.text import byte_tokenizer, image_prompt
from neounify.text.forms import TEMPLATES
from neounify.text.template import ImageSegment
from support.clips import STEP, clip_bytes, numbered
from support.own_data import png, write_lines, write_tar
from support.pixelumm import SMALL, vision_tokenizer

TOKENIZER = byte_tokenizer()
KEEP = GuidanceDropout(text=0.0, all=0.0)
ASK = "Which way does it go?"


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def question(value: str = f"<video>{ASK}", **fields: Any) -> dict[str, Any]:
    return {"conversations": turns(value, "left"), "video": "a.mp4", **fields}


def film(video: Any = "a.mp4", **fields: Any) -> dict[str, Any]:
    return {"conversations": turns("it goes left", "<video>"), "video": video, **fields}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a clip of 16 numbered frames in two seconds."""
    (tmp_path / "a.mp4").write_bytes(clip_bytes(numbered(16), fps=8))
    return tmp_path


def source_of(folder: Path, *records: Any, **settings: Any) -> FileSource:
    write_lines(folder / "data.jsonl", records)
    source = read_data({"kind": "jsonl", "path": str(folder / "data.jsonl"), **settings}).build()
    assert isinstance(source, FileSource)
    return source


def encoder_of(config: ModelConfig = MOTION, **settings: Any) -> Encoder:
    settings.setdefault("target_pixels", (256, 48 * 32))
    return Encoder(config=config, tokenizer=TOKENIZER, dropout=KEEP, **settings)


def encode(sample: Sample, encoder: Encoder) -> Encoded:
    return encoder(sample, np.random.default_rng(0))


def levels(frames: np.ndarray) -> list[int]:
    """Numbers of the frames, which have a grey each."""
    return [round(float(frame.mean()) / STEP) for frame in frames]


# --- fields ---


def test_marks_stand_for_clips_and_images_in_order() -> None:
    record = {
        "conversations": turns("<video> or <image> or <video>?", "The first."),
        "videos": ["a.mp4", "b.mp4"],
        "image": "c.png",
    }
    sample = sample_from_record(record, Path("data"))
    assert sample.task == "video_qa"
    assert [str(clip.file) for clip in sample.clips if isinstance(clip, ClipFile)] == [
        "data/a.mp4",
        "data/b.mp4",
    ]
    assert sample.turns[0].value == "<video> or <image> or <video>?"
    again = sample_to_record(sample, ["c.png"], ["a.mp4", "b.mp4"])
    assert sample_from_record(again, Path("data")).turns[0].value == sample.turns[0].value


def test_media_without_marks_stand_in_front_as_at_inference() -> None:
    sample = sample_from_record(question(ASK, image="b.png"), Path())
    assert sample.turns[0].value == f"<image>\n<video>{ASK}"


@pytest.mark.parametrize(
    ("record", "task"),
    [
        (question(), "video_qa"),
        (film(), "t2v"),
        ({**film(["a.mp4", "b.mp4"]), "conversations": turns("<video>", "<video>")}, "next_frames"),
        ({"messages": [{"role": "user", "content": "<video>Where?"}], "videos": ["a.mp4"]}, None),
        ({"file_name": "clips/a.MP4", "text": "it goes left"}, "t2v"),
        ({"video": "a.mp4", "caption": "it goes left", "width": 640}, "t2v"),
    ],
)
def test_tasks(record: dict[str, Any], task: str | None) -> None:
    if task is None:
        with pytest.raises(DataError, match="turns must be"):  # no answer
            sample_from_record(record, Path())
        return
    assert sample_from_record(record, Path()).task == task


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video"},
        {"type": "video", "index": 0},
        {"type": "video", "video": "a.mp4"},
        {"type": "video_url", "video_url": {"url": "file://a.mp4"}},
        {"type": "video", "path": "a.mp4"},
    ],
)
def test_parts_of_messages(part: dict[str, Any]) -> None:
    listed = {} if part.keys() - {"type", "index"} else {"videos": ["a.mp4"]}
    content = [part, {"type": "text", "text": ASK}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "left"}]
    sample = sample_from_record({"messages": messages, **listed}, Path())
    assert (sample.task, sample.turns[0].value) == ("video_qa", f"<video>{ASK}")
    (clip,) = sample.clips
    assert isinstance(clip, ClipFile)
    assert (clip.file, clip.role) == (Path("a.mp4"), "input")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (question("<video><video>?"), "2 <video> marks, but 1 clips"),
        ({"conversations": turns("a <video> tag", "b")}, "1 <video> marks, but 0 clips"),
        (question(video=["a.mp4"], videos=["b.mp4"]), 'both "video" and "videos"'),
        (question(video=[""]), '"video" must be a path or a list'),
        (question(video="https://example.org/a.mp4"), "download the clip"),
        (question(video="data:image/png;base64,AA"), "no clip in base64"),
        (question(video=["a.mp4"] * 101), "101 clips, at most 100"),
        (film(["a.mp4"], image="b.png"), "a clip to generate may follow a text"),
        (
            {**film(["a", "b"]), "conversations": turns("x", "<video><video>")},
            "2 clips to generate",
        ),
        (
            {**question(image="b.png"), "conversations": turns("<video>", "<image>")},
            "an image to generate may follow texts and images",
        ),
        ({"file_name": "a.mp4", "text": "see <video>"}, "caption contains <video>"),
        ({"video": "a.mp4", "image": "b.png", "text": "x"}, "may both be the image or clip"),
    ],
)
def test_what_names_no_clip_is_refused(record: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        sample_from_record(record, Path())


# --- frames ---


def test_a_clip_to_generate_has_the_frames_of_its_rate(folder: Path) -> None:
    """The rate of the preset is 8: all 16 frames, of which a document has 8 at most."""
    encoded = encode(source_of(folder, film(), clips={"target_frames": 8})[0], encoder_of())
    assert encoded.task == "t2v"
    wanted = image_prompt(TOKENIZER, "it goes left", system="", think=False)
    assert list(encoded.ids) == wanted.ids([], -1)
    assert encoded.document.spans == (Text(len(encoded.ids)), Noise(2, 3, 2, 1.0))
    assert levels(encoded.targets[0]) == list(range(8))
    with pytest.raises(DataError, match=r"a\.mp4: lasts 2\.0 seconds, 16 frames at 8 a second"):
        encode(source_of(folder, film())[0], encoder_of())


def test_the_rate_of_a_source_moves_tubes_apart(folder: Path) -> None:
    source = source_of(folder, film(), clips={"target_fps": 4, "target_frames": 8})
    encoded = encode(source[0], encoder_of())
    assert levels(encoded.targets[0]) == list(range(0, 16, 2))
    assert encoded.document.spans[1] == Noise(2, 3, 2, 2.0)


@pytest.mark.parametrize("fps", [6, 7.99, 10])
def test_the_clip_before_is_seen_as_inference_sees_it(folder: Path, fps: float) -> None:
    """At rates below and above that of the clip to generate, too."""
    (folder / "c.mp4").write_bytes(clip_bytes(numbered(11), fps=fps))
    record = {**film(["c.mp4", "a.mp4"]), "conversations": turns("<video>Go on.", "<video>")}
    config = MOTION.replace(capabilities=(*MOTION.capabilities, "continue_video"))
    encoded = encode(source_of(folder, record, clips={"target_frames": 8})[0], encoder_of(config))
    frames = read_condition(folder / "c.mp4", config, 8)
    assert levels(np.concatenate(encoded.images)) == levels(np.stack([*map(np.asarray, frames)]))


def test_the_next_frames_follow_the_first_ones_at_one_rate(folder: Path) -> None:
    (folder / "b.mp4").write_bytes(clip_bytes(numbered(20)[10:], fps=8))
    record = {**film(["b.mp4", "b.mp4"]), "conversations": turns("<video>Go on.", "<video>")}
    config = MOTION.replace(capabilities=(*MOTION.capabilities, "continue_video"))
    source = source_of(folder, record, clips={"target_frames": 8})
    encoded = encode(source[0], encoder_of(config))
    assert encoded.task == "next_frames"
    kinds = [type(span) for span in encoded.document.spans]
    assert kinds == [Text, Image, Text, Image, Text, Noise]
    frames = read_condition(folder / "b.mp4", config, 8)
    assert levels(np.concatenate(encoded.images)) == levels(np.stack([*map(np.asarray, frames)]))
    assert levels(encoded.images[0]) == [
        12,
        13,
        14,
        15,
    ]  # without the first two, which fill no tube
    assert levels(encoded.targets[0]) == list(range(10, 18))  # without the last two
    assert "<0.5 seconds>" in TOKENIZER.decode(encoded.ids)


@pytest.mark.parametrize(
    ("frames", "fps", "words"),
    [
        (16, 4, "has 4 frames a second, and 8 are taken .* at least 7.66667"),
        (3, 8, "has 3 frames at 8 a second, fewer than the 4 of a tube"),
    ],
)
def test_clips_too_slow_or_short_to_generate(
    folder: Path, frames: int, fps: int, words: str
) -> None:
    (folder / "a.mp4").write_bytes(clip_bytes(numbered(frames), fps=fps))
    with pytest.raises(DataError, match=f"a.mp4: {words}"):
        encode(source_of(folder, film())[0], encoder_of())


@pytest.mark.parametrize("family", ["neo", "pixelumm"])
@pytest.mark.parametrize("tubes", [False, True])
@pytest.mark.parametrize("mark", ["<video>", "<video>\n", ""])
def test_a_question_is_the_prompt_of_inference(
    folder: Path, tmp_path: Path, family: str, tubes: bool, mark: str
) -> None:
    """Ids, times, sizes and pixels of one file, in training and in `chat(video=…)`."""
    config = SMALL if family == "pixelumm" else MOTION if tubes else SCENES
    tokenizer = TOKENIZER if family == "neo" else vision_tokenizer(tmp_path / "tokenizer")
    (folder / "a.mp4").write_bytes(clip_bytes(numbered(14, 64, 80), fps=8))
    source = source_of(folder, question(f"{mark}{ASK}"), clips={"tubes": tubes})
    encoded = encode(source[0], Encoder(config=config, tokenizer=tokenizer, dropout=KEEP))
    processor = Processor(config, tokenizer, None, torch.float32)
    frames = read_frames(folder / "a.mp4", config, tubes=tubes)
    request = make_chat_request(f"{mark}{ASK}", [], [frames], TEMPLATES[config.template])
    prompt = prompt_of(processor, request)
    wanted = prompt.ids([0] * prompt.n_images, -1)
    assert list(encoded.ids[: len(wanted)]) == wanted
    shown = processor.prepare(request.images, *frame_bounds(config, len(request.images)))
    assert len(encoded.images) == len(shown)
    for ours, theirs in zip(encoded.images, shown, strict=True):
        assert ours.shape[:-1] == (*theirs.shape[:-3], *theirs.shape[-2:])
    assert (encoded.images[0].ndim == 4) == tubes
    height, width = shown[0].shape[-2:]
    grid = Grid.of_pixels(height, width, config.token_size)
    spans = [
        Image.of(grid) if isinstance(part, ImageSegment) else Text(len(part.ids))
        for part in prompt.segments
    ]
    *before, last = encoded.document.spans
    assert [replace(span, tubes=0) if isinstance(span, Image) else span for span in before] == [
        *spans[:-1]
    ]
    assert isinstance(last, Text)  # goes on with the answer
    assert tokenizer.decode(encoded.label_ids) == "left"


def test_questions_read_the_frames_that_the_source_asks_for(folder: Path) -> None:
    source = source_of(folder, question(), clips={"fps": 2, "max_frames": 3})
    encoded = encode(source[0], encoder_of(SCENES))
    assert [levels(image[None])[0] for image in encoded.images] == [0, 8, 15]
    text = TOKENIZER.decode(encoded.ids)
    assert "<0.0 seconds>" in text
    assert "<1.0 seconds>" in text
    assert "<1.9 seconds>" in text


def test_a_model_without_tubes_generates_no_clips(folder: Path) -> None:
    with pytest.raises(DataError, match="no embedding of tubes, and the sample a clip to generate"):
        encode(source_of(folder, film())[0], encoder_of(SCENES))


# --- files ---


def test_clips_lie_below_the_folder(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    source = source_of(inner, question(video="../a.mp4"), question(video="b.mp4"))
    with pytest.raises(DataError, match=r"line 1: the file a\.mp4 lies outside the data folder"):
        _ = source[0]
    with pytest.raises(DataError, match=r"^b\.mp4: no such file"):
        encode(source[1], encoder_of(SCENES))
    elsewhere = source_of(inner, question(), images=str(folder))
    assert len(encode(elsewhere[0], encoder_of(SCENES)).images) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"no video at all" * 9, "not a video, or damaged"),
        (png(), "not a video"),
    ],
)
def test_files_that_are_no_clips(folder: Path, content: bytes, words: str) -> None:
    (folder / "a.mp4").write_bytes(content)
    with pytest.raises(DataError, match=rf"^a\.mp4: {words}") as raised:
        encode(source_of(folder, question())[0], encoder_of(SCENES))
    assert raised.value.reason is not None
    assert "a.mp4" not in raised.value.reason


def test_a_clip_in_the_record(folder: Path) -> None:
    data = base64.b64encode((folder / "a.mp4").read_bytes()).decode()
    source = source_of(folder, question(video=f"data:video/mp4;base64,{data}"))
    assert len(encode(source[0], encoder_of(SCENES)).images) == 2
    damaged = source_of(folder, question(video="data:video/mp4;base64,AAAA"))
    with pytest.raises(DataError, match="the file in the record: not a video"):
        encode(damaged[0], encoder_of(SCENES))


def test_frames_of_all_clips_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neounify.data.media.MAX_SAMPLE_PIXELS", 3 * 32 * 48)
    twice = question("<video><video>", video=["a.mp4", "a.mp4"])
    assert encode(source_of(folder, question())[0], encoder_of(SCENES))
    with pytest.raises(DataError, match="more than 4,608 pixels together"):
        encode(source_of(folder, twice)[0], encoder_of(SCENES))


def test_shards_hold_clips(folder: Path) -> None:
    clip = (folder / "a.mp4").read_bytes()
    listed = {
        "a.json": json.dumps(question(video="mp4")).encode(),
        "a.mp4": clip,
        "b.json": json.dumps(question(video="clips/x.webm")).encode(),
        "clips/x.webm": clip_bytes(numbered(8), format="webm", codec="libvpx", fps=8),
        "c.mp4": clip,
        "c.txt": b"it goes left",
        "d.mp4": clip,
        "d.jpg": png(),
        "d.json": json.dumps({"caption": "it goes left", "fps": 8}).encode(),
        "e.json": json.dumps(question(video="f.mp4")).encode(),
    }
    write_tar(folder / "s.tar", listed)
    source = read_data(
        {"kind": "shards", "path": str(folder / "s.tar"), "clips": {"target_frames": 8}}
    ).build()
    assert isinstance(source, FileSource)
    assert source.size == 5
    samples = [source[n] for n in range(4)]
    assert [sample.task for sample in samples] == ["video_qa", "video_qa", "t2v", "t2v"]
    documents = [encode(sample, encoder_of()) for sample in samples]
    assert [len(d.images) + len(d.targets) for d in documents] == [16, 8, 1, 1]
    with pytest.raises(DataError, match=r"s\.tar, e: the file 'f\.mp4' is not in the shard"):
        _ = source[4]


def test_a_folder_of_clips_with_captions(folder: Path) -> None:
    (folder / "a.txt").write_text("it goes left")
    (folder / "b.png").write_bytes(png())
    (folder / "b.txt").write_text("a wall")
    source = read_data({"kind": "captions", "path": str(folder)}).build()
    assert [source[n].task for n in (0, 1)] == ["t2v", "t2i"]


def test_a_table_of_clips_in_cells(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    clip = (folder / "a.mp4").read_bytes()
    rows = {"video": [{"bytes": clip, "path": None}], "caption": ["it goes left"]}
    file = io.BytesIO()
    pq.write_table(pa.table(rows), file)
    (folder / "t.parquet").write_bytes(file.getvalue())
    source = read_data(
        {
            "kind": "parquet",
            "path": str(folder / "t.parquet"),
            "clips": {"target_frames": 8},
        }
    ).build()
    assert levels(encode(source[0], encoder_of()).targets[0]) == list(range(8))


def test_a_preview_skips_and_names_what_cannot_be_read(folder: Path) -> None:
    source = source_of(folder, question(), question(video="b.mp4"), film())
    *_, result = preview(source, encoder_of(), 3, 3)
    assert [shown.task for shown in result.shown] == ["video_qa"]
    assert [skipped.message for skipped in result.skipped] == [
        "data.jsonl, line 2: b.mp4: no such file",
        "data.jsonl, line 3: a.mp4: lasts 2.0 seconds, 16 frames at 8 a second, and a clip to "
        "generate has at most 8; cut it, or take its first frames (target_frames)",
    ]


def test_rules_of_a_source_reach_its_clips() -> None:
    reading = ClipReading(fps=2.0)
    (clip,) = sample_from_record(question(), Path(), RecordRules(clips=reading)).clips
    assert isinstance(clip, ClipFile)
    assert clip.reading == reading
    with pytest.raises(ValueError, match=r"clips\.fps"):
        read_data({"kind": "jsonl", "path": "x", "clips": {"fps": 0}})


def test_a_text_with_a_mark_is_no_text() -> None:
    with pytest.raises(DataError, match="use a SampleClip there"):
        SampleText("a <video> tag")
