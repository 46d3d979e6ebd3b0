/**
 * All settings: name in the API, label, and the modes they belong to.
 *
 * `input` are attributes of an input field, `choices` the values of a list and their labels.
 * `help` is its tooltip; `own` and `limit` are the names of the model's default and of the server's
 * maximum in the description of the model, which has own defaults of videos. `instead` names the
 * field that is emptied when this one is filled. A field that `needs` something of a model is not
 * offered by others.
 */

const IMAGES = ["generate", "edit", "story"];
const DENOISED = [...IMAGES, "video"];
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
    name: "seconds",
    label: "Seconds",
    help: "Length of the video, rounded to whole tubes of frames",
    instead: "frames",
    kinds: ["video"],
    input: { type: "number", min: 0.1, step: "any" },
  },
  {
    name: "frames",
    label: "Frames",
    help: "Number of frames, instead of the seconds",
    own: "frames",
    limit: "output_frames",
    instead: "seconds",
    kinds: ["video"],
    input: { type: "number", min: 1, step: 1 },
  },
  {
    name: "fps",
    label: "Frames a second",
    help: "How fast the frames follow each other",
    own: "fps",
    kinds: ["video"],
    input: { type: "number", min: 0.1, step: "any" },
  },
  {
    name: "size",
    label: "Size",
    help: "Width x height in pixels, like 64x64, or auto",
    own: "size",
    kinds: DENOISED,
    input: { type: "text", pattern: "auto|\\d+x\\d+" },
  },
  {
    name: "steps",
    label: "Steps",
    help: "More steps take longer",
    own: "steps",
    limit: "steps",
    kinds: DENOISED,
    input: { type: "number", min: 1, max: 1000, step: 1 },
  },
  {
    name: "fast",
    label: "Fast",
    help: "Fewer steps than the model's own; instead of a number of steps",
    kinds: DENOISED,
    choices: { "": "All steps", half: "Half the steps", third: "A third of the time" },
  },
  {
    name: "solver",
    label: "Solver",
    help: "How the steps are taken",
    own: "solver",
    kinds: DENOISED,
    choices: { "": "default", euler: "euler", ab2: "ab2", dpm2m: "dpm2m", unipc: "unipc" },
  },
  {
    name: "guidance",
    label: "Guidance",
    help: "Strength of the prompt (classifier-free guidance); 1 is none",
    own: "guidance",
    kinds: DENOISED,
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
    kinds: DENOISED,
    input: { type: "number", min: 0.01, max: 1000, step: "any" },
  },
  {
    name: "negative_prompt",
    label: "Negative prompt",
    help: "What guidance steers away from",
    kinds: DENOISED,
    wide: true,
    input: { type: "text", maxlength: 2000, placeholder: "none" },
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
    kinds: ["chat", "generate", "video", "edit", "story"],
    input: { type: "number", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
  },
  {
    name: "think",
    needs: "think",
    label: "Think first",
    help: "Plan before answering",
    kinds: ["chat", "generate", "edit", "story"],
    input: { type: "checkbox" },
  },
  {
    name: "modalities",
    needs: "interleave",
    label: "Answer with images",
    help: "Uses the last message only",
    kinds: ["chat"],
    input: { type: "checkbox" },
  },
];
