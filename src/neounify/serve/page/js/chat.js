/** Chat: a conversation with streamed answers. */

import { Answer } from "./answer.js";
import { Composer } from "./composer.js";
import { button, h } from "./dom.js";
import { makeExamples } from "./examples.js";
import { shown } from "./files.js";
import { perform, userMessage } from "./requests.js";

const NEAR = 160;

export class Chat {
  constructor(panel, mode, settings, actions) {
    this.actions = actions;
    this.messages = [];
    this.composer = new Composer(mode, (text, images) => {
      if (!settings.check()) return;
      const messages = [...this.messages, userMessage(text, images)];
      this.start(mode.request(text, messages, settings.options()));
    });
    this.log = h("div", { class: "log", role: "log", "aria-label": "Conversation" });
    this.welcome = h(
      "div",
      { class: "welcome" },
      h("p", {}, "Ask a question, with or without images and videos."),
      makeExamples(mode.id, (text, images) => this.composer.fill(text, images)),
    );
    this.fresh = button("New conversation", () => this.clear(), { class: "quiet", hidden: true });
    panel.classList.add("chat");
    panel.append(this.fresh, this.welcome, this.log, this.composer.element);
  }

  clear() {
    this.composer.controller?.abort();
    this.messages = [];
    this.log.replaceChildren();
    this.welcome.hidden = false;
    this.fresh.hidden = true;
    this.composer.fill("");
  }

  /** Run a request, new or again: it holds its whole conversation. */
  start(request) {
    return this.composer.run((signal) => this.work(request, signal));
  }

  async work(request, signal) {
    const { composer } = this;
    const answer = new Answer(request, this.actions);
    const asked = showQuestion(request.messages.at(-1));
    const written = [composer.input.value, composer.images];
    composer.fill("");
    this.append(asked, answer.element);
    try {
      for await (const event of perform(request, signal)) {
        const following = this.isAtEnd();
        answer.add(event);
        if (following) this.scrollToEnd();
      }
      answer.end();
      this.keep(request, answer);
    } catch (error) {
      const stopped = error.name === "AbortError";
      answer.end(stopped ? "Stopped." : error.message);
      if (!answer.element.isConnected) throw error;
      if (answer.started) this.keep(request, answer);
      else if (stopped || error.begun) this.offerAgain(request, answer);
      else this.withdraw([asked, answer.element], written);
      throw error;
    }
  }

  append(...elements) {
    this.welcome.hidden = true;
    this.fresh.hidden = false;
    this.log.append(...elements);
    this.scrollToEnd();
  }

  /** Take back a question that got no answer at all: it can be sent once more. */
  withdraw(elements, [text, images]) {
    for (const element of elements) element.remove();
    this.welcome.hidden = this.log.childElementCount > 0;
    this.fresh.hidden = !this.welcome.hidden;
    if (!this.composer.input.value) this.composer.fill(text, images);
  }

  keep(request, answer) {
    this.messages = [...request.messages, answer.message()];
    this.offerAgain(request, answer);
  }

  offerAgain(request, answer) {
    const again = button("Regenerate", () => this.actions.again(request), { class: "small-button" });
    answer.offer(again, h("span", { class: "seed" }, `Seed ${request.options.seed}`));
    if (this.isAtEnd()) this.scrollToEnd();
  }

  isAtEnd() {
    return this.log.getBoundingClientRect().bottom < window.innerHeight + NEAR;
  }

  scrollToEnd() {
    this.log.lastElementChild?.scrollIntoView({ block: "end" });
  }
}

function showQuestion(message) {
  const images = message.content.filter((part) => part.type !== "text");
  const text = message.content.find((part) => part.type === "text")?.text ?? "";
  return h(
    "div",
    { class: "question" },
    images.length ? h("div", { class: "given" }, ...images.map((part, i) => shown(part[part.type].url, i))) : null,
    text ? h("div", { class: "text" }, text) : null,
  );
}
