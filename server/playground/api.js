// What the page says to the server. Every failure becomes an Error whose message can be read aloud.

const KEY = "trm-api-key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => sessionStorage.setItem(KEY, key),
};

/** The server refused, or failed: with a status and a code, unless it was not reached. */
export class ServerError extends Error {
  constructor(message, status, code) {
    super(message);
    Object.assign(this, { status, code });
  }
}

/** The served models, the server's own first: id, n_supervision, max_supervision, work. */
export async function servedModels() {
  const { data } = await (await send("v1/models")).json();
  return data;
}

/** Ask for one reply: its chunks as they come. */
export const chat = (body, signal) => stream("v1/chat/completions", body, signal);

/** Ask for a majority vote: where it stands whenever a sample has ended. */
export const solve = (body, signal) => stream("solve", body, signal);

async function* stream(path, body, signal) {
  const response = await send(path, { ...body, stream: true }, signal);
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw refusal(response.status, event.error);
    yield event;
  }
  throw new ServerError("The connection broke before the reply was complete.");
}

async function send(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const response = await reached(fetch(path, { ...options, headers, signal }));
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw refusal(response.status, error ?? {});
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

const WORDS = {
  queue_full: "The server is busy and its queue is full. Try again in a moment.",
  starting: "The server is still loading its model.",
  draining: "The server is shutting down and takes no more questions.",
};

function refusal(status, { message = `the server answered with status ${status}`, code }) {
  const words = {
    ...WORDS,
    invalid_api_key: apiKey.get() ? "The server refused this API key." : "This server needs an API key.",
    context_length_exceeded: `The question is too long: ${message}.`,
  };
  return new ServerError(words[code] ?? `That did not work: ${message}.`, status, code);
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
