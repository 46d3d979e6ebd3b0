/**
 * Every setting there is: its name in the API, its label, and the modes it belongs to.
 *
 * `help` says what it does, `own` and `limit` are its names in the server's description of the
 * model: the model's own value, and the most the server takes.
 */

const PICTURES = ["paint", "edit", "story"];
const WORDS = ["chat", "story"];

export const FIELDS = [
  {
    name: "n",
    label: "Pictures",
    help: "How many pictures to paint; picture i has seed + i",
    limit: "n",
    kinds: ["paint", "edit"],
    input: { type: "number", min: 1, max: 10, step: 1, placeholder: 1 },
  },
  {
    name: "max_images",
    label: "Pictures at most",
    help: "More pictures than this are not painted",
    limit: "answer_images",
    kinds: ["story"],
    input: { type: "number", min: 1, max: 10, step: 1 },
  },
  {
    name: "size",
    label: "Size",
    help: "Width x height in pixels, like 64x64, or auto",
    own: "image_size",
    kinds: PICTURES,
    input: { type: "text", pattern: "auto|\\d+x\\d+" },
  },
  {
    name: "steps",
    label: "Steps",
    help: "More steps take longer",
    own: "steps",
    limit: "steps",
    kinds: PICTURES,
    input: { type: "number", min: 1, max: 1000, step: 1 },
  },
  {
    name: "guidance",
    label: "Guidance",
    help: "How strongly the words pull; 1 is none",
    own: "guidance",
    kinds: PICTURES,
    input: { type: "number", min: 0, max: 100, step: "any" },
  },
  {
    name: "image_guidance",
    label: "Image guidance",
    help: "How strongly the given pictures pull; 1 is none",
    own: "image_guidance",
    kinds: ["edit", "story"],
    input: { type: "number", min: 0, max: 100, step: "any" },
  },
  {
    name: "shift",
    label: "Shift",
    help: "Above 1, more steps go into the noise",
    own: "shift",
    kinds: PICTURES,
    input: { type: "number", min: 0.01, max: 1000, step: "any" },
  },
  {
    name: "temperature",
    label: "Temperature",
    help: "0 takes the likeliest word",
    kinds: WORDS,
    input: { type: "number", min: 0, max: 2, step: "any" },
  },
  {
    name: "top_p",
    label: "Top p",
    help: "Below 1, unlikely words are left out",
    kinds: WORDS,
    input: { type: "number", min: 0.01, max: 1, step: "any" },
  },
  {
    name: "max_tokens",
    label: "Tokens at most",
    help: "Where the answer is cut off",
    limit: "tokens",
    kinds: WORDS,
    input: { type: "number", min: 1, step: 1 },
  },
  {
    name: "seed",
    label: "Seed",
    help: "The same seed paints the same picture",
    kinds: ["chat", "paint", "edit", "story"],
    input: { type: "number", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
  },
  {
    name: "think",
    label: "Think first",
    help: "Plan before answering",
    kinds: ["chat", "paint", "edit", "story"],
    input: { type: "checkbox" },
  },
  {
    name: "modalities",
    label: "May answer with pictures",
    help: "Such an answer looks at the last message only",
    kinds: ["chat"],
    input: { type: "checkbox" },
  },
];
