// The AI SDK, with its provider for OpenAI-compatible servers and, over the Responses API, its default one.

import assert from "node:assert/strict";

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const { BASE_URL, KEY, MODEL, QUESTION } = process.env;
const add = tool({
  description: "Adds two numbers.",
  inputSchema: z.object({ a: z.number().int(), b: z.number().int() }),
});

const openai = createOpenAI({ baseURL: BASE_URL, apiKey: KEY });
const compatible = createOpenAICompatible({
  name: "qwen-trm", baseURL: BASE_URL, apiKey: KEY, supportsStructuredOutputs: true,
});
const models = { compatible: compatible(MODEL), chat: openai.chat(MODEL), responses: openai(MODEL) };

for (const name of process.argv.slice(2)) {
  // Nothing is stored, so later turns must hold what was said, not references to it.
  const providerOptions = { openai: { store: false } };
  const ask = { model: models[name], maxOutputTokens: 200, providerOptions };
  const whole = await generateText({ ...ask, prompt: QUESTION });
  assert.match(whole.text, /\\boxed\{/);
  let streamed = "";
  for await (const piece of streamText({ ...ask, prompt: QUESTION }).textStream) streamed += piece;
  assert.equal(streamed, whole.text);
  const question = { role: "user", content: QUESTION };
  assert.ok((await generateText({ ...ask, messages: [question, ...whole.response.messages, question] })).text);
  const { object } = await generateObject({ ...ask, prompt: QUESTION, schema: z.object({ answer: z.number().int() }) });
  assert.ok(Number.isInteger(object.answer));
  const toolChoice = { type: "tool", toolName: "add" };
  const called = await generateText({ ...ask, prompt: QUESTION, tools: { add }, toolChoice });
  const [call] = called.toolCalls;
  assert.deepEqual(Object.keys(call.input).sort(), ["a", "b"]);
  const output = { type: "text", value: "19" };
  const result = { type: "tool-result", toolCallId: call.toolCallId, toolName: "add", output };
  const history = [question, ...called.response.messages, { role: "tool", content: [result] }];
  assert.ok((await generateText({ ...ask, messages: history, tools: { add } })).finishReason);
}
