/** Input of a mode: text, images, and buttons to send and stop. */

import { button, h } from "./dom.js";
import { isVideo, mediaFiles, readMedia, shown } from "./files.js";
import { Notice } from "./notice.js";

export class Composer {
  /**
   * `mode` has id, label, placeholder, action, takesImages, or what to say to files in `noFiles`,
   * and takesVideos; videos are among the images.
   * `onSubmit(text, images, signal)` does the work; aborting the signal stops it.
   */
  constructor(mode, onSubmit) {
    this.mode = mode;
    this.onSubmit = onSubmit;
    this.images = [];
    this.controller = null;
    this.notice = new Notice();
    this.input = this.makeInput();
    this.strip = h("ul", { class: "attached", "aria-label": "Images to send", hidden: true });
    this.send = h("button", { type: "submit", class: "primary" }, mode.action);
    this.halt = button("Stop", () => this.controller?.abort(), { class: "stop", hidden: true });
    this.element = h(
      "form",
      { class: "composer", on: { submit: (event) => this.submit(event) } },
      h("label", { for: this.input.id }, mode.label),
      this.strip,
      this.input,
      h("div", { class: "buttons" }, ...this.pickers(), h("span", { class: "gap" }), this.halt, this.send),
      this.notice.element,
    );
  }

  get busy() {
    return this.controller !== null;
  }

  fill(text, images = []) {
    this.input.value = text;
    this.setImages(images);
    this.notice.clear();
    this.input.focus();
  }

  setImages(urls) {
    this.images = [...urls];
    this.strip.replaceChildren(...this.images.map((url, i) => this.attached(url, i)));
    this.strip.hidden = this.images.length === 0;
  }

  async addFiles(files) {
    if (!this.mode.takesImages) {
      this.notice.say(this.mode.noFiles);
      return;
    }
    const { takesVideos } = this.mode;
    const images = mediaFiles(files, takesVideos);
    const kinds = takesVideos ? "images and videos" : "images";
    if (images.length < files.length) this.notice.say(`Only ${kinds} can be added.`);
    for (const file of images) {
      try {
        this.setImages([...this.images, await readMedia(file)]);
      } catch {
        this.notice.say(`${file.name} cannot be read as an image.`);
      }
    }
  }

  /** Run `work(signal)` as the request in progress: it can be stopped, and its errors are shown. */
  async run(work) {
    if (this.busy) {
      this.notice.say("A request is in progress: wait for it, or stop it.");
      return;
    }
    this.controller = new AbortController();
    this.notice.clear();
    this.showBusy();
    try {
      await work(this.controller.signal);
    } catch (error) {
      if (error.name !== "AbortError") this.notice.report(error, () => this.run(work));
    } finally {
      this.controller = null;
      this.showBusy();
    }
  }

  submit(event) {
    event.preventDefault();
    const text = this.input.value.trim();
    const lacking = this.mode.lacking(text, this.images);
    if (this.busy) return;
    if (lacking) this.notice.say(lacking);
    else this.onSubmit(text, this.images);
  }

  showBusy() {
    const hadFocus = [this.send, this.halt].includes(document.activeElement);
    this.send.hidden = this.busy;
    this.halt.hidden = !this.busy;
    if (hadFocus) (this.busy ? this.halt : this.send).focus();
  }

  makeInput() {
    const { id, placeholder } = this.mode;
    const props = { id: `${id}-input`, rows: 2, placeholder, enterkeyhint: "send" };
    const input = h("textarea", props);
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.element.requestSubmit();
    });
    return input;
  }

  pickers() {
    if (!this.mode.takesImages) return [];
    const accept = this.mode.takesVideos ? "image/*,video/*" : "image/*";
    const file = h("input", { type: "file", accept, multiple: true, hidden: true });
    file.setAttribute("aria-label", "Images");
    file.addEventListener("change", async () => {
      await this.addFiles([...file.files]);
      file.value = "";
    });
    return [file, button(this.mode.takesVideos ? "Add images or videos" : "Add images", () => file.click(), {
      class: "quiet",
    })];
  }

  attached(url, i) {
    const remove = () => this.setImages(this.images.filter((_, other) => other !== i));
    const label = `Remove ${isVideo(url) ? "video" : "image"} ${i + 1}`;
    return h(
      "li",
      {},
      shown(url, i),
      button("×", remove, { class: "remove", "aria-label": label, title: label }),
    );
  }
}
