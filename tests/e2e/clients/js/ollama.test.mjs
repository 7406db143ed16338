// Ollama's official JavaScript client, unchanged.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Ollama } from "ollama";

const servers = JSON.parse(process.env.QUANTD_TEST_SERVERS);
const KEY = process.env.QUANTD_TEST_KEY;
const MESSAGES = [{ role: "user", content: "What is 3 + 4?" }];
const CHAT = { model: "demo", messages: MESSAGES, options: { temperature: 0, num_predict: 200 } };
const SCHEMA = {
  type: "object",
  properties: { sum: { type: "integer" } },
  required: ["sum"],
  additionalProperties: false,
};
const WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the weather",
    parameters: {
      type: "object",
      properties: { city: { type: "string" } },
      required: ["city"],
    },
  },
};

const connect = (name, headers = {}) => new Ollama({ host: servers[name].url, headers });
const client = connect("demo");

async function read(stream) {
  const parts = [];
  for await (const part of await stream) parts.push(part);
  return parts;
}

const rejects = (promise, status, pattern) =>
  assert.rejects(promise, (error) => {
    assert.match(error.message, pattern);
    assert.equal(error.status_code, status);
    return true;
  });

test("chat and its stream agree", async () => {
  const whole = await client.chat(CHAT);
  assert.equal(whole.message.content, "3 + 4 = 7");
  const parts = await read(client.chat({ ...CHAT, stream: true }));
  const last = parts.at(-1);
  assert.equal(parts.map((part) => part.message.content).join(""), "3 + 4 = 7");
  assert(parts.slice(0, -1).every((part) => !part.done));
  for (const end of [whole, last]) {
    assert.equal(end.done, true);
    assert.equal(end.done_reason, "stop");
    assert(!Number.isNaN(new Date(end.created_at).getTime()));
    assert(end.total_duration > 0 && end.eval_duration > 0 && end.prompt_eval_duration > 0);
  }
  assert.equal(last.eval_count, whole.eval_count);
  assert.equal(last.prompt_eval_count, whole.prompt_eval_count);
});

test("generate", async () => {
  const body = { model: "demo:latest", prompt: "What is 3 + 4?", options: CHAT.options };
  const whole = await client.generate(body);
  assert.equal(whole.response, "3 + 4 = 7");
  const parts = await read(client.generate({ ...body, stream: true }));
  assert.equal(parts.map((part) => part.response).join(""), whole.response);
});

test("a schema", async () => {
  const { message } = await client.chat({ ...CHAT, format: SCHEMA });
  assert.deepEqual(Object.keys(JSON.parse(message.content)), ["sum"]);
});

test("a tool and its result", async () => {
  const messages = [{ role: "user", content: "What is the weather in Paris?" }];
  const ask = { ...CHAT, messages, tools: [WEATHER] };
  const { message } = await client.chat(ask);
  assert.equal(message.tool_calls.length, 1);
  assert.equal(message.tool_calls[0].function.name, "get_weather");
  assert.deepEqual(message.tool_calls[0].function.arguments, { city: "Paris" });
  const parts = await read(client.chat({ ...ask, stream: true }));
  const calls = parts.flatMap((part) => part.message.tool_calls ?? []);
  assert.deepEqual(
    calls.map((call) => call.function.arguments),
    [{ city: "Paris" }],
  );
  const result = { role: "tool", tool_name: "get_weather", content: '{"weather": "sunny"}' };
  const second = await client.chat({ ...ask, messages: [...messages, message, result] });
  assert.match(second.message.content, /sunny/);
});

test("models", async () => {
  const { models } = await client.list();
  assert.deepEqual(
    models.map((model) => model.model),
    ["demo:latest"],
  );
  const shown = await client.show({ model: models[0].model });
  assert.deepEqual(shown.capabilities, ["completion", "tools"]);
  assert.equal(shown.model_info["llama.context_length"], 8192);
  const [loaded] = (await client.ps()).models;
  assert.equal(loaded.name, "demo:latest");
  assert(loaded.size > 1e6 && new Date(loaded.expires_at).getTime() > Date.now());
  assert.match((await client.version()).version, /^\d+\.\d+\.\d+$/);
});

test("errors", async () => {
  for (const stream of [false, true]) {
    await rejects(client.chat({ ...CHAT, model: "gpt-9", stream }), 404, /does not exist/);
    await rejects(
      client.chat({ ...CHAT, options: { temperature: 9 }, stream }),
      400,
      /options.temperature must be between 0 and 2, got 9/,
    );
  }
  await rejects(client.pull({ model: "demo" }), 501, /is not served/);
  await rejects(client.delete({ model: "demo" }), 501, /is not served/);
  await rejects(client.embed({ model: "demo", input: "x" }), 400, /is not an embedding model/);
  await rejects(connect("strict").list(), 401, /no API key/);
  const known = connect("strict", { Authorization: `Bearer ${KEY}` });
  assert.equal((await known.chat(CHAT)).done, true);
});

test("a stream that is aborted ends", async () => {
  const endless = { type: "array", items: { type: "integer" }, minItems: 2000 };
  const stream = await client.generate({
    model: "demo",
    prompt: "Count!",
    format: endless,
    stream: true,
  });
  await assert.rejects(
    (async () => {
      for await (const part of stream) {
        assert.equal(part.done, false);
        stream.abort();
      }
    })(),
    { name: "AbortError" },
  );
});
