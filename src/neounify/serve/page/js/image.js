/** One image or video of an answer, from the first preview to the finished thing. */

import { button, h } from "./dom.js";
import { download, save } from "./files.js";

export class Tile {
  constructor(record, index) {
    this.record = record;
    this.index = index;
    this.image = null;
    const what = record.kind === "video" ? "video" : "image";
    this.progress = h("progress", { max: 1, "aria-label": `Progress of the ${what}` });
    this.words = h("span", {}, "Waiting for its turn");
    this.frame = h("div", { class: "frame" });
    this.caption = h("figcaption", {}, this.progress, this.words);
    this.plan = h("div", { class: "text" });
    this.folded = h(
      "details",
      { class: "thought", hidden: true },
      h("summary", {}, "Thought"),
      this.plan,
    );
    this.element = h(
      "figure",
      { class: `tile ${what}`, "data-state": "waiting" },
      this.frame,
      this.caption,
      this.folded,
    );
  }

  /** Of a video, `words` in place of the step, and its `job`; without `url` what was shown stays. */
  preview({ step, steps, url, plan, job, words = `Step ${step} of ${steps}` }) {
    this.element.dataset.state = "generating";
    if (job) this.fit(job.size);
    if (url) this.show(url, `Preview of: ${this.record.prompt}`, plan);
    this.progress.max = steps;
    this.progress.value = step;
    this.words.textContent = words;
  }

  /** `actions` are buttons for the finished image. */
  finish(url, actions, plan) {
    this.element.dataset.state = "finished";
    this.show(url, this.record.prompt, plan);
    this.caption.replaceChildren(...actions);
  }

  /** A video in place of its previews; `job` has its frames and seconds. */
  finishVideo({ url, still, job }, actions) {
    this.element.dataset.state = "finished";
    const seconds = Number(Number(job.seconds).toFixed(2));
    const facts = `${job.frames} frames, ${seconds} s, ${job.size}`;
    this.fit(job.size);
    this.frame.replaceChildren(player(url, still, this.record.prompt));
    this.caption.replaceChildren(...actions, h("span", { class: "seconds" }, facts));
  }

  /** No more will come; `named` says so at this image, where it is one of several. */
  stop(named) {
    if (this.element.dataset.state === "finished") return;
    this.element.dataset.state = "stopped";
    const reached = this.image ? ` (${this.words.textContent.toLowerCase()})` : "";
    this.caption.replaceChildren(named || this.image ? `Not finished${reached}` : "");
    if (!this.image && !named) this.element.hidden = true;
  }

  /** Give the frame the shape of a size such as 832x480. */
  fit(size) {
    this.frame.style.aspectRatio = size.replace("x", " / ");
  }

  show(url, alt, plan = "") {
    if (!this.image) this.frame.append((this.image = h("img")));
    this.image.src = url;
    this.image.alt = alt;
    this.plan.textContent = plan;
    this.folded.hidden = plan === "";
  }
}

/** A video that plays on demand, again and again; `still` is its first frame. */
export function player(url, still, label) {
  const props = { controls: true, loop: true, playsinline: true, preload: "auto" };
  return h("video", { ...props, src: url, poster: still, "aria-label": label });
}

/**
 * The buttons of a finished image, or of a video, which has a `still`; `actions` has
 * `again(record)`, `edit(url)` and `edits()`, whether the model edits images.
 */
export function imageActions({ record, index, url, still }, actions) {
  const stem = `neounify-${record.kind}-seed-${record.options.seed}-${index + 1}`;
  const saved = () => (still ? save(url, `${stem}.mp4`) : download(url, stem));
  const buttons = [["Download", saved], ["Regenerate", () => actions.again(record)]];
  if (!still && actions.edits()) buttons.push(["Edit this", () => actions.edit(url)]);
  return buttons.map(([label, act]) => button(label, act, { class: "small-button" }));
}
