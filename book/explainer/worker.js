// The model, off the page's thread: fetches the files, keeps them for the next visit, creates sessions and runs them, on
// the GPU by WebGPU where that works, otherwise on the CPU by WebAssembly.
// Messages: { id, call: "load" | "detect", ... }; answers: { id, progress }, then { id, result } or { id, error }.

import { resized } from "./resize.js";

const CACHE = "rego-explainer"; // of the browser
const NEAR = { box: 0.5, score: 0.01 }; // what a side of a box, in pixels, and a score may be apart from PyTorch's

let manifest = null;
let failure = null; // why WebGPU is no longer used
const sessions = new Map(); // by name: the promise of { session, size, ort, provider, seconds }

self.onmessage = async ({ data: { id, call, ...given } }) => {
  try {
    const result = await CALLS[call](given, (progress) => self.postMessage({ id, progress }));
    self.postMessage({ id, result }, buffersOf(result));
  } catch (error) {
    self.postMessage({ id, error: error.message });
  }
};

const CALLS = {
  async load({ name, backend }, tell) {
    if (!sessions.has(name)) keep(name, create(name, backend, tell));
    const { provider, seconds } = await sessions.get(name);
    return { provider, failure, seconds };
  },

  async detect({ name, pixels, width, height }) {
    let made = await sessions.get(name); // after `load`
    const start = performance.now();
    const arrays = await answer(made, pixels, width, height).catch(async (error) => {
      if (made.provider === "wasm") throw error;
      failure = said(error); // such as a GPU that was reset
      made = await keep(name, create(name, "wasm", () => {}));
      return answer(made, pixels, width, height);
    });
    const { provider } = made;
    const { header } = manifest.models[name];
    return { arrays, header, provider, failure, seconds: (performance.now() - start) / 1000 };
  },
};

const said = (error) => error.message || `${error}`; // exceptions of WebAssembly have no message
const buffersOf = ({ arrays = {} }) => Object.values(arrays).map(({ values }) => values.buffer);

function keep(name, creating) {
  sessions.set(name, creating);
  creating.catch(() => sessions.delete(name)); // the next call tries again
  return creating;
}

async function answer({ session, size, ort }, pixels, width, height) {
  const { planes, rows, columns } = resized(pixels, width, height, size);
  const outputs = await session.run({
    pixels: new ort.Tensor("float32", planes, [1, 3, size, size]),
    sizes: new ort.Tensor("int64", BigInt64Array.of(BigInt(rows), BigInt(columns)), [1, 2]),
  });
  const arrays = {};
  for (const [array, { dims, data }] of Object.entries(outputs)) arrays[array] = { shape: [...dims], values: data };
  return arrays;
}

// `backend` is "webgpu" or "wasm" where the visitor chose one.
async function create(name, backend, tell) {
  const start = performance.now();
  manifest ??= await readManifest();
  let [made, reason] = [null, failure];
  if (!failure && (backend === "webgpu" || (backend !== "wasm" && (await hasGPU())))) {
    try {
      made = await begin(name, "webgpu", tell);
    } catch (error) {
      reason = said(error);
    }
  }
  made ??= await begin(name, "wasm", tell);
  failure ??= reason; // not where this failed too, as without a network
  await forgetOthers();
  return { ...made, seconds: (performance.now() - start) / 1000 };
}

// Whether there is a GPU that the runtime for WebGPU can use: that runtime needs suspended WebAssembly, and an adapter
// in software is slower than the other runtime.
async function hasGPU() {
  if (!navigator.gpu || !("Suspending" in WebAssembly)) return false;
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  return adapter !== null && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
}

async function begin(name, provider, tell) {
  const { file, size, check } = manifest.models[name];
  const ort = await import(`./runtime/ort.${provider}.mjs`);
  const wanted = [file, ...(ort.env.wasm.wasmBinary ? [] : [manifest.runtimes[provider]])];
  if (provider === "webgpu") wanted.push(check.file);
  const total = wanted.reduce((sum, { bytes }) => sum + bytes, 0);
  const received = wanted.map(() => 0);
  let cached = true;
  const contents = await Promise.all(
    wanted.map((entry, n) =>
      read(entry, (bytes, stored) => {
        received[n] = bytes;
        cached &&= stored;
        tell({ phase: "download", received: received.reduce((a, b) => a + b), total, cached });
      }),
    ),
  );
  tell({ phase: "prepare", received: total, total, cached });
  ort.env.wasm.wasmBinary ??= contents[1];
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const session = await ort.InferenceSession.create(joined(contents[0]), {
    executionProviders: [provider],
    graphOptimizationLevel: "extended", // little is left to do: browser_model.py has optimized the file
    logSeverityLevel: 3, // with WebGPU it warns that small operations stay on the CPU
  });
  const made = { session, size, ort, provider };
  if (provider === "webgpu") await verify(made, check, contents.at(-1));
  tell({ phase: "ready", received: total, total, cached });
  return made;
}

// Runs the model on a stored image; an error if its objects are not those of PyTorch (`check_of` in build.py).
async function verify(made, { width, height, threshold, stages }, pixels) {
  const { boxes, scores, labels } = await answer(made, pixels, width, height);
  const [rows, queries] = scores.shape;
  stages.forEach((objects, n) => {
    const first = (rows - stages.length + n) * queries;
    const found = [...scores.values.subarray(first, first + queries).keys()].filter(
      (query) => scores.values[first + query] >= threshold,
    );
    const same = objects.every(({ query, label, score, box }, k) => {
      const [x, y, w, h] = box.map((side, i) => Math.abs(side - boxes.values[4 * (first + query) + i]));
      const apart = Math.max((x + w / 2) * width, (y + h / 2) * height);
      const near = apart < NEAR.box && Math.abs(score - scores.values[first + query]) < NEAR.score;
      return found[k] === query && labels.values[first + query] === label && near;
    });
    if (!same || found.length !== objects.length) throw new Error("this GPU gives another answer than PyTorch.");
  });
}

async function readManifest() {
  const response = await fetched("manifest.json", { cache: "no-cache" });
  return response.json();
}

async function fetched(address, options = {}) {
  const name = address.split("?")[0];
  const response = await fetch(address, options).catch(() => {
    throw new Error(`${name} could not be fetched: the server does not answer.`);
  });
  if (!response.ok) throw new Error(`${name} is missing (${response.status}): build the page again.`);
  return response;
}

// With the hash, so that no cache gives an older version.
const addressOf = ({ path, sha256 }) => `${path}?${sha256}`;

// The content of a file, from the browser's cache or the server; `tell(bytes so far, whether they were in the cache)`.
async function read(entry, tell) {
  const cache = await openCache();
  const stored = await cache?.match(addressOf(entry));
  if (stored) {
    tell(entry.bytes, true);
    return unzipped(await stored.blob());
  }
  const response = await fetched(addressOf(entry));
  const parts = [];
  let received = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    received += value.length;
    tell(Math.min(received, entry.bytes), false);
  }
  const blob = new Blob(parts);
  await cache?.put(addressOf(entry), new Response(blob)).catch(() => null); // the disk may be full
  return unzipped(blob);
}

// Files are compressed, since not every server compresses; a server may have unpacked them under way.
async function unzipped(blob) {
  const [first, second] = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
  if (first !== 0x1f || second !== 0x8b) return new Uint8Array(await blob.arrayBuffer());
  const stream = blob.stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The file of a model, whose bytes at even places stand before those at odd places (`compressed` in browser_model.py).
function joined(halves) {
  const bytes = new Uint8Array(halves.length);
  const odd = Math.ceil(bytes.length / 2);
  for (let n = 0; n < bytes.length; n++) bytes[n] = halves[(n >> 1) + (n & 1 ? odd : 0)];
  return bytes;
}

// Null where the browser has none, as in some private windows and for servers without HTTPS.
const openCache = async () => self.caches?.open(CACHE).catch(() => null);

// Deletes older versions of the files.
async function forgetOthers() {
  const cache = await openCache();
  const models = Object.values(manifest.models).flatMap(({ file, check }) => [file, check.file]);
  const current = [...Object.values(manifest.runtimes), ...models].map(addressOf);
  for (const request of (await cache?.keys()) ?? []) {
    if (!current.some((address) => request.url.endsWith(`/${address}`))) await cache.delete(request);
  }
}
