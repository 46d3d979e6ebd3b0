"""Benchmarks of text to image: names of fields and files as their scorers read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from neounify.bench.adapter import Adapter, each_file
from neounify.bench.cases import (
    READ_BY_US,
    BenchError,
    PromptFiles,
    Record,
    json_records,
    jsonl,
    table,
)

ONEIG_FOLDERS = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}
TIIF_PROMPTS = ("short_description", "long_description")
CVTG_SUBSETS, CVTG_AREAS = ("CVTG", "CVTG-Style", "CVTG-style"), (2, 3, 4, 5)


def _metadata(record: Record) -> str:
    """The line of the prompts that a record is."""
    return json.dumps({name: value for name, value in record.items() if name not in READ_BY_US})


def _geneval(prompts: PromptFiles) -> Iterator[Record]:
    """Numbers go through all prompts; the file of metadata must be the one that has tags."""
    for index, record in enumerate(each_file("*metadata.jsonl", jsonl)(prompts)):
        yield record | {"index": index}


def _whole_text(text: str, path: Path) -> Iterator[Record]:
    yield {"prompt": text.strip()}


def _longtext(prompts: PromptFiles) -> Iterator[Record]:
    for record in each_file("text_prompts*.jsonl", jsonl)(prompts):
        number = record.get("prompt_id", record["index"])
        if not isinstance(number, int):
            raise BenchError(f"LongText-Bench: prompt_id must be a number, not {number!r}")
        yield {"category": "all", **record, "prompt_id": number}


def _cvtg(prompts: PromptFiles) -> Iterator[Record]:
    """CVTG/2_combined.json to CVTG-Style/5_combined.json: prompts by key."""
    for subset in CVTG_SUBSETS:
        folder = prompts.root / subset
        for area in CVTG_AREAS if folder.is_dir() else ():
            path = folder / f"{area}_combined.json"
            for record in json_records(prompts.text(path), path):
                if "key" not in record:
                    raise BenchError(
                        f"{path} must be a JSON object of prompts by number, not a list"
                    )
                # The scorer's folder is CVTG-Style, that of the release CVTG-style.
                named = {"subset": "CVTG-Style" if subset == "CVTG-style" else subset, "area": area}
                yield record | named | {"index": record["key"]}


def _oneig(prompts: PromptFiles) -> Iterator[Record]:
    for record in each_file("OneIG-Bench*.csv", table)(prompts):
        folder = ONEIG_FOLDERS.get(str(record.get("category")))
        if folder is None:
            known = ", ".join(ONEIG_FOLDERS)
            raise BenchError(f"OneIG-Bench has no category {record.get('category')!r}: {known}")
        prompt = record.get("prompt_en") or record.get("prompt_cn") or record.get("prompt")
        yield record | {"folder": folder, "prompt": prompt}


def _tiif(prompts: PromptFiles) -> Iterator[Record]:
    """Each record twice: its short and its long description."""
    for record in each_file("*.jsonl", jsonl)(prompts):
        for length in TIIF_PROMPTS:
            yield record | {"length": length, "prompt": record.get(length)}


ADAPTERS = (
    Adapter(
        name="geneval",
        title="GenEval",
        task="image",
        source="https://github.com/djghosh13/geneval",
        prompts="evaluation_metadata.jsonl",
        read=_geneval,
        id="{index:05}",
        category="{tag}",
        file="{index:05}/samples/{sample:05}.png",
        samples=4,
        sides={"{index:05}/metadata.jsonl": _metadata},
        scorer="python evaluation/evaluate_images.py IMAGES --outfile results.jsonl",
    ),
    Adapter(
        name="dpg",
        title="DPG-Bench",
        task="image",
        source="https://github.com/TencentQQGYLab/ELLA",
        prompts="dpg_bench/prompts, a text file for each prompt",
        read=each_file("*.txt", _whole_text),
        id="{stem}",
        category="all",
        file="{stem}.png",
        samples=4,
        grid=True,
        scorer="python dpg_bench/compute_dpg_bench.py --image-root-path IMAGES "
        "--resolution SIDE --pic-num 4",
    ),
    Adapter(
        name="cvtg",
        title="CVTG-2K",
        task="image",
        source="https://github.com/NJU-PCALab/TextCrafter",
        prompts="CVTG-2K, the folder with CVTG and CVTG-Style",
        read=_cvtg,
        id="{subset}/{area}/{key}",
        category="{subset}/{area}",
        file="{subset}/{area}/{key}.png",
        count=2000,
        scorer="python unified_metrics_eval.py --benchmark_dir CVTG-2K --result_dir IMAGES "
        "--output_file results.json",
    ),
    Adapter(
        name="longtext",
        title="LongText-Bench",
        task="image",
        source="https://github.com/X-Omni-Team/X-Omni",
        prompts="text_prompts.jsonl or text_prompts_zh.jsonl",
        read=_longtext,
        id="{prompt_id:04}",
        category="{category}",
        file="{prompt_id:04}_{sample}.png",
        scorer="python evaluate.py --sample_dir IMAGES --output_dir results --mode en",
    ),
    Adapter(
        name="wise",
        title="WISE",
        task="image",
        source="https://github.com/PKU-YuanGroup/WISE",
        prompts="data, the folder with three JSON files, or one of them",
        read=each_file("*.json", json_records),
        prompt="Prompt",
        id="{prompt_id}",
        category="{Subcategory}",
        file="{prompt_id}.png",
        count=1000,
        scorer="python gpt_eval.py --json_path data/natural_science.json --image_dir IMAGES "
        "--output_dir results --api_key KEY --model gpt-4o-2024-05-13 "
        "--result_full full.json --result_scores scores.jsonl",
    ),
    Adapter(
        name="oneig",
        title="OneIG-Bench",
        task="image",
        source="https://github.com/OneIG-Bench/OneIG-Benchmark",
        prompts="OneIG-Bench.csv or OneIG-Bench-ZH.csv",
        read=_oneig,
        id="{folder}/{id}",
        category="{folder}",
        file="{folder}/{model}/{id}.webp",
        samples=4,
        grid=True,
        scorer="python -m scripts.alignment.alignment_score --mode EN --image_dirname IMAGES "
        "--model_names MODEL --image_grid 2 --class_items anime human object",
    ),
    Adapter(
        name="tiif",
        title="TIIF-Bench",
        task="image",
        source="https://github.com/A113N-W3I/TIIF-Bench",
        prompts="data/testmini_prompts or data/test_prompts, a folder of JSON lines",
        read=_tiif,
        id="{type}/{index}/{length}",
        category="{type}/{length}",
        file="{type}/{model}/{length}/{index}.png",
        scorer="python eval/eval_with_vlm.py --jsonl_dir data/testmini_eval_prompts "
        "--image_dir IMAGES --eval_model MODEL --output_dir results --api_key KEY "
        "--base_url URL --model gpt-4o",
    ),
)
