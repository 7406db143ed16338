// Vercel's AI SDK, unchanged: its provider for servers like ours, and OpenAI's own over Responses.

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import {
  APICallError, Output, embedMany, generateObject, generateText, stepCountIs, streamObject,
  streamText, tool,
} from "ai";
import { z } from "zod";

const { demo, strict } = JSON.parse(process.env.QUANTD_TEST_SERVERS);
const KEY = process.env.QUANTD_TEST_KEY;
const compatible = (server, apiKey = "none") =>
  createOpenAICompatible({
    name: "quantd", baseURL: `${server.url}/v1`, apiKey,
    includeUsage: true, supportsStructuredOutputs: true,
  });
const openai = createOpenAI({ baseURL: `${demo.url}/v1`, apiKey: "none" });
const MODELS = {
  "openai-compatible": compatible(demo)("demo"),
  "openai, responses": openai("demo"),
  "openai, chat": openai.chat("demo"),
};
const SUM = "What is 3 + 4?";
const WEATHER = "What is the weather in Paris?";
const PERSON = z.object({ name: z.string(), city: z.string() });
const EXTRACT = "Extract the name and city as JSON: Ana Berg moved to Oslo on 4 May 2021.";

function weather(asked) {
  return tool({
    description: "Get the weather",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => {
      asked.push(city);
      return { weather: "sunny" };
    },
  });
}

for (const [name, model] of Object.entries(MODELS)) {
  describe(name, () => {
    const ask = { model, temperature: 0, maxOutputTokens: 200, maxRetries: 0 };

    test("generateText", async () => {
      const { text, finishReason, usage, warnings } = await generateText({ ...ask, prompt: SUM });
      assert.deepEqual([text, finishReason], ["3 + 4 = 7", "stop"]);
      assert(usage.inputTokens > 0 && usage.outputTokens > 1);
      assert.equal(usage.totalTokens, usage.inputTokens + usage.outputTokens);
      assert.deepEqual(warnings ?? [], []);
      const long = { ...ask, prompt: "What is quantd?", maxOutputTokens: 16 };
      assert.equal((await generateText(long)).finishReason, "length");
    });

    test("streamText", async () => {
      const pieces = [];
      const errors = [];
      const onError = ({ error }) => errors.push(error);
      const system = "Be brief.";
      const stream = streamText({ ...ask, system, prompt: SUM, onError });
      for await (const piece of stream.textStream) pieces.push(piece);
      assert.deepEqual(errors, []);
      assert(pieces.length > 1);
      assert.equal(pieces.join(""), await stream.text);
      assert.match(await stream.text, /7/);
      assert.equal(await stream.finishReason, "stop");
      const usage = await stream.usage;
      assert(usage.inputTokens > 0 && usage.outputTokens > 1);
    });

    test("generateObject, Output.object and streamObject agree", async () => {
      const { object } = await generateObject({ ...ask, schema: PERSON, prompt: EXTRACT });
      assert.deepEqual(object, { name: "Ana Berg", city: "Oslo" });
      const output = Output.object({ schema: PERSON });
      assert.deepEqual((await generateText({ ...ask, output, prompt: EXTRACT })).output, object);
      const stream = streamObject({ ...ask, schema: PERSON, prompt: EXTRACT });
      const partial = [];
      for await (const each of stream.partialObjectStream) partial.push(each);
      assert(partial.length > 1);
      assert.deepEqual(partial.at(-1), object);
      assert.deepEqual(await stream.object, object);
    });

    test("generateObject with a choice", async () => {
      const choice = { output: "enum", enum: ["seven", "eight"], prompt: SUM };
      assert.match((await generateObject({ ...ask, ...choice })).object, /^(seven|eight)$/);
    });

    test("a loop with a tool", async () => {
      const asked = [];
      const loop = { ...ask, tools: { get_weather: weather(asked) }, stopWhen: stepCountIs(3) };
      const { text, steps } = await generateText({ ...loop, prompt: WEATHER });
      assert.deepEqual(asked, ["Paris"]);
      assert.match(text, /sunny/);
      assert.deepEqual(steps.map((step) => step.finishReason), ["tool-calls", "stop"]);
      const stream = streamText({ ...loop, prompt: WEATHER });
      const kinds = [];
      for await (const part of stream.fullStream) kinds.push(part.type);
      assert(!kinds.includes("error"), kinds.join());
      for (const kind of ["tool-input-delta", "tool-call", "tool-result", "text-delta"])
        assert(kinds.includes(kind), kind);
      assert.deepEqual(asked, ["Paris", "Paris"]);
      assert.equal(await stream.text, text);
    });

    test("a call that is asked for", async () => {
      const tools = { get_weather: tool({ inputSchema: z.object({ city: z.string() }) }) };
      for (const toolChoice of ["required", { type: "tool", toolName: "get_weather" }]) {
        const { toolCalls } = await generateText({ ...ask, tools, toolChoice, prompt: WEATHER });
        assert.deepEqual(toolCalls.map((call) => call.input), [{ city: "Paris" }]);
      }
      const none = await generateText({ ...ask, tools, toolChoice: "none", prompt: SUM });
      assert.deepEqual([none.text, none.toolCalls], ["3 + 4 = 7", []]);
    });
  });
}

test("a conversation that the server keeps", async () => {
  const ask = { model: openai("demo"), temperature: 0, maxRetries: 0 };
  const first = await generateText({ ...ask, prompt: SUM });
  const previousResponseId = first.providerMetadata.openai.responseId;
  assert.match(previousResponseId, /^resp_/);
  const next = { ...ask, prompt: SUM, providerOptions: { openai: { previousResponseId } } };
  assert((await generateText(next)).usage.inputTokens > first.usage.inputTokens);
});

test("fields of ours, and an abort that leaves no request behind", async () => {
  const count = async (line) => {
    const text = await (await fetch(`${demo.url}/metrics`)).text();
    const found = text.split("\n").filter((each) => each.startsWith(line));
    return found.reduce((sum, each) => sum + Number(each.slice(each.lastIndexOf(" "))), 0);
  };
  const ended = async () => [
    await count('quantd_requests_total{model="demo",outcome="abort"}'),
    await count("quantd_requests_total"),
  ];
  const numRequests = async () =>
    (await count("quantd_requests_running")) + (await count("quantd_requests_waiting"));
  while (await numRequests()) await sleep(10);
  const [abortedBefore, totalBefore] = await ended();
  const controller = new AbortController();
  const stream = streamText({
    model: compatible(demo)("demo"), prompt: SUM, maxRetries: 0, maxOutputTokens: 8000,
    providerOptions: { quantd: { ignore_eos: true } }, abortSignal: controller.signal,
  });
  let pieces = 0;
  for await (const _ of stream.textStream) if (++pieces === 40) controller.abort();
  assert(pieces >= 40);
  while (await numRequests()) await sleep(10);
  const [aborted, total] = await ended();
  assert.deepEqual([aborted - abortedBefore, total - totalBefore], [1, 1]);
});

test("errors", async () => {
  const ask = { prompt: SUM, maxRetries: 0 };
  const rejects = (promise, statusCode, word) =>
    assert.rejects(promise, (error) => {
      assert(APICallError.isInstance(error), `${error}`);
      assert.equal(error.statusCode, statusCode);
      assert.match(error.message, word);
      return true;
    });
  await rejects(generateText({ ...ask, model: compatible(demo)("gpt-9") }), 404, /gpt-9/);
  for (const model of Object.values(MODELS))
    await rejects(generateText({ ...ask, model, temperature: 9 }), 400, /temperature/);
  await rejects(generateText({ ...ask, model: compatible(strict, "no")("demo") }), 401, /key/);
  await generateText({ ...ask, model: compatible(strict, KEY)("demo") });
  const vectors = { model: compatible(demo).embeddingModel("demo"), values: ["x"], maxRetries: 0 };
  await rejects(embedMany(vectors), 400, /demo/);
});
