/** The four modes: their words, and how what was entered becomes a request. */

function painting(kind) {
  return (prompt, sources, options) => ({ kind, prompt, sources, options });
}

/** Pictures in an answer are asked for as a modality. */
function withPictures(options) {
  return { ...options, modalities: ["text", "image"] };
}

export const MODES = [
  {
    id: "chat",
    label: "Your message",
    placeholder: "How many squares are there?",
    action: "Send",
    takesPictures: true,
    lacking: (text, pictures) => (text || pictures.length ? "" : "Write something first."),
    request(prompt, messages, { modalities, ...options }) {
      const chosen = modalities ? withPictures(options) : options;
      return { kind: "chat", prompt, messages, options: chosen };
    },
  },
  {
    id: "paint",
    label: "What to paint",
    placeholder: "a red circle",
    action: "Paint",
    takesPictures: false,
    lacking: (text) => (text ? "" : "Write what to paint first."),
    request: painting("paint"),
  },
  {
    id: "edit",
    label: "What to change",
    placeholder: "Turn the square red.",
    action: "Edit",
    takesPictures: true,
    lacking(text, pictures) {
      if (!pictures.length) return "Add the picture to change first.";
      return text ? "" : "Write what to change first.";
    },
    request: painting("edit"),
  },
  {
    id: "story",
    label: "What to tell",
    placeholder: "Tell a story in two pictures.",
    action: "Tell",
    takesPictures: true,
    lacking: (text) => (text ? "" : "Write what to tell first."),
    request: (prompt, sources, options) => painting("story")(prompt, sources, withPictures(options)),
  },
];
