/**
 * All settings: name in the API, label, and the modes they belong to.
 *
 * `input` are attributes of an input field, `choices` the values of a list and their labels.
 * `help` is its tooltip; `own` and `limit` are the names of the model's default and of the server's
 * maximum in the description of the model.
 */

const IMAGES = ["generate", "edit", "story"];
const WORDS = ["chat", "story"];

export const FIELDS = [
  {
    name: "n",
    label: "Images",
    help: "Number of images; image i has seed + i",
    limit: "n",
    kinds: ["generate", "edit"],
    input: { type: "number", min: 1, max: 10, step: 1, placeholder: 1 },
  },
  {
    name: "max_images",
    label: "Max images",
    help: "Maximum number of images in the answer",
    limit: "answer_images",
    kinds: ["story"],
    input: { type: "number", min: 1, max: 10, step: 1 },
  },
  {
    name: "size",
    label: "Size",
    help: "Width x height in pixels, like 64x64, or auto",
    own: "image_size",
    kinds: IMAGES,
    input: { type: "text", pattern: "auto|\\d+x\\d+" },
  },
  {
    name: "steps",
    label: "Steps",
    help: "More steps take longer",
    own: "steps",
    limit: "steps",
    kinds: IMAGES,
    input: { type: "number", min: 1, max: 1000, step: 1 },
  },
  {
    name: "fast",
    label: "Fast",
    help: "Fewer steps than the model's own; instead of a number of steps",
    kinds: IMAGES,
    choices: { "": "All steps", half: "Half the steps", third: "A third of the time" },
  },
  {
    name: "guidance",
    label: "Guidance",
    help: "Strength of the prompt (classifier-free guidance); 1 is none",
    own: "guidance",
    kinds: IMAGES,
    input: { type: "number", min: 0, max: 100, step: "any" },
  },
  {
    name: "image_guidance",
    label: "Image guidance",
    help: "Strength of the input images; 1 is none",
    own: "image_guidance",
    kinds: ["edit", "story"],
    input: { type: "number", min: 0, max: 100, step: "any" },
  },
  {
    name: "shift",
    label: "Shift",
    help: "Above 1, more steps at high noise",
    own: "shift",
    kinds: IMAGES,
    input: { type: "number", min: 0.01, max: 1000, step: "any" },
  },
  {
    name: "temperature",
    label: "Temperature",
    help: "0 always takes the likeliest token",
    kinds: WORDS,
    input: { type: "number", min: 0, max: 2, step: "any" },
  },
  {
    name: "top_p",
    label: "Top p",
    help: "Nucleus sampling: below 1, unlikely tokens are left out",
    kinds: WORDS,
    input: { type: "number", min: 0.01, max: 1, step: "any" },
  },
  {
    name: "max_tokens",
    label: "Max tokens",
    help: "Maximum length of the answer",
    limit: "tokens",
    kinds: WORDS,
    input: { type: "number", min: 1, step: 1 },
  },
  {
    name: "seed",
    label: "Seed",
    help: "The same seed gives the same answer",
    kinds: ["chat", "generate", "edit", "story"],
    input: { type: "number", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
  },
  {
    name: "think",
    label: "Think first",
    help: "Plan before answering",
    kinds: ["chat", "generate", "edit", "story"],
    input: { type: "checkbox" },
  },
  {
    name: "modalities",
    label: "Answer with images",
    help: "Uses the last message only",
    kinds: ["chat"],
    input: { type: "checkbox" },
  },
];
