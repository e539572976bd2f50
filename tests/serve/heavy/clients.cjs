// npm's openai and ollama against a running server: node clients.cjs ADDRESS PICTURE FOLDER_WITH_NODE_MODULES

const assert = require("node:assert/strict");
const { readFileSync } = require("node:fs");
const { createRequire } = require("node:module");
const { join, resolve } = require("node:path");

const [address, picture, folder] = process.argv.slice(2);
const installed = createRequire(join(resolve(folder), "any.js"));
const { OpenAI } = installed("openai");
const { Ollama } = installed("ollama");

const QUESTION = "What does the text say?";
const ANSWER = "HELLO";
const base64 = readFileSync(picture).toString("base64");
const content = [
  { type: "image_url", image_url: { url: `data:image/png;base64,${base64}` } },
  { type: "text", text: QUESTION },
];

async function checkOpenAI() {
  const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 });
  const request = { model: "any", messages: [{ role: "user", content }] };
  const answer = await client.chat.completions.create(request);
  assert.equal(answer.choices[0].message.content, ANSWER);
  assert.ok(answer.usage.prompt_tokens > 64);

  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...request, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.equal(text, ANSWER);

  const schema = { type: "object", properties: { circle: { type: "boolean" } }, required: ["circle"], additionalProperties: false };
  const formed = await client.chat.completions.create({
    ...request, response_format: { type: "json_schema", json_schema: { name: "seen", strict: true, schema } },
  });
  assert.equal(typeof JSON.parse(formed.choices[0].message.content).circle, "boolean");

  const tools = [{ type: "function", function: { name: "seen", parameters: schema } }];
  const called = await client.chat.completions.create({ ...request, tools, tool_choice: "required" });
  assert.equal(called.choices[0].message.tool_calls[0].function.name, "seen");

  const stream = await client.chat.completions.create({ ...request, stream: true });
  stream.controller.abort(); // as a page that is closed: the next question is answered all the same
  assert.equal((await client.chat.completions.create(request)).choices[0].message.content, ANSWER);

  const response = await client.responses.create({
    model: "any",
    input: [{ role: "user", content: [
      { type: "input_image", detail: "auto", image_url: content[0].image_url.url }, { type: "input_text", text: QUESTION },
    ] }],
  });
  assert.equal(response.output_text, ANSWER);
  await assert.rejects(client.chat.completions.create({ ...request, max_tokens: -1 }), (error) => error.status === 400);
}

async function checkOllama() {
  const client = new Ollama({ host: address });
  const message = { role: "user", content: QUESTION, images: [base64] };
  const answer = await client.chat({ model: "any", messages: [message] });
  assert.equal(answer.message.content, ANSWER);
  let text = "";
  for await (const part of await client.chat({ model: "any", messages: [message], stream: true })) text += part.message.content;
  assert.equal(text, ANSWER);
  const generated = await client.generate({ model: "any", prompt: QUESTION, images: [base64] });
  assert.equal(generated.response, ANSWER);
  assert.equal((await client.list()).models.length, 1);
  assert.ok((await client.show({ model: "any" })).capabilities.includes("vision"));
}

async function main() {
  let failed = 0;
  for (const [name, check] of [["npm openai", checkOpenAI], ["npm ollama", checkOllama]]) {
    try {
      await check();
      console.log(`${name}: ok`);
    } catch (error) {
      failed = 1;
      console.log(`${name}: ${error.stack.slice(0, 1000)}`);
    }
  }
  process.exit(failed);
}

main();
