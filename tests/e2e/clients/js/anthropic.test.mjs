// Anthropic's official JavaScript SDK, unchanged.

import assert from "node:assert/strict";
import { test } from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { z } from "zod";

const { demo, strict } = JSON.parse(process.env.QUANTD_TEST_SERVERS);
const KEY = process.env.QUANTD_TEST_KEY;
const connect = (server, apiKey = "none") =>
  new Anthropic({ apiKey, baseURL: server.url, maxRetries: 0, timeout: 240_000 });
const client = connect(demo);
const ask = (content, more = {}) => ({
  model: "demo", max_tokens: 200, temperature: 0, messages: [{ role: "user", content }], ...more,
});
const SUM = "What is 3 + 4?";
const WEATHER = "What is the weather in Paris?";
const TOOL = {
  name: "get_weather",
  description: "Get the weather",
  input_schema: {
    type: "object",
    properties: { city: { type: "string" } },
    required: ["city"],
    additionalProperties: false,
  },
};

test("whole, streamed and counted", async () => {
  const whole = await client.messages.create(ask(SUM));
  assert.deepEqual(whole.content, [{ type: "text", text: "3 + 4 = 7" }]);
  assert.deepEqual([whole.stop_reason, whole.role, whole.model], ["end_turn", "assistant", "demo"]);
  assert(whole._request_id);
  const stream = client.messages.stream(ask(SUM));
  const pieces = [];
  stream.on("text", (piece) => pieces.push(piece));
  const final = await stream.finalMessage();
  assert.equal(pieces.join(""), "3 + 4 = 7");
  assert.deepEqual(final.content, whole.content);
  assert.equal(final.stop_reason, "end_turn");
  const { input_tokens } = await client.messages.countTokens({
    model: "demo", messages: ask(SUM).messages,
  });
  for (const { usage } of [whole, final]) {
    assert.equal(usage.input_tokens + (usage.cache_read_input_tokens ?? 0), input_tokens);
    assert.equal(usage.output_tokens, whole.usage.output_tokens);
  }
});

test("events in their order", async () => {
  const kinds = [];
  for await (const event of await client.messages.create(ask(SUM, { stream: true })))
    kinds.push(event.type);
  const spoken = kinds.filter((kind) => kind !== "ping" && kind !== "content_block_delta");
  assert.deepEqual(spoken, [
    "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop",
  ]);
});

test("a tool and its result", async () => {
  const tools = [TOOL];
  const first = await client.messages.create(ask(WEATHER, { tools }));
  assert.equal(first.stop_reason, "tool_use");
  const use = first.content.find((block) => block.type === "tool_use");
  assert.deepEqual([use.name, use.input], ["get_weather", { city: "Paris" }]);
  const streamed = await client.messages.stream(ask(WEATHER, { tools })).finalMessage();
  assert.deepEqual(streamed.content.find((block) => block.type === "tool_use").input, use.input);
  const messages = [
    ...ask(WEATHER).messages,
    { role: "assistant", content: first.content },
    {
      role: "user",
      content: [
        { type: "tool_result", tool_use_id: use.id, content: [{ type: "text", text: '{"weather": "sunny"}' }] },
      ],
    },
  ];
  const second = await client.messages.create({ ...ask(WEATHER, { tools }), messages });
  assert.equal(second.stop_reason, "end_turn");
  assert.match(second.content[0].text, /sunny/);
});

for (const stream of [false, true])
  test(`the SDK's own loop with a tool, ${stream ? "" : "not "}streamed`, async () => {
    const asked = [];
    const weather = betaZodTool({
      name: "get_weather",
      description: "Get the weather",
      inputSchema: z.object({ city: z.string() }),
      run: ({ city }) => {
        asked.push(city);
        return '{"weather": "sunny"}';
      },
    });
    const runner = client.beta.messages.toolRunner(ask(WEATHER, { tools: [weather], stream }));
    const final = await runner.runUntilDone();
    assert.deepEqual(asked, ["Paris"]);
    assert.match(final.content[0].text, /sunny/);
  });

test("errors become the SDK's classes", async () => {
  const rejects = (promise, kind, word) =>
    assert.rejects(promise, (error) => {
      assert(error instanceof kind, `${error}`);
      assert.match(error.message, word);
      return true;
    });
  const create = (more, who = client) => who.messages.create(ask(SUM, more));
  await rejects(create({ max_tokens: 0 }), Anthropic.BadRequestError, /max_tokens/);
  await rejects(create({ temperature: 9 }), Anthropic.BadRequestError, /temperature/);
  await rejects(create({ model: "claude" }), Anthropic.NotFoundError, /does not exist/);
  await rejects(create({}, connect(strict, "no")), Anthropic.AuthenticationError, /key/);
  assert((await create({}, connect(strict, KEY))).content.length);
});

test("a stream that is left", async () => {
  for await (const event of await client.messages.create(ask("What is quantd?", { stream: true }))) {
    assert.equal(event.type, "message_start");
    break;
  }
  assert((await client.messages.create(ask(SUM))).content.length);
});
