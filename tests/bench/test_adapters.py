"""Benchmarks as data: small files in the formats of their prompts become cases and file names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from neounify.bench import ADAPTERS, BenchError, Case, PromptFiles, begin, load_cases
from neounify.bench.cases import image_bytes
from neounify.bench.runner import input_images
from neounify.bench.subjects import png
from neounify.data.sample import DataError
from support.bench import solid


def write(folder: Path, files: dict[str, Any]) -> None:
    """Files by name: text as it is, lists as JSON lines, others as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(line) + "\n" for line in content)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


GENEVAL: list[dict[str, Any]] = [
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"},
    {"tag": "colors", "include": [], "prompt": "a photo of a red cup"},
]
WISE = {"Prompt": "P", "Explanation": "E", "Category": "C", "Subcategory": "Sports"}
ONEIG = "category,id,prompt_en,type,prompt_length,class\n"
TIIF = {"type": "2d_spatial_relation", "short_description": "s", "long_description": "long"}
OPENING = {
    "total_uid": "1502046",
    "meta_task_name": "Multimodal Brainstorming",
    "conversations": [
        {"input": [{"text": "<BEGIN> Show it. <image>", "image": "./images/a/46-i-1.jpg"}]},
        {"output": [{"text": "As shown <image>", "image": "./images/a/46-o-1.jpg"}]},
    ],
}
GEDIT = {
    "task_type": "subject-add",
    "key": "a1b2",
    "instruction": "Add a cup",
    "instruction_language": "en",
    "image": "in/a1b2.png",
}
FORMATS: dict[str, tuple[dict[str, Any], str, list[tuple[str, str, str, tuple[str, ...]]]]] = {
    "geneval": (
        {"evaluation_metadata.jsonl": GENEVAL},
        "evaluation_metadata.jsonl",
        [
            ("00000", "counting", GENEVAL[0]["prompt"], ("00000/samples/00000.png",)),
            ("00001", "colors", GENEVAL[1]["prompt"], ("00001/samples/00000.png",)),
        ],
    ),
    "dpg": (
        {"prompts/1.txt": "Long text.\n", "prompts/stanford3.txt": "Other."},
        "prompts",
        [
            ("1", "all", "Long text.", ("1.png",)),
            ("stanford3", "all", "Other.", ("stanford3.png",)),
        ],
    ),
    "cvtg": (
        {
            "CVTG/2_combined.json": {"0": "A sign that says 'go'"},
            "CVTG/3_combined.json": {"0": "b"},
            "CVTG/4_combined.json": {"7": "c"},
            "CVTG/5_combined.json": {"0": "d"},
        },
        ".",
        [
            ("CVTG/2/0", "CVTG/2", "A sign that says 'go'", ("CVTG/2/0.png",)),
            ("CVTG/3/0", "CVTG/3", "b", ("CVTG/3/0.png",)),
            ("CVTG/4/7", "CVTG/4", "c", ("CVTG/4/7.png",)),
            ("CVTG/5/0", "CVTG/5", "d", ("CVTG/5/0.png",)),
        ],
    ),
    "longtext": (
        {
            "text_prompts.jsonl": [
                {"prompt_id": 12, "prompt": "p", "text": ["t"], "category": "sign"}
            ]
        },
        "text_prompts.jsonl",
        [("0012", "sign", "p", ("0012_0.png",))],
    ),
    "wise": (
        {
            "data/cultural_common_sense.json": json.dumps([WISE | {"prompt_id": 1}]),
            "data/natural_science.json": json.dumps(
                [WISE | {"prompt_id": 701, "Subcategory": "Plant"}]
            ),
        },
        "data",
        [("1", "Sports", "P", ("1.png",)), ("701", "Plant", "P", ("701.png",))],
    ),
    "oneig": (
        {
            "OneIG-Bench.csv": ONEIG + 'Anime_Stylization,000,"a, b",T,long,None\n'
            "Portrait,001,c,NP,short,None\n"
        },
        "OneIG-Bench.csv",
        [
            ("anime/000", "anime", "a, b", ("anime/mine/000.webp",)),
            ("human/001", "human", "c", ("human/mine/001.webp",)),
        ],
    ),
    "tiif": (
        {"testmini_prompts/2d_spatial_relation_prompts.jsonl": [TIIF]},
        "testmini_prompts",
        [
            (
                "2d_spatial_relation/0/short_description",
                "2d_spatial_relation/short_description",
                "s",
                ("2d_spatial_relation/mine/short_description/0.png",),
            ),
            (
                "2d_spatial_relation/0/long_description",
                "2d_spatial_relation/long_description",
                "long",
                ("2d_spatial_relation/mine/long_description/0.png",),
            ),
        ],
    ),
    "gedit": (
        {"info.jsonl": [GEDIT]},
        "info.jsonl",
        [("en/a1b2", "subject-add", "Add a cup", ("mine/fullset/subject-add/en/a1b2.png",))],
    ),
    "imgedit": (
        {"basic_edit.json": {"1082": {"id": "in/1.jpg", "prompt": "q", "edit_type": "adjust"}}},
        "basic_edit.json",
        [("1082", "adjust", "q", ("1082.png",))],
    ),
    "risebench": (
        {
            "datav2_total_w_subtask.json": json.dumps(
                [
                    {
                        "index": "temporal_reasoning_1",
                        "category": "temporal_reasoning",
                        "instruction": "What next?",
                        "image": "temporal_reasoning_images/1.png",
                        "reference": "Older.",
                    }
                ]
            )
        },
        "datav2_total_w_subtask.json",
        [
            (
                "temporal_reasoning_1",
                "temporal_reasoning",
                "What next?",
                ("mine/images/temporal_reasoning/temporal_reasoning_1.png",),
            )
        ],
    ),
    "opening": (
        {"test_data.jsonl": [OPENING]},
        "test_data.jsonl",
        [("1502046", "Multimodal Brainstorming", "Show it.", ("mine_output/1502046.json",))],
    ),
}


def cases_of(name: str, folder: Path, samples: int | None = None) -> list[Case]:
    files, root, _ = FORMATS[name]
    write(folder, files)
    return ADAPTERS[name].cases(PromptFiles(folder / root), "mine", samples)


def test_every_benchmark_has_a_format_here() -> None:
    assert set(FORMATS) == set(ADAPTERS) - {"questions"}


@pytest.mark.parametrize("name", FORMATS)
def test_prompts_become_cases(name: str, tmp_path: Path) -> None:
    cases = cases_of(name, tmp_path)
    # Of several samples the first file, the others being alike.
    assert [(c.id, c.category, c.prompt, c.files[:1]) for c in cases] == FORMATS[name][2]
    assert all(Case.from_json(json.loads(json.dumps(c.to_json()))) == c for c in cases)
    adapter = ADAPTERS[name]
    assert all(c.samples == adapter.samples for c in cases)
    assert all(len(c.files) == (1 if adapter.grid else adapter.samples) for c in cases)


def test_the_metadata_of_geneval_is_the_line_of_its_prompts(tmp_path: Path) -> None:
    case = cases_of("geneval", tmp_path)[1]
    assert {name: json.loads(text) for name, text in case.sides.items()} == {
        "00001/metadata.jsonl": GENEVAL[1]
    }
    assert case.files[3] == "00001/samples/00003.png"


def test_inputs_of_edits_and_stories(tmp_path: Path) -> None:
    (gedit,) = cases_of("gedit", tmp_path / "gedit")
    assert gedit.images == ("in/a1b2.png",)
    assert gedit.copies == {"mine/fullset/subject-add/en/a1b2_SRCIMG.png": "in/a1b2.png"}
    assert cases_of("imgedit", tmp_path / "imgedit")[0].images == ("in/1.jpg",)
    assert cases_of("opening", tmp_path / "opening")[0].images == ("./images/a/46-i-1.jpg",)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("geneval", {"evaluation_metadata.jsonl": [{"prompt": "p"}]}, "has no 'tag'"),
        (
            "geneval",
            {"evaluation_metadata.jsonl": [{"tag": "t", "prompt": " "}]},
            "no text 'prompt'",
        ),
        ("geneval", {"evaluation_metadata.jsonl": '{"tag": "t"\n'}, "jsonl:1: not valid JSON"),
        ("geneval", {"evaluation_metadata.jsonl": "[1]\n"}, "jsonl:1: must be a JSON object"),
        ("geneval", {"evaluation_metadata.jsonl": "\n"}, "holds no prompts"),
        ("imgedit", {"basic_edit.json": {"../x": {"id": "a", "prompt": "p"}}}, "part of a file's"),
        (
            "imgedit",
            {"basic_edit.json": {"1": {"prompt": "p", "edit_type": "e"}}},
            "no input image",
        ),
        ("wise", {"data": [WISE | {"prompt_id": 1}] * 2}, "not valid JSON"),
        ("wise", {"data": json.dumps([WISE | {"prompt_id": 1}] * 2)}, "two prompts have id 1"),
        ("wise", {"data": json.dumps([WISE | {"prompt_id": "x" * 300}])}, "part of a file's name"),
        (
            "longtext",
            {"text_prompts.jsonl": [{"prompt_id": "a", "prompt": "p"}]},
            "prompt_id must be a number",
        ),
        ("oneig", {"OneIG-Bench.csv": ONEIG + "Cars,0,p,T,long,None\n"}, "no category 'Cars'"),
        ("oneig", {"OneIG-Bench.csv": ONEIG + "Portrait,0,p,T,long,None,8\n"}, "1 cells more"),
        ("opening", {"test_data.jsonl": [{"total_uid": "1"}]}, "no conversation"),
        ("dpg", {"prompts/readme.md": ""}, r"has no \*\.txt"),
        (
            "cvtg",
            {"p/CVTG/2_combined.json": '[{"prompt": "a"}]'},
            "must be a JSON object of prompts",
        ),
        (
            "geneval",
            {"evaluation_metadata.jsonl": '{"tag": "t", "prompt": "\\ud83d"}'},
            "half a surrogate",
        ),
        ("wise", {"data": json.dumps([WISE | {"prompt_id": 10**300}])}, "part of a file's name"),
        (
            "imgedit",
            {"basic_edit.json": {"1": {"id": ["a", 1], "prompt": "p", "edit_type": "e"}}},
            "must be a path or a list of paths",
        ),
        (
            "gedit",
            {"info.jsonl": [GEDIT, GEDIT | {"key": "a1b2_SRCIMG", "instruction_language": "en"}]},
            "two prompts have mine/fullset/subject-add/en/a1b2_SRCIMG.png",
        ),
    ],
)
def test_prompts_that_cannot_be_used(
    name: str, files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, files)
    root = tmp_path / next(iter(files)).split("/")[0]
    with pytest.raises(BenchError, match=message):
        ADAPTERS[name].cases(PromptFiles(root), "mine")


def test_an_edit_of_several_images(tmp_path: Path) -> None:
    record = {"index": "l_1", "category": "logical_reasoning", "instruction": "Go on."}
    write(tmp_path, {"data.json": json.dumps([record | {"image": ["i/1_1.png", "i/1_2.png"]}])})
    (case,) = ADAPTERS["risebench"].cases(PromptFiles(tmp_path / "data.json"), "mine")
    assert case.images == ("i/1_1.png", "i/1_2.png")


def test_marks_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    """JSON and CSV allow U+2028 and U+0085 in texts, at which str.splitlines would cut them."""
    marks = "a\u2028b\u0085c\x1cd"
    line = json.dumps({"tag": "t", "prompt": marks.replace("\x1c", "")}, ensure_ascii=False)
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_bytes(f"{line}\r\n{line}".encode())
    cases = ADAPTERS["geneval"].cases(PromptFiles(path), "mine")
    assert [case.prompt for case in cases] == ["a\u2028b\u0085cd"] * 2
    begin(tmp_path / "run", {}, cases, path)
    assert load_cases(tmp_path / "run") == cases
    table = tmp_path / "OneIG-Bench.csv"
    table.write_bytes(f'{ONEIG}Portrait,1,"{marks}\r\nnext",T,long,None\r\n'.encode())
    (case,) = ADAPTERS["oneig"].cases(PromptFiles(table), "mine")
    assert case.prompt == f"{marks}\r\nnext"


def test_the_tables_of_gedit(tmp_path: Path) -> None:
    """The release's own tables: two images in each row, as Hugging Face writes them."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {name: value for name, value in GEDIT.items() if name != "image"}
        | {"key": f"k{n}", "Intersection_exist": True}
        | {
            name: {"bytes": png(solid(n + add)), "path": None}
            for name, add in (("input_image", 0), ("input_image_raw", 100))
        }
        for n in range(3)
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows[:2]), folder / "a.parquet", row_group_size=1)
    parquet.write_table(pa.Table.from_pylist(rows[2:]), folder / "b.parquet")
    prompts = PromptFiles(folder)
    cases = ADAPTERS["gedit"].cases(prompts, "mine")
    assert [case.id for case in cases] == ["en/k0", "en/k1", "en/k2"]
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    assert prompts.hashes == digests
    for n, case in enumerate(cases):
        (raw,) = input_images(case, folder)
        assert raw.tobytes() == solid(n + 100).tobytes()
        ((name, source),) = case.copies.items()
        assert name == f"mine/fullset/subject-add/en/k{n}_SRCIMG.png"
        assert image_bytes(source, folder) == png(solid(n))
        assert len(json.dumps(case.to_json())) < 2000, "images stay in the tables"
    for source in (
        "a.parquet#9#input_image",
        "a.parquet#x#y",
        "a.parquet#0#key",
        "../a.parquet#0#y",
    ):
        with pytest.raises((BenchError, DataError)):
            image_bytes(f"parquet:{source}", folder)
    (folder / "b.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match=r"b\.parquet"):
        ADAPTERS["gedit"].cases(PromptFiles(folder), "mine")


def test_numbers_of_samples(tmp_path: Path) -> None:
    assert len(cases_of("geneval", tmp_path, 2)[0].files) == 2
    assert cases_of("dpg", tmp_path, 9)[0].files == ("1.png",)
    for name, samples, message in (
        ("dpg", 3, "a square grid, not 3"),
        ("geneval", 0, "at least 1"),
        ("wise", 2, "takes 1 image of each prompt, not 2"),
    ):
        with pytest.raises(BenchError, match=message):
            cases_of(name, tmp_path, samples)


def test_the_hash_of_a_folder_covers_its_files(tmp_path: Path) -> None:
    def digest() -> str:
        prompts = PromptFiles(tmp_path / "data")
        ADAPTERS["wise"].cases(prompts, "mine")
        return prompts.sha256

    write(tmp_path, FORMATS["wise"][0])
    first = digest()
    assert digest() == first
    (tmp_path / "data/natural_science.json").write_text(json.dumps([WISE | {"prompt_id": 702}]))
    assert digest() != first
    with pytest.raises(BenchError, match="does not exist"):
        PromptFiles(tmp_path / "absent")


def test_the_page_names_the_files_of_every_benchmark() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks-public.md").read_text("utf-8")
    rows = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if "| `" in line}
    for adapter in ADAPTERS.values():
        if adapter.file:
            assert f"`{adapter.file}`" in rows[adapter.name]
            shared = f"{adapter.samples} in one file" if adapter.grid else str(adapter.samples)
            assert adapter.document or rows[adapter.name].endswith(f"| {shared} |")
