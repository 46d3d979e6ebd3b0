"""From the fields of an image request to what the engines answer."""

from __future__ import annotations

import PIL.Image

from neounify.pipeline.request import PaintRequest
from neounify.serve.http.context import Context, new_seed
from neounify.serve.http.errors import bad_request
from neounify.serve.http.image_schema import ImageBody


async def read_paint(
    body: ImageBody, images: tuple[PIL.Image.Image, ...], context: Context
) -> list[PaintRequest]:
    """One request per image, with seeds in turn.

    Not one request of several images, since those share one draw of noise: image i would
    then depend on how many there are, and could not be painted again by its own seed.

    Raises ApiError, PromptError, ImageError, RequestError and Refused.
    """
    context.check_model(body.model)
    context.check_n(body.n)
    if body.stream and body.response_format == "url":
        raise bad_request("response_format: a stream sends b64_json only", "response_format")
    if body.response_format == "url" and not context.settings.result_urls:
        raise bad_request(
            "response_format: this server keeps no results; ask for b64_json", "response_format"
        )
    if not body.prompt.strip():
        raise bad_request("prompt: a text is needed", "prompt", "invalid_prompt")
    texts = (body.prompt, body.negative_prompt)
    await context.check_prompt(filter(None, texts), images)
    width, height = context.size(body, images[0] if images else None)
    steps = body.steps_of(context.service.config.sampling.steps)
    sampling = context.sampling(body, editing=bool(images), steps=steps)
    seed = new_seed(body.seed)
    return [
        PaintRequest(
            prompt=body.prompt,
            width=width,
            height=height,
            sampling=sampling,
            images=images,
            seed=seed + number,
            think=bool(body.think),
            negative_prompt=body.negative_prompt,
        )
        for number in range(body.n)
    ]
