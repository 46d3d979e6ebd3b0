"""Benchmarks of editing and of interleaved answers: fields and files as their scorers read them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from neounify.bench.adapter import Adapter, each_file
from neounify.bench.cases import BenchError, PromptFiles, Record, json_records, jsonl

_MARKS = re.compile(r"<BEGIN>|<image>")


def _gedit(prompts: PromptFiles) -> Iterator[Record]:
    """Rows of the release's tables, or lines of `info.jsonl`.

    The scorer sees `input_image` as the source, the model the larger `input_image_raw`.
    """
    for path in prompts.named("*.parquet", "*.jsonl"):
        is_table = path.suffix == ".parquet"
        for record in prompts.rows(path) if is_table else jsonl(prompts.text(path), path):
            image = record.get("input_image_raw") or record.get("image")
            yield record | {"image": image, "source": record.get("input_image") or image}


def _imgedit(prompts: PromptFiles) -> Iterator[Record]:
    """{key: {"id": path of the input, "prompt", "edit_type"}}."""
    for record in each_file("*edit.json", json_records)(prompts):
        yield record | {"image": record.get("id")}


def _opening(prompts: PromptFiles) -> Iterator[Record]:
    """Inputs are steps of text and image; the recorded output is the annotators'."""
    for record in each_file("*data.jsonl", jsonl)(prompts):
        try:
            steps = record["conversations"][0]["input"]
            texts = [_MARKS.sub("", step["text"]).strip() for step in steps]
            images = [step["image"] for step in steps if step["image"]]
        except (KeyError, IndexError, TypeError) as error:
            raise BenchError(
                f"OpenING: record {record['index']} has no conversation whose input has text and "
                f"image ({error!r})"
            ) from error
        yield record | {"prompt": "\n".join(texts), "images": images}


ADAPTERS = (
    Adapter(
        name="gedit",
        title="GEdit-Bench",
        task="edit",
        source="https://github.com/stepfun-ai/Step1X-Edit",
        prompts="the folder of its .parquet files, or info.jsonl with task_type, key, instruction, "
        "instruction_language and image, a path",
        read=_gedit,
        prompt="instruction",
        images="image",
        id="{instruction_language}/{key}",
        category="{task_type}",
        file="{model}/fullset/{task_type}/{instruction_language}/{key}.png",
        copies={"{model}/fullset/{task_type}/{instruction_language}/{key}_SRCIMG.png": "source"},
        scorer="python run_gedit_score.py --model_name MODEL --save_path results --backbone gpt4o",
    ),
    Adapter(
        name="imgedit",
        title="ImgEdit-Bench",
        task="edit",
        source="https://github.com/PKU-YuanGroup/ImgEdit",
        prompts="basic_edit.json, beside the folders of its input images",
        read=_imgedit,
        images="image",
        id="{key}",
        category="{edit_type}",
        file="{key}.png",
        scorer="python basic_bench.py --result_img_folder IMAGES --edit_json basic_edit.json "
        "--origin_img_root ORIGINALS --prompts_json prompts.json",
    ),
    Adapter(
        name="risebench",
        title="RISEBench",
        task="edit",
        source="https://github.com/PhoenixZ810/RISEBench",
        prompts="datav2_total_w_subtask.json, beside the folders of its input images",
        read=each_file("data*.json", json_records),
        prompt="instruction",
        images="image",
        id="{index}",
        category="{category}",
        file="{model}/images/{category}/{index}.png",
        count=360,
        scorer="python gpt_eval.py --data data/datav2_total_w_subtask.json --output IMAGES/MODEL",
    ),
    Adapter(
        name="opening",
        title="OpenING",
        task="story",
        source="https://github.com/LanceZPF/OpenING",
        prompts="test_data.jsonl, beside its folder of images",
        read=_opening,
        images="images",
        id="{total_uid}",
        category="{meta_task_name}",
        file="{model}_output/{total_uid}.json",
        document=True,
        scorer="python GPT_score_A.py, with IMAGES/MODEL_output as its folder",
    ),
)
