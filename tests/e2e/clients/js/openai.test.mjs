// The official JavaScript SDK, unchanged, over TCP and over the Unix socket.

import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import OpenAI from "openai";
import { Agent, fetch as undiciFetch, request } from "undici";

const servers = JSON.parse(process.env.QUANTD_TEST_SERVERS);
const KEY = process.env.QUANTD_TEST_KEY;
const CHAT = {
  model: "demo",
  messages: [{ role: "user", content: "Sort these numbers: 42, 7, 19" }],
  temperature: 0,
  max_completion_tokens: 24,
};
const LONG = { ...CHAT, max_completion_tokens: 8000, ignore_eos: true };

const agents = Object.fromEntries(
  Object.entries(servers).map(([name, { socket }]) => [
    name,
    new Agent({ connect: { socketPath: socket } }),
  ]),
);
after(() => Promise.all(Object.values(agents).map((agent) => agent.close())));

function connect(name, way, options = {}) {
  const common = { apiKey: KEY, maxRetries: 0, timeout: 240_000, ...options };
  if (way === "tcp") return new OpenAI({ ...common, baseURL: `${servers[name].url}/v1` });
  // Node's own fetch takes only dispatchers of the undici that it was built with.
  const fetchOptions = { dispatcher: agents[name] };
  return new OpenAI({ fetch: undiciFetch, fetchOptions, ...common, baseURL: "http://localhost/v1" });
}

async function metric(name, line) {
  const { body } = await request("http://localhost/metrics", { dispatcher: agents[name] });
  return (await body.text())
    .split("\n")
    .filter((text) => text.startsWith(line))
    .reduce((sum, text) => sum + Number(text.slice(text.lastIndexOf(" "))), 0);
}

async function until(condition) {
  for (const end = Date.now() + 240_000; !(await condition()); await sleep(10))
    assert(Date.now() < end, "it does not come to what is waited for");
}

async function numRequests(name) {
  return (await metric(name, "quantd_requests_running")) + (await metric(name, "quantd_requests_waiting"));
}

/**
 * Runs `leave`, which must end its requests to the demo before their time; again where the daemon
 * had not taken notice of the one that left at once.
 */
async function leavesNothing(leave) {
  const ended = async () => [
    await metric("demo", 'quantd_requests_total{model="demo",outcome="abort"}'),
    await metric("demo", "quantd_requests_total"),
  ];
  await until(async () => (await numRequests("demo")) === 0);
  const [abortedBefore, totalBefore] = await ended();
  const wasSeen = async () =>
    (await numRequests("demo")) > 0 || (await ended())[1] > totalBefore;
  for (const milliseconds of [300, 1000, 3000]) {
    await leave(milliseconds);
    if (await wasSeen()) break;
  }
  await until(wasSeen);
  await until(async () => (await numRequests("demo")) === 0);
  const [aborted, total] = await ended();
  assert.equal(aborted - abortedBefore, total - totalBefore);
}

/** Runs `work` while the workers of this server stand still: what runs does not end. */
async function held(name, work) {
  const { body } = await request("http://localhost/admin/models", { dispatcher: agents[name] });
  const pids = (await body.json()).models.map(({ pid }) => pid).filter((pid) => pid);
  assert(pids.length > 0);
  for (const pid of pids) process.kill(pid, "SIGSTOP");
  try {
    return await work();
  } finally {
    for (const pid of pids) process.kill(pid, "SIGCONT");
  }
}

const textOf = (chunks) => chunks.map((c) => c.choices[0]?.delta.content ?? "").join("");
const read = async (stream) => {
  const chunks = [];
  for await (const chunk of await stream) chunks.push(chunk);
  return chunks;
};

for (const way of ["tcp", "unix"]) {
  describe(`over ${way}`, () => {
    const client = connect("demo", way);
    const create = (body, options) => client.chat.completions.create(body, options);

    for (const stream of [false, true]) {
      test(`tools that are run, ${stream ? "" : "not "}streamed`, async () => {
        const asked = [];
        const weather = {
          type: "function",
          function: {
            name: "get_weather",
            description: "Get the weather",
            parameters: {
              type: "object",
              properties: { city: { type: "string" } },
              required: ["city"],
            },
            parse: JSON.parse,
            function: ({ city }) => {
              asked.push(city);
              return { weather: "sunny" };
            },
          },
        };
        const messages = [{ role: "user", content: "What is the weather in Paris?" }];
        const runner = client.chat.completions.runTools({
          ...CHAT, messages, stream, max_completion_tokens: 200, tools: [weather],
        });
        assert.match(await runner.finalContent(), /sunny/);
        assert.deepEqual(asked, ["Paris"]);
      });
    }

    test("models", async () => {
      const ids = [];
      for await (const model of client.models.list()) ids.push(model.id);
      assert.deepEqual(ids, ["demo"]);
      assert.equal((await client.models.retrieve("demo")).owned_by, "quantd");
      await assert.rejects(client.models.retrieve("org/other"), (error) => {
        assert(error instanceof OpenAI.NotFoundError);
        assert.equal(error.code, "model_not_found");
        return true;
      });
    });

    test("chat and its stream agree", async () => {
      await create(CHAT); // from here on the prompt is cached
      const whole = await create(CHAT);
      assert(whole._request_id);
      const chunks = await read(
        create({ ...CHAT, stream: true, stream_options: { include_usage: true } }),
      );
      const last = chunks.at(-1);
      assert.equal(textOf(chunks), whole.choices[0].message.content);
      assert.equal(chunks.at(-2).choices[0].finish_reason, whole.choices[0].finish_reason);
      assert.deepEqual(last.choices, []);
      // The second time the prompt's blocks were there.
      assert(last.usage.prompt_tokens_details.cached_tokens > 0);
      const prompt_tokens_details = whole.usage.prompt_tokens_details;
      assert.deepEqual({ ...last.usage, prompt_tokens_details }, whole.usage);
      const { prompt_tokens, completion_tokens, total_tokens } = whole.usage;
      assert.equal(total_tokens, prompt_tokens + completion_tokens);
    });

    test("stream helper", async () => {
      const pieces = [];
      const stream = client.chat.completions.stream(CHAT);
      stream.on("content", (piece) => pieces.push(piece));
      assert.equal(await stream.finalContent(), pieces.join(""));
      const again = client.chat.completions.stream({
        ...CHAT,
        stream_options: { include_usage: true },
      });
      assert((await again.totalUsage()).completion_tokens > 0);
    });

    test("logprobs", async () => {
      const [choice] = (
        await create({ ...CHAT, max_completion_tokens: 8, logprobs: true, top_logprobs: 3 })
      ).choices;
      const bytes = Buffer.from(choice.logprobs.content.flatMap((entry) => entry.bytes));
      assert.equal(bytes.toString().trim(), choice.message.content.trim());
      for (const entry of choice.logprobs.content) assert.equal(entry.top_logprobs.length, 3);
    });

    test("completions", async () => {
      const body = { model: "demo", prompt: ["1 + 2 =", "1 + 2 ="], temperature: 0, max_tokens: 6 };
      const [one, two] = (await client.completions.create(body)).choices;
      assert.equal(one.text, two.text);
      const chunks = await read(
        client.completions.create({ ...body, prompt: body.prompt[0], stream: true }),
      );
      assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), one.text);
    });

    test("errors become the SDK's classes", async () => {
      const rejects = async (promise, kind, fields) =>
        assert.rejects(promise, (error) => {
          assert(error instanceof kind, `${error}`);
          for (const [name, value] of Object.entries(fields)) assert.equal(error[name], value);
          return true;
        });
      await rejects(create({ ...CHAT, temperature: 9 }), OpenAI.BadRequestError, {
        param: "temperature",
        type: "invalid_request_error",
      });
      await rejects(create({ ...CHAT, temperature: 9, stream: true }), OpenAI.BadRequestError, {
        param: "temperature",
      });
      await rejects(create({ ...CHAT, model: "gpt-9" }), OpenAI.NotFoundError, { param: "model" });
      const strict = connect("strict", way);
      const big = { model: "demo", prompt: "x".repeat(30_000) };
      await rejects(strict.completions.create(big), OpenAI.APIError, { status: 413 });
      const broken = { ...CHAT, model: "broken" };
      await rejects(strict.chat.completions.create(broken), OpenAI.InternalServerError, {
        status: 503,
      });
      if (way === "tcp") {
        const stranger = connect("strict", way, { apiKey: "sk-other" });
        await rejects(stranger.models.list(), OpenAI.AuthenticationError, {
          code: "invalid_api_key",
        });
      }
    });

    test("a timeout leaves no request behind", () =>
      leavesNothing(async (milliseconds) => {
        const left = create(LONG, { timeout: milliseconds });
        await assert.rejects(left, OpenAI.APIConnectionTimeoutError);
        await client.models.retrieve("demo"); // whoever came before is known by now
      }));

    test("an abort leaves no request behind", () =>
      leavesNothing(async () => {
        const controller = new AbortController();
        const answer = create(LONG, { signal: controller.signal });
        await until(async () => (await metric("demo", "quantd_requests_running")) > 0);
        controller.abort();
        await assert.rejects(answer, OpenAI.APIUserAbortError);
      }));

    test("a stream that is left leaves no request behind", () =>
      leavesNothing(async () => {
        for await (const chunk of await create({ ...LONG, stream: true })) {
          assert(chunk.id);
          break;
        }
      }));

    test("a full queue, and a retry that waits", async () => {
      const seen = [];
      const notingFetch = async (url, options) => {
        const response = await (way === "tcp" ? fetch : undiciFetch)(url, options);
        const retryAfter = Number(response.headers.get("retry-after"));
        seen.push({ status: response.status, retryAfter, at: performance.now() });
        return response;
      };
      const strict = connect("strict", way);
      await until(async () => (await numRequests("strict")) === 0);
      const running = await strict.chat.completions.create({ ...LONG, stream: true });
      await running[Symbol.asyncIterator]().next();
      const answer = await held("strict", async () => {
        const controller = new AbortController();
        const waiting = assert.rejects(
          strict.chat.completions.create(LONG, { signal: controller.signal }),
          OpenAI.APIUserAbortError,
        );
        await until(async () => (await metric("strict", "quantd_requests_waiting")) > 0);
        await assert.rejects(strict.chat.completions.create(CHAT), OpenAI.RateLimitError);
        const patient = connect("strict", way, { maxRetries: 10, fetch: notingFetch });
        const asked = patient.chat.completions.create(CHAT);
        await until(() => seen.length > 0);
        controller.abort();
        running.controller.abort();
        await waiting;
        return [asked]; // a promise alone would be waited for
      });
      assert.equal((await answer[0]).choices[0].message.role, "assistant");
      // Refused once, but where the daemon was slow to see that the others have left.
      const refused = seen.slice(0, -1);
      assert(refused.length > 0 && refused.every(({ status }) => status === 429));
      assert.equal(seen.at(-1).status, 200);
      refused.forEach(({ retryAfter, at }, i) => {
        assert(retryAfter >= 1);
        // Node's timers may fire a millisecond early.
        assert(seen[i + 1].at - at >= retryAfter * 1000 - 2);
      });
    });
  });
}
