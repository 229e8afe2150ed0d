// The model, off the page's thread: fetches the files, keeps them for the next visit, creates sessions and runs them.
// Messages: { id, call: "load" | "detect", ... }; answers: { id, progress }, then { id, result } or { id, error }.

import * as ort from "./runtime/ort.mjs";
import { resized } from "./resize.js";

const CACHE = "rego-explainer"; // of the browser

let manifest = null;
const sessions = new Map(); // by name: the promise of { session, size, provider, seconds }

self.onmessage = async ({ data: { id, call, ...given } }) => {
  try {
    const result = await CALLS[call](given, (progress) => self.postMessage({ id, progress }));
    self.postMessage({ id, result }, buffersOf(result));
  } catch (error) {
    self.postMessage({ id, error: error.message });
  }
};

const CALLS = {
  async load({ name }, tell) {
    if (!sessions.has(name)) {
      const creating = create(name, tell);
      sessions.set(name, creating);
      creating.catch(() => sessions.delete(name)); // the next call tries again
    }
    const { provider, seconds } = await sessions.get(name);
    return { provider, seconds };
  },

  async detect({ name, pixels, width, height }) {
    const { session, size } = await sessions.get(name); // after `load`
    const start = performance.now();
    const { planes, rows, columns } = resized(pixels, width, height, size);
    const outputs = await session.run({
      pixels: new ort.Tensor("float32", planes, [1, 3, size, size]),
      sizes: new ort.Tensor("int64", BigInt64Array.of(BigInt(rows), BigInt(columns)), [1, 2]),
    });
    const arrays = {};
    for (const [array, { dims, data }] of Object.entries(outputs)) arrays[array] = { shape: [...dims], values: data };
    return { arrays, header: manifest.models[name].header, seconds: (performance.now() - start) / 1000 };
  },
};

const buffersOf = ({ arrays = {} }) => Object.values(arrays).map(({ values }) => values.buffer);

async function create(name, tell) {
  const start = performance.now();
  manifest ??= await readManifest();
  const { file, size } = manifest.models[name];
  const wanted = ort.env.wasm.wasmBinary ? [file] : [file, manifest.runtime];
  const total = wanted.reduce((sum, { bytes }) => sum + bytes, 0);
  const received = wanted.map(() => 0);
  let cached = true;
  const [model, runtime] = await Promise.all(
    wanted.map((entry, n) =>
      read(entry, (bytes, stored) => {
        received[n] = bytes;
        cached &&= stored;
        tell({ phase: "download", received: received.reduce((a, b) => a + b), total, cached });
      }),
    ),
  );
  tell({ phase: "prepare", received: total, total, cached });
  ort.env.wasm.wasmBinary ??= runtime;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const session = await ort.InferenceSession.create(joined(model), {
    executionProviders: ["wasm"],
    graphOptimizationLevel: "extended", // little is left to do: browser_model.py has optimized the file
  });
  await forgetOthers();
  tell({ phase: "ready", received: total, total, cached });
  return { session, size, provider: "wasm", seconds: (performance.now() - start) / 1000 };
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
  const current = [manifest.runtime, ...Object.values(manifest.models).map(({ file }) => file)].map(addressOf);
  for (const request of (await cache?.keys()) ?? []) {
    if (!current.some((address) => request.url.endsWith(`/${address}`))) await cache.delete(request);
  }
}
