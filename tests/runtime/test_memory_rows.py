"""Rows of the memory plan against the table of the specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from neounify.config import VideoConfig
from neounify.config.presets import PIXELUMM_8B, U1_8B, U1_A3B
from neounify.runtime import memory_plan, memory_rows
from neounify.runtime.memory_plan import Mode, Task, weight_bytes, working_bytes
from neounify.runtime.rates import CARDS, Machine, rates_of_size

GIB = 2**30
RTX_4090 = Machine(device=24 * GIB, host=32 * GIB, rates=CARDS["RTX 4090"][1])
PAINT = Task()
GUIDED_EDIT = Task(kind="edit", branches=2, references=1, reference_tokens=4096)


def form(name: str) -> memory_rows.Kept:
    bits = {"bf16": None, "int8": 8}[name]
    return memory_rows.Kept(name=name, weights=weight_bytes(U1_8B, 2, bits), itemsize=2)


def row(name: str, mode: Mode, machine: Machine = RTX_4090) -> memory_rows.PlanRow:
    return memory_rows.plan_row(U1_8B, form(name), PAINT, machine, mode, {"und": 0, "gen": 0})


# The specification looks rows of the embedding up on the host, and has the text head on the device
# only while text is written. Both stay on the device here: of its table, "all" lacks the embedding,
# the others, whose generation stream decides, the embedding and the text head.
EMBEDDING = TEXT_HEAD = 1.244659712e9


@pytest.mark.parametrize(
    ("name", "mode", "specified", "there"),
    [
        ("bf16", "all", 36.8, EMBEDDING),
        ("bf16", "stream", 18.8, EMBEDDING + TEXT_HEAD),
        ("bf16", "layers", 3.3, EMBEDDING + TEXT_HEAD),
        ("int8", "all", 20.2, EMBEDDING),
        ("int8", "stream", 10.5, EMBEDDING + TEXT_HEAD),
    ],
)
def test_peaks_are_those_of_the_table_and_what_stays_on_the_device(
    name: str, mode: Mode, specified: float, there: float
) -> None:
    assert round((row(name, mode).peak - memory_plan.FRAGMENTS * there) / 1e9, 1) == specified


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_text_head_are_there_in_every_mode_and_stream(tied: bool) -> None:
    config = U1_8B.replace(tie_embeddings=tied)
    weights = weight_bytes(config, 2)
    none = replace(weights, embedding=0.0, lm_head=0.0)
    there = memory_plan.FRAGMENTS * (EMBEDDING if tied else EMBEDDING + TEXT_HEAD)
    for mode in memory_plan.MODES:
        for stream in memory_plan.STREAMS:
            peak, less = (
                memory_plan.peak_bytes(w, mode, {stream: 0.0}, {stream: 0}) for w in (weights, none)
            )
            assert peak - less == pytest.approx(there)


def test_images_touch_no_text_head_that_is_mapped() -> None:
    """On the CPU; one that is converted when it is read is there."""
    weights = weight_bytes(U1_8B, 2)

    def peak(stream: memory_plan.StreamName, *, mapped: bool) -> float:
        kept = replace(weights, head_mapped=mapped)
        return memory_plan.peak_bytes(kept, "stream", {stream: 0.0}, unified=True)

    assert peak("gen", mapped=False) - peak("gen", mapped=True) == TEXT_HEAD
    assert peak("und", mapped=False) == peak("und", mapped=True)


def test_int8_by_stream_takes_three_tenths_of_the_8b_and_what_stays() -> None:
    weights = weight_bytes(U1_8B, 2)
    size = sum(weights.stream(s) + weights.rest[s] for s in memory_plan.STREAMS)
    size += weights.shared
    there = memory_plan.FRAGMENTS * (EMBEDDING + TEXT_HEAD)
    assert row("int8", "stream").peak <= 0.3 * size + there


def test_adapters_beside_codes_are_there_in_every_mode() -> None:
    weights = weight_bytes(U1_8B, 2, 8)
    more = replace(weights, adapters=1e9)
    for mode in memory_plan.MODES:
        peaks = [memory_plan.peak_bytes(w, mode, {"gen": 0.0}) for w in (weights, more)]
        assert peaks[1] - peaks[0] == pytest.approx(memory_plan.FRAGMENTS * 1e9)


def test_machines_have_rows_of_the_modes_that_they_serve() -> None:
    whole = replace(RTX_4090, by_layers=False)
    rows = memory_rows.plan_rows(U1_8B, [form("bf16"), form("int8")], PAINT, whole)
    assert [row.mode for row in rows] == 2 * ["all", "stream"]
    small = replace(whole, device=8 * GIB)
    assert memory_rows.first_fit(memory_rows.plan_rows(U1_8B, [form("bf16")], PAINT, small)) is None


def test_locked_and_streamed_bytes_are_those_of_the_table() -> None:
    assert round(row("bf16", "layers").locked / 1e9, 1) == 0.8
    assert round(row("int8", "layers").locked / 1e9, 1) == 0.4
    assert row("int8", "all").locked == row("bf16", "stream").streamed == 0
    assert round(row("bf16", "layers").streamed / 1e9, 1) == 16.2
    # The specification locks 2ℓ with "stream" too; streams are copied from the mapped files.
    assert row("bf16", "stream").locked == row("int8", "stream").locked == 0
    # Where all layers stay, no buffers are locked.
    every: memory_plan.Resident = {"und": 42, "gen": 42}
    whole = memory_rows.plan_row(U1_8B, form("bf16"), PAINT, RTX_4090, "layers", every)
    assert whole.locked == whole.streamed == 0


def test_times_are_those_of_the_table() -> None:
    """Changes of streams take three times as long as there: copies are not of locked memory."""
    third = 2 * 32.6e9 / 24e9
    for name, mode, image, text in (
        ("bf16", "stream", 58 + third, 40),
        ("bf16", "layers", 58, 1.5),
        ("int8", "all", 57, 75),
        ("int8", "stream", 57 + third / 2, 75),
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


def test_stored_bytes_move() -> None:
    """A generation stream stored in float32 and kept in bfloat16: twice the bytes move."""
    bf16 = form("bf16")
    stored = {s: bf16.weights.stream(s) + bf16.weights.rest[s] for s in memory_plan.STREAMS}
    wide = replace(bf16, stored={**stored, "gen": 2 * stored["gen"]})
    small, none = Task(width=512, height=512), {"und": 0, "gen": 0}

    def planned(kept: memory_rows.Kept, mode: Mode) -> memory_rows.PlanRow:
        host = replace(RTX_4090, host=128 * GIB)
        return memory_rows.plan_row(U1_8B, kept, small, host, mode, none)  # type: ignore[arg-type]

    narrow, twice = planned(bf16, "layers"), planned(wide, "layers")
    assert twice.streamed == pytest.approx(2 * narrow.streamed) == pytest.approx(32.4e9, rel=2e-3)
    assert twice.step == pytest.approx(32.4e9 / 24e9, rel=2e-3)
    assert twice.text == narrow.text
    more = planned(wide, "stream").image - planned(bf16, "stream").image  # type: ignore[operator]
    assert more == pytest.approx(stored["gen"] / (24e9 / 3))
    codes = replace(form("int8"), stored=stored)
    assert planned(codes, "layers").streamed == pytest.approx(16.2e9, rel=0.01)
    assert planned(codes, "layers").text == pytest.approx(1.5, rel=0.02)


def test_a_text_head_that_is_not_there_reads_nothing() -> None:
    weights = weight_bytes(U1_8B, 2)
    tied, none = U1_8B.replace(tie_embeddings=True), U1_8B.replace(lm_head=False)
    assert weight_bytes(tied, 2).lm_head == weight_bytes(none, 2).lm_head == 0
    for config in (U1_8B, tied):
        read = memory_rows.decoded_bytes(config, weight_bytes(config, 2))
        assert read == weights.stream("und") + TEXT_HEAD
    kept = replace(form("bf16"), weights=weight_bytes(none, 2))
    result = memory_rows.plan_row(none, kept, PAINT, RTX_4090, "stream", {})
    assert result.fits
    assert result.text is None


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
    none = Machine(device=4 * GIB, host=32 * GIB, rates=RTX_4090.rates)
    rows = memory_rows.plan_rows(U1_8B, [form("bf16")], PAINT, none)
    assert memory_rows.first_fit(rows) is None


def test_streams_keep_as_many_layers_as_fit_each() -> None:
    """A3B on 24 GB: the generation stream stays whole, the understanding one goes by layers."""
    kept = memory_rows.Kept(name="bf16", weights=weight_bytes(U1_A3B, 2), itemsize=2)
    most = memory_rows.fitting_layers(U1_A3B, kept, PAINT, RTX_4090)
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
    """Two images in three branches take 25,000 rows; on 25 GB they are read one by one."""
    task = Task(kind="edit", branches=3, references=2, reference_tokens=4096)
    larger = replace(RTX_4090, device=25 * GIB)
    stream = memory_rows.plan_row(U1_8B, form("bf16"), task, larger, "stream", {})
    assert stream.fits
    whole = working_bytes(U1_8B, task, 2)
    assert memory_plan.peak_bytes(form("bf16").weights, "stream", whole) > 25 * GIB
    assert working_bytes(U1_8B, task, 2, 4096)["und"] < whole["und"] - 2e9


def test_24_gb_edit_the_8b_at_2048() -> None:
    two = Task(kind="edit", branches=3, references=2, reference_tokens=4096)
    for task, mode in ((GUIDED_EDIT, "stream"), (two, "layers")):
        rows = memory_rows.plan_rows(U1_8B, [form("bf16")], task, RTX_4090)
        chosen = memory_rows.first_fit(rows)
        assert chosen is not None
        assert chosen.mode == mode


def test_layers_stay_where_branches_are_apart() -> None:
    """As many layers of a model of clips as fit with its branches one after the other."""
    clip = Task(kind="t2v", width=832, height=480, frames=96)
    kept = memory_rows.Kept(name="bf16", weights=weight_bytes(PIXELUMM_8B, 2), itemsize=2)
    machine = Machine(device=20 * GIB, host=64 * GIB, rates=CARDS["H100"][1])
    most = memory_rows.fitting_layers(PIXELUMM_8B, kept, clip, machine)
    assert most is not None

    def peak(count: int, limit: int) -> float:
        a = working_bytes(PIXELUMM_8B, clip, 2, branch_rows=limit)["gen"]
        return memory_plan.peak_bytes(kept.weights, "layers", {"gen": a}, {"gen": count})

    # All branches in one call would need more.
    assert peak(most["gen"], 1) <= 20 * GIB < peak(most["gen"], 10**9)
    assert peak(most["gen"] + 1, 1) > 20 * GIB
    row = memory_rows.plan_row(PIXELUMM_8B, kept, clip, machine, "layers", most)
    assert row.fits


def test_a_process_of_one_stream_is_planned_by_that_stream() -> None:
    both = working_bytes(U1_8B, PAINT, 2)
    for stream in memory_plan.STREAMS:
        alone = replace(PAINT, stream=stream)
        assert alone.streams == (stream,)
        assert working_bytes(U1_8B, alone, 2) == {stream: both[stream]}
        result = memory_rows.plan_row(U1_8B, form("bf16"), alone, RTX_4090, "stream", {})
        weights = form("bf16").weights
        assert result.peak == memory_plan.peak_bytes(weights, "stream", {stream: both[stream]})


def test_clips_frame_by_frame_take_the_time_of_their_frames() -> None:
    video = VideoConfig(tube_frames=1, image_weights=True, frame_by_frame=True)
    config = U1_8B.replace(video=video, capabilities=(*U1_8B.capabilities, "generate_video"))
    clip = Task(kind="t2v", width=512, height=512, frames=9)
    image, n = replace(clip, kind="t2i", frames=0), 256
    wide = config.num_heads * config.head_dim * config.num_layers
    # A frame sees on average four of the eight others, in one branch.
    more = memory_rows.step_operations(config, clip) - memory_rows.step_operations(config, image)
    assert more == pytest.approx(4.0 * n * 4 * (n + 8) * wide)
    rows = 2.0 * memory_rows.passed_parameters(config, "und") * 8 * (n + 8)
    read = memory_rows.prefill_operations(config, clip) - memory_rows.prefill_operations(
        config, image
    )
    assert read == pytest.approx(rows + 2.0 * 8 * (n + 8) * (2 * 256 + 8 * (n + 8)) * wide)

    def planned(task: Task, mode: Mode, machine: Machine) -> memory_rows.PlanRow:
        return memory_rows.plan_row(config, form("bf16"), task, machine, mode, {})

    # Bound by what moves: every frame has its steps, and changes or reads the streams anew.
    for mode, device in (("layers", 24 * GIB), ("stream", 48 * GIB)):
        slow = Machine(device=device, host=128 * GIB, rates=replace(CARDS["H100"][1], copies=1e9))
        frames, one = (planned(task, mode, slow) for task in (clip, image))  # type: ignore[arg-type]
        assert frames.step == pytest.approx(one.step, rel=0.05)
        assert frames.image == pytest.approx(9 * one.image, rel=0.02)  # type: ignore[operator]


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
