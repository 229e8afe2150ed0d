// The model in the browser, as the page uses it. Results have the structure that look.js reads, as if they were stored.
//
//   const model = connect();
//   await model.load("everyday", ({ phase, received, total, cached }) => ...);
//   const data = await model.detect("everyday", image, { name: "My photograph" });

const LONGEST = 1280; // pixels: larger images are reduced
const THRESHOLD = 0.3; // least score of an object at first
const EMPTY = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0); // the smallest WebAssembly module

// `base` is the folder of the model's files, relative to the page; `backend` is "webgpu" or "wasm" to force one.
export function connect(base = "./", backend = null) {
  const folder = new URL(base, document.baseURI);
  const calls = new Map(); // sent to the worker, by number
  const loading = new Map(); // by name: the promise, and who listens to its progress
  let worker = null;
  let waiting = null; // the image that is next
  let busy = false;

  function start() {
    worker = new Worker(new URL("worker.js", folder), { type: "module" });
    worker.onmessage = ({ data: { id, progress, result, error } }) => {
      const call = calls.get(id);
      if (progress) return call?.tell(progress); // of a file that still arrives after another one failed
      calls.delete(id);
      if (error) call.reject(new Error(error));
      else call.resolve(result);
    };
    worker.onerror = (event) => {
      event.preventDefault();
      worker = null;
      loading.clear();
      for (const { reject } of calls.values()) reject(new Error("The model's program could not be started."));
      calls.clear();
    };
  }

  let last = 0;
  function call(message, { tell = () => {}, transfer = [] } = {}) {
    if (!worker) start();
    return new Promise((resolve, reject) => {
      calls.set(++last, { resolve, reject, tell });
      worker.postMessage({ id: last, ...message }, transfer);
    });
  }

  function load(name, onProgress = () => {}) {
    if (supported()) return Promise.reject(new Error(supported()));
    let entry = loading.get(name);
    if (!entry) {
      const listeners = [];
      const tell = (progress) => listeners.forEach((listener) => listener(progress));
      entry = { listeners, promise: call({ call: "load", name, backend }, { tell }) };
      entry.promise.catch(() => loading.delete(name)); // the next call tries again
      loading.set(name, entry);
    }
    entry.listeners.push(onProgress);
    return entry.promise;
  }

  async function next() {
    if (busy || !waiting) return;
    const { run, resolve, reject } = waiting;
    [waiting, busy] = [null, true];
    await run().then(resolve, reject);
    busy = false;
    next();
  }

  return {
    supported,
    load,

    async detect(name, source, about = {}) {
      const image = canvasOf(source);
      const { width, height } = image;
      const pixels = pixelsOf(image);
      const run = async () => {
        await load(name);
        const message = { call: "detect", name, pixels, width, height };
        const { arrays, header, ...how } = await call(message, { transfer: [pixels.buffer] });
        const texts = { name: "image", credit: "", book: "", threshold: THRESHOLD, ...about };
        return { ...header, ...texts, width, height, arrays, image, ...how };
      };
      return new Promise((resolve, reject) => {
        waiting?.reject(new DOMException("A newer image was given.", "AbortError"));
        waiting = { run, resolve, reject };
        next();
      });
    },
  };
}

// Null, or why no model can run here.
export function supported() {
  if (location.protocol === "file:") {
    return "The model runs if the page comes from a server, such as that of “make explainer”, but not from disk.";
  }
  if (typeof Worker === "undefined" || typeof DecompressionStream === "undefined") {
    return "This browser is too old to run the model: it needs module workers and decompression streams.";
  }
  try {
    new WebAssembly.Module(EMPTY);
  } catch {
    return "This browser or this page's server does not allow WebAssembly, in which the model runs.";
  }
  return null;
}

// A canvas with the image, upright, its longer side at most LONGEST.
function canvasOf(source) {
  const [width, height] = [
    source.naturalWidth ?? source.videoWidth ?? source.width,
    source.naturalHeight ?? source.videoHeight ?? source.height,
  ];
  if (!width || !height) throw new Error("The image is not loaded yet, or it is no image.");
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(scale * width));
  canvas.height = Math.max(1, Math.round(scale * height));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // behind transparent pixels
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function pixelsOf(canvas) {
  try {
    return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  } catch {
    throw new Error("The browser does not let this page read the image, which comes from another site.");
  }
}
