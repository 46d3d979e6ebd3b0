/** Videos are jobs of the server: begun, asked for until they are done, fetched, and forgotten. */

import { ApiError, getFile, getJson, postJson, remove } from "./api.js";
import { toDataUrl } from "./files.js";

/** Milliseconds between two questions for the state of a job. */
const PAUSE = 700;
/** Questions in a row that may be lost before the job counts as lost. */
const MAX_LOST = 5;
/** Statuses after which the server may be asked again. */
const PASSING = new Set([0, 429, 502, 503, 504]);

/** Addresses of the jobs that are under way. */
const running = new Set();

// Nothing would fetch their videos later.
window.addEventListener("pagehide", () => {
  for (const address of running) forget(address);
});

/** The events of a video: previews of one frame, then the file. */
export async function* generateVideo({ options, prompt }, signal) {
  // Without the signal, as a job whose number is not known yet cannot be ended.
  const job = await postJson("/v1/videos", { ...options, prompt });
  const address = `/v1/videos/${encodeURIComponent(job.id)}`;
  running.add(address);
  try {
    yield* watch(address, job, signal);
    const content = `${address}/content`;
    const [file, still] = await Promise.all([
      getFile(content, signal),
      getFile(`${content}?variant=thumbnail`, signal),
    ]);
    const url = URL.createObjectURL(file);
    yield { type: "video", index: 0, url, still: await toDataUrl(still), job };
  } finally {
    running.delete(address);
    forget(address);
  }
}

async function* watch(address, begun, signal) {
  let job = begun;
  let shown = 0;
  while (job.status !== "completed") {
    if (job.status === "failed") throw failure(job.error);
    if (job.progress > shown) {
      shown = job.progress;
      const progress = { step: shown, steps: 100, words: `${shown} % of ${job.frames} frames` };
      yield { type: "preview", index: 0, ...progress, url: await still(address, signal), job };
    }
    await pause(PAUSE, signal);
    job = await state(address, signal);
  }
}

/** The state of a job; a server that cannot be reached or is busy is asked again. */
async function state(address, signal) {
  for (let lost = 1; ; lost++) {
    try {
      return await getJson(address, signal);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (!PASSING.has(error.status) || lost === MAX_LOST) throw after(error);
      await pause(Math.max(PAUSE, 1000 * (error.retryAfter ?? 0)), signal);
    }
  }
}

/** The newest preview, or null where there is none yet. */
async function still(address, signal) {
  try {
    return await toDataUrl(await getFile(`${address}/content?variant=thumbnail`, signal));
  } catch (error) {
    if (error instanceof ApiError) return null;
    throw error;
  }
}

function failure(error) {
  return new ApiError(error?.message ?? "The video failed.", { begun: true });
}

/** An error of a job that was begun. */
function after({ message, status, retryAfter }) {
  const gone = status === 404;
  const words = gone ? "The server has lost this video; it may have started again." : message;
  return new ApiError(words, { status: gone ? 0 : status, retryAfter, begun: true });
}

function forget(address) {
  remove(address).catch(() => {});
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", end);
      resolve();
    }, milliseconds);
    if (signal.aborted) end();
    else signal.addEventListener("abort", end, { once: true });
  });
}
