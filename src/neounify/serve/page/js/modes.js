/**
 * The modes: their labels, the request made of an input, and what a model must be trained for,
 * `needs`, in the words of the server's description of it.
 */

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
    needs: "chat",
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
    needs: "generate",
    label: "Prompt",
    placeholder: "a red circle",
    action: "Generate",
    takesImages: false,
    noFiles: "Generation takes a prompt only. Images can be changed under Edit.",
    lacking: (text) => (text ? "" : "Write a prompt first."),
    request: imageRequest("generate"),
  },
  {
    id: "video",
    needs: "generate_video",
    label: "Prompt",
    placeholder: "A red circle moves to the right.",
    action: "Generate",
    takesImages: false,
    noFiles: "Videos are generated from a prompt only.",
    lacking: (text) => (text ? "" : "Write a prompt first."),
    request: imageRequest("video"),
  },
  {
    id: "edit",
    needs: "edit",
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
    needs: "interleave",
    label: "Prompt",
    placeholder: "Tell a story in two pictures.",
    action: "Generate",
    takesImages: true,
    lacking: (text) => (text ? "" : "Write a prompt first."),
    request: (prompt, sources, options) => imageRequest("story")(prompt, sources, withImages(options)),
  },
];
