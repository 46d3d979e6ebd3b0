/** Error messages near the action, with a button to try again. */

import { button, h } from "./dom.js";

/** Statuses that the same request would get again. */
const IN_VAIN = new Set([400, 403, 404, 413, 422]);

export class Notice {
  constructor() {
    this.element = h("div", { class: "notice", role: "alert", hidden: true });
    this.timer = null;
  }

  clear() {
    clearInterval(this.timer);
    this.element.hidden = true;
    this.element.replaceChildren();
  }

  say(words) {
    this.clear();
    this.element.append(h("p", {}, words));
    this.element.hidden = false;
  }

  /** An ApiError; `again` sends the request once more, when the server wants it again. */
  report(error, again) {
    this.say(error.message);
    if (IN_VAIN.has(error.status)) return;
    const retry = button("Try again", () => {
      this.clear();
      again();
    });
    this.element.append(retry);
    if (error.retryAfter) this.countDown(error.retryAfter, retry);
  }

  /** The seconds are no alert: only their first word is read aloud. */
  countDown(seconds, retry) {
    const left = h("p", { class: "countdown", "aria-live": "off" });
    const end = Date.now() + seconds * 1000;
    const show = () => {
      const rest = Math.ceil((end - Date.now()) / 1000);
      retry.disabled = rest > 0;
      left.textContent = rest > 0 ? `Try again in ${rest} s.` : "You can try again now.";
      if (rest <= 0) clearInterval(this.timer);
    };
    this.element.insertBefore(left, retry);
    this.timer = setInterval(show, 250);
    show();
  }
}
