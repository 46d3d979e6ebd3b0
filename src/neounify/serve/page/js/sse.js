/** Server-sent events, as {event, data}. */

/** Puts lines together to events. */
class Assembler {
  event = "message";
  data = [];

  /** The event this line completes, or null. */
  take(line) {
    if (line.startsWith("event:")) this.event = line.slice(6).trim();
    if (line.startsWith("data:")) this.data.push(line.slice(5).replace(/^ /, ""));
    if (line !== "") return null;
    const complete = this.data.length ? { event: this.event, data: this.data.join("\n") } : null;
    this.event = "message";
    this.data = [];
    return complete;
  }
}

async function* readLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) yield line.replace(/\r$/, "");
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export async function* readEvents(stream) {
  const assembler = new Assembler();
  for await (const line of readLines(stream)) {
    const event = assembler.take(line);
    if (event) yield event;
  }
}
