// What the page says to the server. Every failure becomes an Error whose message can be read aloud.

const KEY = "trm-api-key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => sessionStorage.setItem(KEY, key),
};

/** The server refused, or failed. `status` is 0 where it was not reached or broke off. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The served model: id, n_supervision, max_supervision. */
export async function servedModel() {
  const { data } = await (await send("v1/models")).json();
  return data[0];
}

/** Ask for one reply. Yields its chunks as they come. */
export async function* chat(body, signal) {
  const response = await send("v1/chat/completions", { ...body, stream: true }, signal);
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(inWords(0, chunk.error));
    yield chunk;
  }
  throw new ServerError("The connection broke before the reply was complete.");
}

/** Ask for a majority vote. */
export async function solve(body, signal) {
  return (await send("solve", body, signal)).json();
}

async function send(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const response = await reached(fetch(path, { ...options, headers, signal }));
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw new ServerError(inWords(response.status, error), response.status);
}

/** Wait for the network; what it throws besides our own stopping has no message for people. */
async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?");
  }
}

function inWords(status, error) {
  const said = error?.message ?? `the server answered with status ${status}`;
  if (status === 401) return apiKey.get() ? "The server refused this API key." : "This server wants an API key.";
  if (status === 429) return "The server is busy and its queue is full. Try again in a moment.";
  if (error?.code === "context_length_exceeded") return `The question is too long: ${said}.`;
  if (error?.code === "draining") return "The server is shutting down and takes no more questions.";
  return `That did not work: ${said}.`;
}

async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reached(reader.read());
      if (done) return;
      const events = (buffer + value).split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        if (event.startsWith("data: ")) yield event.slice("data: ".length); // the rest are comments
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have broken already
  }
}
