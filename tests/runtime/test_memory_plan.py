"""The memory plan against the figures of the specification and the sizes of real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from neounify.attention import copied_tokens
from neounify.attention.backends import MAX_PREFIX
from neounify.checkpoint.load import expected_shapes
from neounify.checkpoint.names import stream_of
from neounify.config import ModelConfig, VideoConfig
from neounify.config.presets import BENCH, PIXELUMM_8B, SCENES, TINY, U1_8B, U1_A3B
from neounify.errors import RequestError
from neounify.runtime import memory_plan, memory_rows
from neounify.runtime.memory_plan import Mode, Task, weight_bytes, working_bytes
from neounify.runtime.rates import CARDS, Machine, rates_of_size
from neounify.tasks.clips import clip_question

GIB = 2**30
RTX_4090 = Machine(device=24 * GIB, host=32 * GIB, rates=CARDS["RTX 4090"][1])
PAINT = Task()
GUIDED_EDIT = Task(kind="edit", branches=2, references=1, reference_tokens=4096)


def form(name: str) -> memory_rows.Kept:
    bits = {"bf16": None, "int8": 8}[name]
    return memory_rows.Kept(name=name, weights=weight_bytes(U1_8B, 2, bits), itemsize=2)


def row(name: str, mode: Mode, machine: Machine = RTX_4090) -> memory_rows.PlanRow:
    return memory_rows.plan_row(U1_8B, form(name), PAINT, machine, mode, {"und": 0, "gen": 0})


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
    vocabulary = weights.embedding + (0 if config.tie_embeddings else weights.lm_head)
    assert vocabulary == counted["shared"]


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
    plain, cached = Task(), Task(step_cache=True)
    added = working_bytes(U1_8B, cached, 2)["gen"] - working_bytes(U1_8B, plain, 2)["gen"]
    assert added == 2 * memory_plan.step_cache_bytes(U1_8B, 4096, 2)
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


# --- the table ---


@pytest.mark.parametrize(
    ("name", "mode", "gigabytes"),
    [
        ("bf16", "all", 36.8),
        ("bf16", "stream", 18.8),
        ("bf16", "layers", 3.3),
        ("int8", "all", 20.2),
        ("int8", "stream", 10.5),
    ],
)
def test_peaks_are_those_of_the_table(name: str, mode: Mode, gigabytes: float) -> None:
    assert round(row(name, mode).peak / 1e9, 1) == gigabytes


def test_int8_by_stream_takes_three_tenths_of_the_8b() -> None:
    weights = weight_bytes(U1_8B, 2)
    size = sum(weights.stream(s) + weights.rest[s] for s in memory_plan.STREAMS)
    size += weights.embedding + weights.lm_head
    assert row("int8", "stream").peak <= 0.3 * size


def test_machines_have_rows_of_the_modes_that_they_serve() -> None:
    whole = replace(RTX_4090, by_layers=False)
    rows = memory_rows.plan_rows(U1_8B, [form("bf16"), form("int8")], PAINT, whole)
    assert [row.mode for row in rows] == 2 * ["all", "stream"]
    small = replace(whole, device=8 * GIB)
    assert memory_rows.first_fit(memory_rows.plan_rows(U1_8B, [form("bf16")], PAINT, small)) is None


def test_locked_and_streamed_bytes_are_those_of_the_table() -> None:
    assert round(row("bf16", "stream").locked / 1e9, 1) == 0.8
    assert round(row("bf16", "layers").locked / 1e9, 1) == 0.8
    assert round(row("int8", "stream").locked / 1e9, 1) == 0.4
    assert row("int8", "all").locked == row("bf16", "stream").streamed == 0
    assert round(row("bf16", "layers").streamed / 1e9, 1) == 16.2


def test_times_are_those_of_the_table() -> None:
    for name, mode, image, text in (
        ("bf16", "stream", 58, 40),
        ("bf16", "layers", 58, 1.5),
        ("int8", "all", 57, 75),
        ("int8", "stream", 57, 75),
    ):
        result = row(name, mode)  # type: ignore[arg-type]
        assert result.step == pytest.approx(1.13, abs=0.005)
        assert result.image == pytest.approx(image, abs=1)
        assert result.text == pytest.approx(text, rel=0.02)
    assert row("bf16", "all").step is None
    assert not row("bf16", "all").fits


def test_a_guided_step_has_158_t_operations() -> None:
    operations = memory_rows.step_operations(U1_8B, PAINT)
    assert operations == pytest.approx(158e12, rel=5e-3)
    assert operations / CARDS["H100"][1].products == pytest.approx(0.304, rel=5e-3)


def test_small_images_wait_for_the_layers() -> None:
    small = Task(width=512, height=512)
    result = memory_rows.plan_row(U1_8B, form("bf16"), small, RTX_4090, "layers", {})
    assert result.step == pytest.approx(16.2e9 / 24e9, rel=0.01)


def test_a_file_larger_than_the_page_cache_is_read_at_the_rate_of_the_disk() -> None:
    poor = Machine(device=24 * GIB, host=8 * GIB, rates=RTX_4090.rates)
    result = row("bf16", "layers", poor)
    assert result.step == pytest.approx(16.2e9 / 3.5e9, rel=0.01)


def test_the_first_mode_that_fits_is_chosen() -> None:
    rows = memory_rows.plan_rows(U1_8B, [form("bf16")], PAINT, RTX_4090)
    chosen = memory_rows.first_fit(rows)
    assert chosen is not None
    assert chosen.mode == "stream"
    small = Machine(device=8 * GIB, host=32 * GIB, rates=RTX_4090.rates)
    rows = memory_rows.plan_rows(U1_8B, [form("bf16")], PAINT, small)
    chosen = memory_rows.first_fit(rows)
    assert chosen is not None
    assert chosen.mode == "layers"
    assert chosen.peak <= 8 * GIB
    more = {name: count + 1 for name, count in chosen.resident.items()}
    for name, count in more.items():
        working = {name: working_bytes(U1_8B, PAINT, 2)[name]}
        weights = form("bf16").weights
        assert memory_plan.peak_bytes(weights, "layers", working, {name: count}) > 8 * GIB
    none = Machine(device=2 * GIB, host=32 * GIB, rates=RTX_4090.rates)
    rows = memory_rows.plan_rows(U1_8B, [form("bf16")], PAINT, none)
    assert memory_rows.first_fit(rows) is None


def test_streams_keep_as_many_layers_as_fit_each() -> None:
    """A3B on 24 GB: the generation stream stays whole, the understanding one goes by layers."""
    weights = weight_bytes(U1_A3B, 2)
    most = memory_plan.fitting_layers(weights, working_bytes(U1_A3B, PAINT, 2), 24 * GIB)
    assert most is not None
    assert most["gen"] == 48
    assert 0 < most["und"] < 48


def test_text_of_a_sparse_model_reads_the_experts_of_its_tokens() -> None:
    """By layers a token of A3B moves 8 of the 128 experts of a layer, 9.4 MB each, and the rest."""
    weights = weight_bytes(U1_A3B, 2)
    kept = memory_rows.Kept(name="bf16", weights=weights, itemsize=2)
    host = Machine(device=24 * GIB, host=128 * GIB, rates=RTX_4090.rates)
    none: memory_plan.Resident = {"und": 0, "gen": 0}
    layers = memory_rows.plan_row(U1_A3B, kept, Task(kind="chat"), host, "layers", none)
    experts = 48 * 9.437e6
    moved = weights.stream("und") - 120 * experts
    assert moved == pytest.approx(3.6e9 + 1.8e9, rel=0.05)
    assert layers.text == pytest.approx(RTX_4090.rates.copies / moved, rel=0.01)


def test_prompts_are_cut_where_they_do_not_fit_in_one_call() -> None:
    """Two images in three branches take 25,000 rows; on 24 GB they are read one by one."""
    task = Task(kind="edit", branches=3, references=2, reference_tokens=4096)
    stream = memory_rows.plan_row(U1_8B, form("bf16"), task, RTX_4090, "stream", {})
    assert stream.fits
    whole = working_bytes(U1_8B, task, 2)
    assert memory_plan.peak_bytes(form("bf16").weights, "stream", whole) > 24 * GIB
    assert working_bytes(U1_8B, task, 2, 4096)["und"] < whole["und"] - 2e9


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


def test_a_card_is_guessed_by_its_memory() -> None:
    assert rates_of_size(24).name == "RTX 4090"
    assert rates_of_size(79).name == "H100"
    assert rates_of_size(12).name == "RTX 4070"


def test_rates_are_measured_where_the_device_is() -> None:
    from neounify.runtime.rates import probe

    rates = probe(torch.device("cpu"), torch.float32)
    assert rates.products > 1e8
    assert rates.memory > 1e8
    assert rates.name == "cpu"


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


def test_branches_of_a_clip_are_apart_where_memory_is_short() -> None:
    """By the rule of the denoiser; where nothing fits, the peak is that of one call."""
    clip = Task(kind="t2v", width=832, height=480, frames=96)
    kept = memory_rows.Kept(name="bf16", weights=weight_bytes(PIXELUMM_8B, 2), itemsize=2)
    together = working_bytes(PIXELUMM_8B, clip, 2)["gen"]
    apart = working_bytes(PIXELUMM_8B, clip, 2, branch_rows=1)["gen"]

    def working(gigabytes: float) -> float:
        machine = Machine(device=int(gigabytes * 1e9), host=64 * GIB, rates=CARDS["H100"][1])
        row = memory_rows.plan_row(PIXELUMM_8B, kept, clip, machine, "all", {})
        idle = memory_plan.peak_bytes(kept.weights, "all", {"gen": 0})
        return (row.peak - idle) / memory_plan.FRAGMENTS

    idle = memory_plan.peak_bytes(kept.weights, "all", {"gen": 0}) / 1e9
    assert working(idle - 1) == pytest.approx(together)
    assert working(idle + 12) == pytest.approx(apart)
    assert working(idle + 40) == pytest.approx(together)
    # Images of the published sizes have one call whatever the memory.
    for limit in (1, 10**9):
        image = working_bytes(U1_8B, PAINT, 2, branch_rows=limit)["gen"]
        assert image == working_bytes(U1_8B, PAINT, 2)["gen"]


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
