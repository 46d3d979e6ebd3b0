/** Generate, Edit and Story: a card of results per request, the newest on top. */

import { Answer } from "./answer.js";
import { Composer } from "./composer.js";
import { button, h } from "./dom.js";
import { makeExamples } from "./examples.js";
import { perform } from "./requests.js";

export class Studio {
  constructor(panel, mode, settings, actions) {
    this.mode = mode;
    this.actions = actions;
    this.composer = new Composer(mode, (prompt, sources) => {
      if (settings.check()) this.start(mode.request(prompt, sources, settings.options()));
    });
    this.results = h("div", { class: "results", "aria-live": "polite" });
    panel.append(
      this.composer.element,
      makeExamples(mode.id, (text, images) => this.composer.fill(text, images)),
      this.results,
    );
  }

  /** Run a request, new or again: it holds all it needs. */
  start(request) {
    return this.composer.run((signal) => this.work(request, signal));
  }

  async work(request, signal) {
    const expected = request.kind === "story" ? 0 : (request.options.n ?? 1);
    const answer = new Answer(request, this.actions, expected);
    const card = makeCard(request, answer);
    this.results.prepend(card);
    try {
      for await (const event of perform(request, signal)) answer.add(event);
      answer.end();
    } catch (error) {
      const stopped = error.name === "AbortError";
      answer.end(stopped ? "Stopped." : error.message);
      if (stopped || answer.started || error.begun) {
        const again = () => this.actions.again(request);
        const label = stopped ? "Regenerate" : "Try again";
        answer.offer(button(label, again, { class: "small-button" }));
      } else {
        card.remove(); // refused: the notice below the button says why, and offers to try again
      }
      throw error;
    }
  }
}

function makeCard(request, answer) {
  const sources = request.sources.map((url, i) =>
    h("img", { src: url, alt: `Image ${i + 1} of the input`, class: "source" }),
  );
  return h(
    "article",
    { class: "card" },
    h("header", {}, ...sources, h("p", { class: "prompt" }, request.prompt)),
    answer.element,
    h("p", { class: "seed" }, showSeeds(request.options)),
  );
}

function showSeeds({ seed, n = 1 }) {
  return n === 1 ? `Seed ${seed}` : `Seeds ${seed} to ${seed + n - 1}`;
}
