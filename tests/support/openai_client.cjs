// OpenAI's client for Node, unchanged: its calls for files, batches, chats and models, against the server at OPENAI_BASE_URL.
"use strict";
const { OpenAI, toFile } = require("openai");

async function ended(client, id) {
  for (;;) {
    const batch = await client.batches.retrieve(id);
    if (["completed", "failed", "cancelled", "expired"].includes(batch.status)) return batch;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

async function main() {
  const client = new OpenAI({ maxRetries: 0 });
  const told = {};
  told.models = [];
  for await (const model of client.models.list()) told.models.push(model.id);
  const asked = { model: "tiny", messages: [{ role: "user", content: "hello world" }], max_tokens: 8 };
  told.chat = (await client.chat.completions.create(asked)).choices[0].message.content;
  told.streamed = "";
  const stream = await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
  for await (const chunk of stream) {
    told.streamed += chunk.choices[0]?.delta?.content ?? "";
    if (chunk.usage) told.tokens = chunk.usage.completion_tokens;
  }
  const line = (name) => JSON.stringify({ custom_id: name, method: "POST", url: "/v1/chat/completions", body: asked });
  const data = Buffer.from(["a", "b", "c"].map(line).join("\n"));
  const file = await client.files.create({ file: await toFile(data, "rows.jsonl"), purpose: "batch" });
  const made = await client.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" });
  const batch = await ended(client, made.id);
  told.status = batch.status;
  told.counts = batch.request_counts;
  const text = await (await client.files.content(batch.output_file_id)).text();
  told.answers = text.trim().split("\n").map((each) => JSON.parse(each).response.body.choices[0].message.content);
  told.listed = [];
  for await (const each of client.batches.list({ limit: 1 })) told.listed.push(each.id === made.id);
  told.deleted = (await client.files.delete(file.id)).deleted;
  try {
    await client.chat.completions.create({ ...asked, model: "none" });
  } catch (error) {
    told.refused = [error.constructor.name, error.status, error.code];
  }
  console.log(JSON.stringify(told));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
