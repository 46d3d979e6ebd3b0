/** The server's public API, and its errors in plain words. */

import { readEvents } from "./sse.js";
import { apiKey } from "./store.js";

export class ApiError extends Error {
  /**
   * `retryAfter` in seconds, where the server said when to come back; `begun` where the answer
   * had begun, so that the request was not refused but broke off.
   */
  constructor(message, { status = 0, retryAfter = null, begun = false } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
    this.begun = begun;
  }
}

export function brokenOff() {
  const message = "The answer broke off: the connection to the server was lost.";
  return new ApiError(message, { begun: true });
}

/** Messages for errors without one of the server. */
const PLAIN_WORDS = {
  403: "The server does not allow this.",
  404: "The server does not have this.",
  408: "The request took too long to arrive.",
  413: "The request is too large. Send fewer or smaller images.",
  429: "The server is busy.",
  503: "The server cannot answer right now.",
  504: "The request ran out of time.",
};
const KEY_WANTED = "The server requires a valid API key. Enter it under Settings.";

/** GET without a body, else POST: FormData as multipart, anything else as JSON. */
async function call(path, { body, signal, method = body ? "POST" : "GET", keepalive = false } = {}) {
  const headers = {};
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  const isForm = body instanceof FormData;
  if (body && !isForm) headers["Content-Type"] = "application/json";
  const options = { method, headers, signal, keepalive };
  if (body) options.body = isForm ? body : JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const content = await response.json().catch(() => null);
  return new ApiError(describe(response.status, content?.error?.message), {
    status: response.status,
    retryAfter: secondsUntil(response.headers.get("Retry-After")),
  });
}

function describe(status, detail) {
  if (status === 401) return KEY_WANTED;
  const failed = status >= 500 ? "Something went wrong in the server." : null;
  return detail || PLAIN_WORDS[status] || failed || `The server refused this (${status}).`;
}

/** Retry-After is a number of seconds or a date. */
function secondsUntil(header) {
  if (!header) return null;
  const seconds = Number(header);
  const wait = Number.isFinite(seconds) ? seconds : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(wait) ? Math.max(0, Math.ceil(wait)) : null;
}

export async function getModels() {
  return (await getJson("/v1/models")).data;
}

export async function getJson(path, signal) {
  return (await call(path, { signal })).json();
}

export async function postJson(path, body) {
  return (await call(path, { body })).json();
}

export async function getFile(path, signal) {
  return (await call(path, { signal })).blob();
}

/** Ends what is at `path`, also while the page is closed. */
export async function remove(path) {
  await call(path, { method: "DELETE", keepalive: true });
}

/** The JSON events of a streamed answer, with [DONE] as null; an error in the stream is thrown. */
export async function* stream(path, body, signal) {
  const response = await call(path, { body, signal });
  try {
    for await (const { event, data } of readEvents(response.body)) {
      if (data === "[DONE]") {
        yield null;
        return;
      }
      const content = JSON.parse(data);
      if (event === "error" || content.error) {
        const { message, code, retry_after: retryAfter = null } = content.error ?? content;
        throw new ApiError(describe(Number(code) || 500, message), { retryAfter, begun: true });
      }
      yield content;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw brokenOff();
  }
}
