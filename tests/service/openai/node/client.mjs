// What users of the official Node client call. Prints one JSON object with what came of it.
//
//   node client.mjs BASE_URL PICTURE.png

import fs from "node:fs";
import OpenAI, { toFile } from "openai";

const [baseURL, picture] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const found = {};

const generated = await client.images.generate({
  model: "gpt-image-1",
  prompt: "a red fox",
  n: 2,
  size: "auto",
  output_format: "webp",
  seed: 7,
});
found.generated = {
  pictures: generated.data.map((item) => item.b64_json),
  seeds: generated.data.map((item) => item.seed),
  size: generated.size,
  total_tokens: generated.usage.total_tokens,
  request_id: generated._request_id,
};

const linked = await client.images.generate({ model: "dall-e-3", prompt: "a red fox" });
const fetched = await fetch(linked.data[0].url);
found.linked = {
  type: fetched.headers.get("content-type"),
  bytes: (await fetched.arrayBuffer()).byteLength,
};

const stream = await client.images.generate({
  prompt: "a red fox",
  stream: true,
  partial_images: 2,
});
found.streamed = [];
for await (const event of stream) {
  found.streamed.push({ type: event.type, index: event.partial_image_index ?? null });
}

const shapes = [
  fs.createReadStream(picture),
  await toFile(fs.readFileSync(picture), "photo.png", { type: "image/png" }),
  [await toFile(fs.readFileSync(picture), "a.png"), await toFile(fs.readFileSync(picture), "b.png")],
];
found.edited = [];
for (const image of shapes) {
  const edited = await client.images.edit({ image, prompt: "the same in winter", n: 1 });
  found.edited.push({
    size: edited.size,
    picture: edited.data[0].b64_json,
    tokens: edited.usage.input_tokens_details.image_tokens,
  });
}

const varied = await client.images.createVariation({
  image: fs.createReadStream(picture),
  response_format: "b64_json",
});
found.varied = varied.data.length;

found.models = [];
for await (const model of client.models.list()) {
  found.models.push(model.id);
}
found.model = (await client.models.retrieve("black-forest-labs/tiny")).id;

try {
  await client.images.generate({ prompt: "x", size: "1000x1000" });
} catch (error) {
  found.refused = {
    is_bad_request: error instanceof OpenAI.BadRequestError,
    status: error.status,
    param: error.param,
    code: error.code,
    type: error.type,
    request_id: error.requestID,
  };
}

// Leaving a stream in its middle must leave nothing behind that keeps this process alive.
const left = await client.images.generate({
  prompt: "left",
  stream: true,
  partial_images: 3,
  num_inference_steps: 100,
});
for await (const event of left) {
  found.left = event.type;
  break;
}

console.log(JSON.stringify(found));
