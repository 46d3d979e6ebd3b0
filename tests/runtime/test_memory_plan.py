"""The memory plan against the figures of the specification and the sizes of real models."""

from __future__ import annotations

from dataclasses import replace

import pytest

from neounify.attention import copied_tokens
from neounify.attention.backends import MAX_PREFIX
from neounify.checkpoint.load import expected_shapes
from neounify.checkpoint.names import stream_of
from neounify.config import ModelConfig, VideoConfig
from neounify.config.presets import BENCH, PIXELUMM_8B, SCENES, TINY, U1_8B, U1_A3B
from neounify.errors import RequestError
from neounify.runtime import memory_plan
from neounify.runtime.memory_plan import Task, weight_bytes, working_bytes
from neounify.tasks.clips import clip_question

PAINT = Task()
GUIDED_EDIT = Task(kind="edit", branches=2, references=1, reference_tokens=4096)


# --- sizes ---


@pytest.mark.parametrize(
    "config",
    [
        BENCH,
        TINY,
        SCENES,
        U1_8B.replace(num_layers=2, attention_bias=True),
        U1_A3B.replace(
            num_layers=1,
            und_mlp=replace(U1_A3B.und_mlp, sparse=(True,), num_experts=9),
            gen_mlp=replace(U1_A3B.gen_mlp, sparse=(False,), width=96),
        ),
        BENCH.replace(image_head="pixel"),
        BENCH.replace(tie_embeddings=True),
        BENCH.replace(lm_head=False),
        PIXELUMM_8B.replace(num_layers=1),
        SCENES.replace(video=VideoConfig(tube_frames=2)),
        SCENES.replace(video=VideoConfig(tube_frames=1, image_weights=True)),
    ],
    ids=[
        "bench",
        "tiny",
        "scenes",
        "biases",
        "sparse",
        "pixel head",
        "tied",
        "no text head",
        "linear",
        "tubes",
        "frames as images",
    ],
)
def test_units_count_every_parameter_of_a_model(config: ModelConfig) -> None:
    weights = weight_bytes(config, 4)
    counted = {"und": 0, "gen": 0, "shared": 0}
    for name, shape in expected_shapes(config).items():
        counted[stream_of(name)] += 4 * shape.numel()
    for name in memory_plan.STREAMS:
        assert weights.stream(name) + weights.rest[name] == counted[name]
    assert weights.shared == weights.embedding + weights.lm_head == counted["shared"]


def test_codes_have_a_scale_for_every_row() -> None:
    unit = memory_plan.layer_unit(BENCH, "gen", 0)
    linear = [
        shape
        for name, shape in expected_shapes(BENCH).items()
        if name.startswith("layers.0.gen.") and len(shape) == 2
    ]
    assert unit.codes == sum(shape.numel() for shape in linear)
    assert unit.rows == sum(shape[0] for shape in linear)
    assert unit.bytes(2, 8) == unit.codes + 4 * unit.rows + 2 * unit.rest


@pytest.mark.parametrize(
    ("config", "und", "gen", "gen_rest", "und_rest", "vocabulary", "kv"),
    [
        (U1_8B, 16.21e9, 16.21e9, 0.17e9, 0.04e9, 1.24e9, 172_032),
        (U1_A3B, 59.8e9, 16.3e9, 0.07e9, 0.02e9, 0.62e9, 98_304),
    ],
    ids=["8B", "A3B"],
)
def test_sizes_are_those_of_section_1(
    config: ModelConfig,
    und: float,
    gen: float,
    gen_rest: float,
    und_rest: float,
    vocabulary: float,
    kv: int,
) -> None:
    weights = weight_bytes(config, 2)
    assert weights.stream("und") == pytest.approx(und, rel=3e-3)
    assert weights.stream("gen") == pytest.approx(gen, rel=3e-3)
    assert weights.rest["gen"] == pytest.approx(gen_rest, abs=0.01e9)
    assert weights.rest["und"] == pytest.approx(und_rest, abs=0.01e9)
    assert weights.embedding == weights.lm_head == pytest.approx(vocabulary, abs=0.01e9)
    assert config.kv_bytes(2) == kv


def test_int8_makes_the_8b_a_file_of_19_gb() -> None:
    weights = weight_bytes(U1_8B, 2, 8)
    total = sum(weights.stream(s) + weights.rest[s] for s in memory_plan.STREAMS)
    assert total + weights.embedding + weights.lm_head == pytest.approx(19.0e9, abs=0.1e9)


# --- working memory ---


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (PAINT, 1.4e9),
        (GUIDED_EDIT, 2.8e9),
        (Task(kind="edit", branches=3, references=2, reference_tokens=4096), 6.2e9),
    ],
    ids=["guided image", "edit of one image", "edit of two images, three branches"],
)
def test_working_memory_is_that_of_the_examples(task: Task, expected: float) -> None:
    assert working_bytes(U1_8B, task, 2)["gen"] == pytest.approx(expected, abs=0.06e9)


def test_step_cache_takes_134_mb_for_an_image_and_branch() -> None:
    assert memory_plan.step_cache_bytes(U1_8B, 4096, 2) == pytest.approx(134e6, rel=2e-3)


def test_sparse_rows_count_the_experts_of_a_token() -> None:
    d, q, v, k, width = 2048, 4096, 512, 8, 768
    expected = 2 * (4 * d + 2 * q + 2 * v + 3 * k * width + 3 * k * d)
    assert memory_plan.row_bytes(U1_A3B, "gen", 2) == expected


def test_small_images_copy_their_prefixes() -> None:
    assert memory_plan.COPIED_TOKENS == MAX_PREFIX
    small, large = Task(width=512, height=512), Task(width=1024, height=1024)
    kv, rows = U1_8B.kv_bytes(2), memory_plan.row_bytes(U1_8B, "gen", 2)
    for task, n, copied in ((small, 256, 2 * 512), (large, 1024, 0)):
        expected = 2 * n * rows + memory_plan.state_bytes(U1_8B, n) + (2 * 256 + copied) * kv
        assert working_bytes(U1_8B, task, 2)["gen"] == expected


def test_attention_by_varlen_copies_every_prefix_with_room_for_its_image() -> None:
    copied = replace(PAINT, copied_tokens=copied_tokens("varlen"))
    added = working_bytes(U1_8B, copied, 2)["gen"] - working_bytes(U1_8B, PAINT, 2)["gen"]
    assert added == 2 * (256 + 4096) * U1_8B.kv_bytes(2)
    assert added == pytest.approx(1.5e9, abs=0.01e9)
    small = Task(width=512, height=512)
    assert copied_tokens("auto") == copied_tokens("graphs") == small.copied_tokens
    none = working_bytes(U1_8B, replace(small, copied_tokens=copied_tokens("blocks")), 2)["gen"]
    assert working_bytes(U1_8B, small, 2)["gen"] - none == 2 * 512 * U1_8B.kv_bytes(2)


def test_the_default_task_is_the_larger_of_image_and_video() -> None:
    clip = memory_plan.default_task(PIXELUMM_8B)
    assert (clip.kind, clip.frames, clip.width, clip.height) == ("t2v", 96, 832, 480)
    assert (clip.tokens(PIXELUMM_8B), clip.steps, clip.branches) == (37_440, 35, 2)
    video = replace(PIXELUMM_8B.sampling.video, size=(64, 64), frames=4)
    short = PIXELUMM_8B.replace(sampling=replace(PIXELUMM_8B.sampling, video=video))
    seeing = PIXELUMM_8B.replace(capabilities=("chat", "generate", "chat_video"))
    for config in (short, seeing):
        image = memory_plan.default_task(config)
        assert (image.kind, image.frames, image.tokens(config)) == ("t2i", 0, 1_560)


def test_images_of_an_answer_add_only_their_keys_and_values() -> None:
    def peak(images: int) -> float:
        task = Task(kind="interleave", references=images, reference_tokens=4096)
        return working_bytes(U1_8B, task, 2)["gen"]

    assert peak(20) - peak(2) == 2 * 18 * 4096 * U1_8B.kv_bytes(2)


def test_clips_are_planned_by_their_tubes() -> None:
    clip = Task(kind="t2v", width=832, height=480, frames=96)
    assert clip.tokens(PIXELUMM_8B) == 37_440
    n, kv = 37_440, PIXELUMM_8B.kv_bytes(2)
    row = memory_plan.row_bytes(PIXELUMM_8B, "gen", 2)
    rows, state = 2 * n * row, memory_plan.state_bytes(PIXELUMM_8B, n, clip=True)
    assert state == 16 * 3072 * n
    assert working_bytes(PIXELUMM_8B, clip, 2)["gen"] == rows + state + 2 * 256 * kv
    image = Task(width=832, height=480)
    assert clip.tokens(PIXELUMM_8B) == 24 * image.tokens(PIXELUMM_8B)
    # Twice the frames are twice the memory of rows and state: attention adds nothing.
    twice = Task(kind="t2v", width=832, height=480, frames=192)
    more = working_bytes(PIXELUMM_8B, twice, 2)["gen"] - working_bytes(PIXELUMM_8B, clip, 2)["gen"]
    assert more == rows + state
    # Branch by branch, the first prediction waits for the second call.
    apart = working_bytes(PIXELUMM_8B, clip, 2, branch_rows=n)["gen"]
    assert apart == n * row + state + 4 * 3072 * n + 2 * 256 * kv


def test_clips_frame_by_frame_are_planned_as_an_image_behind_all_other_frames() -> None:
    video = VideoConfig(tube_frames=1, image_weights=True, frame_by_frame=True)
    config = U1_8B.replace(video=video, capabilities=(*U1_8B.capabilities, "generate_video"))
    clip = Task(kind="t2v", width=832, height=480, frames=96)
    image = replace(clip, kind="t2i", frames=0)
    n, kv = 390, config.kv_bytes(2)
    assert clip.tokens(config) == image.tokens(config) == n
    # Finished frames are in the conditional branch alone, each with its time and marks.
    seen = 95 * (n + 8)
    planned = working_bytes(config, clip, 2)
    whole = working_bytes(config.replace(video=replace(video, frame_by_frame=False)), clip, 2)
    alone = working_bytes(config, replace(image, copied_tokens=0), 2)
    assert planned["gen"] - alone["gen"] == seen * kv
    assert planned["gen"] < 0.6 * whole["gen"]
    rows = (n + 8) * memory_plan.row_bytes(config, "und", 2)
    assert (
        planned["und"]
        == max(512 * memory_plan.row_bytes(config, "und", 2), rows) + (2 * 256 + seen) * kv
    )
    # One frame has none before it; what a chat looks at is not generated.
    assert working_bytes(config, replace(clip, frames=1), 2) == working_bytes(config, image, 2)
    assert replace(clip, kind="chat").seen(config) == 0
    # Small frames have their prefixes copied with those before them.
    small = Task(kind="t2v", width=64, height=64, frames=3, prompt=20)
    copied = 2 * (4 + 20) + 2 * 12
    less = working_bytes(config, replace(small, copied_tokens=0), 2)["gen"]
    assert working_bytes(config, small, 2)["gen"] - less == copied * kv
    default = replace(config.sampling, image_size=(64, 64))
    assert memory_plan.default_task(config.replace(sampling=default)).kind == "t2v"


def test_questions_about_clips_are_planned_by_frames_and_tubes() -> None:
    frames = clip_question(PIXELUMM_8B, 96, None)
    assert (frames.references, frames.reference_tokens) == (96, 448**2 // 256)
    assert frames.tokens(PIXELUMM_8B) == 0
    assert frames.prefix == 256 + 96 * (784 + 8)
    tubes = clip_question(PIXELUMM_8B, 95, (832, 480), tubes=True, answer=64)
    assert (tubes.references, tubes.reference_tokens) == (24, 36 * 21)
    assert tubes.think == 64
    pixels = 2 * 4 * 24 * 36 * 21 * PIXELUMM_8B.tube_width
    rows = (tubes.prefix - 64) * memory_plan.row_bytes(PIXELUMM_8B, "und", 2)
    keys = tubes.prefix * PIXELUMM_8B.kv_bytes(2)
    assert working_bytes(PIXELUMM_8B, tubes, 2) == {"und": rows + keys + pixels}
    # Many frames share the area of a clip.
    many = clip_question(PIXELUMM_8B, 960, None)
    assert many.references * many.reference_tokens <= 96 * 784
    with pytest.raises(RequestError, match="no embedding of tubes"):
        clip_question(U1_8B, 8, None, tubes=True)
    with pytest.raises(RequestError, match="frames must be at least 1, got 0"):
        clip_question(PIXELUMM_8B, 0, None)


def test_resident_layers_lie_spread_evenly() -> None:
    stays = memory_plan.resident_layers(42, 5)
    assert sum(stays) == 5
    assert [i for i, stay in enumerate(stays) if stay] == [8, 16, 25, 33, 41]
    for r in range(43):
        expected = [((i + 1) * r) // 42 > (i * r) // 42 for i in range(42)]
        assert list(memory_plan.resident_layers(42, r)) == expected
        assert sum(expected) == r
    with pytest.raises(ValueError, match="5 of 4 layers"):
        memory_plan.resident_layers(4, 5)
