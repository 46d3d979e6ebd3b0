/** Where one writes, adds pictures, sends and stops. Every mode has one. */

import { button, h } from "./dom.js";
import { pictureFiles, readPicture } from "./files.js";
import { Notice } from "./notice.js";

export class Composer {
  /**
   * `mode` gives the words: id, label, placeholder, action, examples, takesPictures.
   * `onSubmit(text, pictures, signal)` does the work; aborting the signal stops it.
   */
  constructor(mode, onSubmit) {
    this.mode = mode;
    this.onSubmit = onSubmit;
    this.pictures = [];
    this.controller = null;
    this.notice = new Notice();
    this.input = this.makeInput();
    this.strip = h("ul", { class: "attached", "aria-label": "Pictures to send", hidden: true });
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

  fill(text, pictures = []) {
    this.input.value = text;
    this.setPictures(pictures);
    this.notice.clear();
    this.input.focus();
  }

  setPictures(urls) {
    this.pictures = [...urls];
    this.strip.replaceChildren(...this.pictures.map((url, i) => this.attached(url, i)));
    this.strip.hidden = this.pictures.length === 0;
  }

  async addFiles(files) {
    if (!this.mode.takesPictures) {
      this.notice.say("Painting takes words only. Pictures can be changed under Edit.");
      return;
    }
    const images = pictureFiles(files);
    if (images.length < files.length) this.notice.say("Only pictures can be added.");
    for (const file of images) {
      try {
        this.setPictures([...this.pictures, await readPicture(file)]);
      } catch {
        this.notice.say(`${file.name} cannot be read as a picture.`);
      }
    }
  }

  /** Run a piece of work as if it had been sent from here: it can be stopped, it may fail. */
  async run(work) {
    if (this.busy) {
      this.notice.say("One thing at a time: wait for what is under way, or stop it.");
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
    const lacking = this.mode.lacking(text, this.pictures);
    if (this.busy) return;
    if (lacking) this.notice.say(lacking);
    else this.onSubmit(text, this.pictures);
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
    if (!this.mode.takesPictures) return [];
    const file = h("input", { type: "file", accept: "image/*", multiple: true, hidden: true });
    file.setAttribute("aria-label", "Pictures");
    file.addEventListener("change", async () => {
      await this.addFiles([...file.files]);
      file.value = "";
    });
    return [file, button("Add pictures", () => file.click(), { class: "quiet" })];
  }

  attached(url, i) {
    const remove = () => this.setPictures(this.pictures.filter((_, other) => other !== i));
    const label = `Remove picture ${i + 1}`;
    return h(
      "li",
      {},
      h("img", { src: url, alt: `Picture ${i + 1}` }),
      button("×", remove, { class: "remove", "aria-label": label, title: label }),
    );
  }
}
