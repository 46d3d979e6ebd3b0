"""Benchmarks of editing and of interleaved answers: fields and files as their scorers read them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from neounify.bench.adapter import Adapter, each_file
from neounify.bench.cases import BenchError, PromptFiles, Record, json_records, jsonl

_MARKS = re.compile(r"<BEGIN>|<image>")


def _imgedit(prompts: PromptFiles) -> Iterator[Record]:
    """{key: {"id": path of the input, "prompt", "edit_type"}}."""
    for record in each_file("*edit.json", json_records)(prompts):
        yield record | {"image": record.get("id")}


def _risebench(prompts: PromptFiles) -> Iterator[Record]:
    """The records have an `index` and a `category` of their benchmark."""
    for record in each_file("data*.json", json_records)(prompts):
        image = record.get("image")
        if not isinstance(image, str):
            raise BenchError(f"RISEBench: record {record['index']} has no single input image")
        yield record


def _opening(prompts: PromptFiles) -> Iterator[Record]:
    """Inputs are steps of text and image; the recorded output is the annotators'."""
    for record in each_file("*data.jsonl", jsonl)(prompts):
        try:
            steps = record["conversations"][0]["input"]
            texts = [_MARKS.sub("", step["text"]).strip() for step in steps]
            images = [step["image"] for step in steps if step["image"]]
            wanted = len(record["conversations"][1]["output"])
        except (KeyError, IndexError, TypeError) as error:
            raise BenchError(
                f"OpenING: record {record['index']} has no conversation of an input and an output "
                f"with text and image ({error!r})"
            ) from error
        inputs = {f"image_{number}": image for number, image in enumerate(images)}
        yield record | inputs | {"prompt": "\n".join(texts), "steps": wanted}


ADAPTERS = (
    Adapter(
        name="gedit",
        title="GEdit-Bench",
        task="edit",
        source="https://github.com/stepfun-ai/Step1X-Edit",
        prompts="info.jsonl: task_type, key, instruction, instruction_language and image, a path",
        read=each_file("*.jsonl", jsonl),
        prompt="instruction",
        images=("image",),
        id="{instruction_language}/{key}",
        category="{task_type}",
        file="{model}/fullset/{task_type}/{instruction_language}/{key}.png",
        macro=True,
        input_copy="{model}/fullset/{task_type}/{instruction_language}/{key}_SRCIMG.png",
        scorer="python run_gedit_score.py --model_name MODEL --save_path results --backbone gpt4o",
    ),
    Adapter(
        name="imgedit",
        title="ImgEdit-Bench",
        task="edit",
        source="https://github.com/PKU-YuanGroup/ImgEdit",
        prompts="basic_edit.json, beside the folders of its input images",
        read=_imgedit,
        images=("image",),
        id="{key}",
        category="{edit_type}",
        file="{key}.png",
        macro=True,
        scorer="python basic_bench.py --result_img_folder IMAGES --edit_json basic_edit.json "
        "--origin_img_root ORIGINALS --prompts_json prompts.json",
    ),
    Adapter(
        name="risebench",
        title="RISEBench",
        task="edit",
        source="https://github.com/PhoenixZ810/RISEBench",
        prompts="datav2_total_w_subtask.json, beside the folders of its input images",
        read=_risebench,
        prompt="instruction",
        images=("image",),
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
        images=tuple(f"image_{number}" for number in range(10)),
        id="{total_uid}",
        category="{meta_task_name}",
        file="{model}_output/{total_uid}.json",
        document=True,
        scorer="python GPT_score_A.py, with IMAGES/MODEL_output as its folder",
    ),
)
