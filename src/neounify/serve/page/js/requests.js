/**
 * Requests to the server and the events of their answers, in one form for every mode.
 *
 * A request is {kind, options} with `messages` (chat) or `prompt` and `sources` (the others);
 * it holds all that is needed to send it again. `perform` gives these events:
 *   {type: "text", text, thought}
 *   {type: "preview", index, step, steps, url, plan}
 *   {type: "image", index, url, seed, plan}
 *   {type: "video", index, url, still, job}
 * `plan` is the thought before that image; `seed` reproduces that image alone; `still` is the first
 * frame of a video, `job` what the server says of it.
 */

import { brokenOff, stream } from "./api.js";
import { isVideo, toFile } from "./files.js";
import { generateVideo } from "./video.js";

const PREVIEWS = 3;
const STREAMED = { stream: true, partial_images: PREVIEWS, response_format: "b64_json" };

export function perform(request, signal) {
  if (request.kind === "generate") return generate(request, signal);
  if (request.kind === "edit") return edit(request, signal);
  if (request.kind === "video") return generateVideo(request, signal);
  return converse(request, signal);
}

export function userMessage(text, images) {
  const parts = images.map((url) => {
    const type = isVideo(url) ? "video_url" : "image_url";
    return { type, [type]: { url } };
  });
  if (text) parts.push({ type: "text", text });
  return { role: "user", content: parts };
}

async function* converse(request, signal) {
  const body = { ...request.options, messages: messagesOf(request), stream: true };
  if (body.modalities) body.partial_images = PREVIEWS;
  let ended = false;
  for await (const chunk of stream("/v1/chat/completions", body, signal)) {
    if (chunk === null) ended = true;
    else for (const choice of chunk.choices ?? []) yield* readDelta(choice.delta ?? {});
  }
  if (!ended) throw brokenOff();
}

/** The server continues a conversation in text; with images it answers one message. */
function messagesOf({ messages, prompt, sources, options }) {
  if (!messages) return [userMessage(prompt, sources)];
  return options.modalities ? messages.slice(-1) : messages;
}

function* readDelta(delta) {
  if (delta.reasoning_content) yield { type: "text", text: delta.reasoning_content, thought: true };
  if (delta.content) yield { type: "text", text: delta.content, thought: false };
  if (delta.image_preview) {
    const { index, step, steps, image_url: image } = delta.image_preview;
    yield { type: "preview", index, step, steps, url: image.url };
  }
  for (const image of delta.images ?? []) {
    yield { type: "image", index: image.index, url: image.image_url.url };
  }
}

function generate(request, signal) {
  const body = { ...request.options, prompt: request.prompt, ...STREAMED };
  return images("/v1/images/generations", body, request.options.n, signal);
}

function edit(request, signal) {
  const form = new FormData();
  const fields = { ...request.options, prompt: request.prompt, ...STREAMED };
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  request.sources.forEach((url, i) => form.append("image[]", toFile(url, `image-${i + 1}`)));
  return images("/v1/images/edits", form, request.options.n, signal);
}

async function* images(path, body, count = 1, signal) {
  let finished = 0;
  for await (const event of stream(path, body, signal)) {
    if (event === null) break;
    const { index, seed, step, steps, reasoning_content: plan } = event;
    const url = `data:image/${event.output_format};base64,${event.b64_json}`;
    if (event.type.endsWith(".partial_image")) {
      yield { type: "preview", index, step, steps, url, plan };
    } else if (event.type.endsWith(".completed")) {
      finished += 1;
      yield { type: "image", index, url, seed, plan };
    }
  }
  if (finished < count) throw brokenOff();
}

/** The request for one image of several: reproduced by its seed. */
export function alone(request, seed) {
  if (seed === undefined) return request;
  const { n, ...options } = request.options;
  return { ...request, options: { ...options, seed } };
}
