// The model in the browser: the line about how it loads, and answers.

import { connect, supported } from "./model.js";

const NAMES = { photos: "everyday", scenes: "scenes" }; // of the models, by mode
const BACKENDS = { webgpu: "WebGPU", wasm: "wasm" };
const MEGABYTE = 1e6;
const ABSENT = "This copy of the page has its stored examples only: it was built without the model.";

export function createLive(page) {
  const find = (id) => page.getElementById(id);
  const root = page.documentElement;
  const client = connect("./", new URLSearchParams(location.search).get("backend"));
  const impossible = supported() ?? (root.dataset.live === "no" ? ABSENT : null);
  const progress = {}; // by mode, the last that was told
  if (impossible) {
    for (const node of page.querySelectorAll(".own button, #tools button")) node.setAttribute("aria-disabled", true);
  }
  let shown = "photos";
  let running = 0;

  function tell(mode, news) {
    progress[mode] = news;
    if (mode === shown) say();
  }

  // What the page says of the model of the present mode.
  function say() {
    const { phase, received = 0, total = 1, seconds, cached, error, provider, failure } = progress[shown] ?? {};
    const size = `${(received / MEGABYTE).toFixed(1)} of ${(total / MEGABYTE).toFixed(1)} MB`;
    const words = {
      download: cached ? "Model: reading it from this browser’s cache" : `Model: ${size}`,
      prepare: "Model: preparing",
      ready: `Model: ready in your browser${provider ? ` (${BACKENDS[provider]}, ${seconds.toFixed(1)} s)` : ""}`,
      failed: error,
    };
    root.dataset.model = impossible || phase === "failed" ? "none" : phase === "ready" ? "ready" : "loading";
    find("model-said").textContent = impossible ?? words[phase] ?? "Model: waiting";
    find("model-failed").textContent = failure ? `· WebGPU is not used: ${failure}` : "";
    find("model-bar").hidden = !["download", "prepare"].includes(phase) || Boolean(impossible);
    if (phase === "prepare") find("model-bar").removeAttribute("value");
    else find("model-bar").value = received / total;
    const news = { ready: "The model is ready.", failed: error }[phase] ?? "";
    if (find("model-news").textContent !== news) find("model-news").textContent = news;
  }

  function load(mode) {
    if (impossible) return Promise.reject(new Error(impossible));
    if (progress[mode] && progress[mode].phase !== "failed") return progress[mode].done;
    const done = client.load(NAMES[mode], (news) => tell(mode, { ...news, done })).then(
      (how) => tell(mode, { ...progress[mode], phase: "ready", ...how, done }),
      (error) => {
        tell(mode, { phase: "failed", error: error.message });
        throw error;
      },
    );
    progress[mode] = { done };
    say();
    return done;
  }

  return {
    impossible,
    load,

    show(mode) {
      shown = mode;
      say();
    },

    // What the model says of an image; rejects with an AbortError where a newer image took its place.
    async detect(mode, source, about) {
      running += 1;
      root.dataset.busy = "true";
      try {
        load(mode).catch(() => {}); // its progress; detect says itself what failed
        const answer = await client.detect(NAMES[mode], source, { model: `${NAMES[mode]} detector`, ...about });
        const { provider, failure } = answer; // a GPU may fail at any time
        tell(mode, { ...progress[mode], provider, failure });
        return answer;
      } finally {
        running -= 1;
        if (!running) delete root.dataset.busy;
      }
    },
  };
}

export const dropped = (error) => error.name === "AbortError";
