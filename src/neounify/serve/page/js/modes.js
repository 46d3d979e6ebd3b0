/** The four modes: their labels, and the request made of an input. */

function imageRequest(kind) {
  return (prompt, sources, options) => ({ kind, prompt, sources, options });
}

/** Images in an answer are asked for as a modality. */
function withImages(options) {
  return { ...options, modalities: ["text", "image"] };
}

export const MODES = [
  {
    id: "chat",
    label: "Your message",
    placeholder: "How many squares are there?",
    action: "Send",
    takesImages: true,
    takesVideos: true,
    lacking: (text, images) => (text || images.length ? "" : "Write a message first."),
    request(prompt, messages, { modalities, ...options }) {
      const chosen = modalities ? withImages(options) : options;
      return { kind: "chat", prompt, messages, options: chosen };
    },
  },
  {
    id: "generate",
    label: "Prompt",
    placeholder: "a red circle",
    action: "Generate",
    takesImages: false,
    lacking: (text) => (text ? "" : "Write a prompt first."),
    request: imageRequest("generate"),
  },
  {
    id: "edit",
    label: "Instruction",
    placeholder: "Turn the square red.",
    action: "Edit",
    takesImages: true,
    lacking(text, images) {
      if (!images.length) return "Add the image to change first.";
      return text ? "" : "Write an instruction first.";
    },
    request: imageRequest("edit"),
  },
  {
    id: "story",
    label: "Prompt",
    placeholder: "Tell a story in two pictures.",
    action: "Generate",
    takesImages: true,
    lacking: (text) => (text ? "" : "Write a prompt first."),
    request: (prompt, sources, options) => imageRequest("story")(prompt, sources, withImages(options)),
  },
];
