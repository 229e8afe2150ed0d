// REGO Explainer: two modes that share the figure of `regolite explain`, a model that loads in the background, a tour.

import { createLive } from "./live.js";
import { animate } from "./motion.js";
import { listenForPhotos } from "./photos.js";
import { createScenes } from "./scenes.js";
import { createStore, initialState } from "./state.js";
import { createTour } from "./tour.js";
import { readExamples } from "./examples.js";
import { show } from "./view.js";

const root = document.documentElement;
const find = (id) => document.getElementById(id);
const examples = readExamples(document);
const ids = { photos: null, scenes: null }; // of the example of each mode, the first at first
for (const [id, { mode }] of [...examples].reverse()) ids[mode] = id;
const shows = { photos: null, scenes: { reads: false, glimpse: true, relations: true } }; // while the other is shown
const tabs = [find("tab-photos"), find("tab-scenes")];

const store = createStore(initialState(await examples.get(ids.photos).read()));
const app = {
  store,
  examples,
  live: createLive(document),
  book: root.dataset.book,
  threshold: store.state.threshold,
  mode: "photos",

  say: (text) => (find("answer").textContent = text),

  // Another image with what the detector made of it; the visitor may have gone to the other mode meanwhile.
  showData(data, mode = app.mode) {
    ids[mode] = data.id;
    if (mode !== app.mode) return;
    app.say("");
    store.send({ type: "data", data });
    app.mark();
  },

  // Which example is shown.
  mark() {
    for (const node of document.querySelectorAll(".thumb")) {
      node.setAttribute("aria-pressed", node.dataset.example === ids[app.mode]);
    }
  },

  async open(id) {
    const data = await examples.get(id).read();
    if (app.mode === "scenes") scenes.enter(data);
    else app.showData(data);
  },

  // Show a mode and one of its examples.
  async setMode(mode, id = ids[mode]) {
    if (mode !== app.mode) {
      shows[app.mode] = store.state.show;
      app.mode = root.dataset.mode = mode;
      for (const tab of tabs) {
        tab.setAttribute("aria-selected", tab.dataset.mode === mode);
        tab.tabIndex = tab.dataset.mode === mode ? 0 : -1;
      }
      find("mode").setAttribute("aria-labelledby", `tab-${mode}`);
      for (const node of document.querySelectorAll("[data-of]")) node.hidden = node.dataset.of !== mode;
      for (const [name, value] of Object.entries(shows[mode])) store.send({ type: "show", name, value });
      scenes.leave();
      app.wait(null);
      app.live.show(mode);
      if (root.dataset.ready) load();
    }
    if (id !== store.state.data.id || mode === "scenes") await app.open(id);
  },

  // A photo that is being looked at, over the one before; null when it is done.
  wait(image, text = "") {
    find("waiting")?.remove();
    if (!image) return;
    const cover = document.createElement("div");
    cover.id = "waiting";
    const words = document.createElement("p");
    words.textContent = text;
    const copy = document.createElement("canvas");
    [copy.width, copy.height] = [image.width, image.height];
    copy.getContext("2d").drawImage(image, 0, 0);
    copy.setAttribute("aria-hidden", "true");
    cover.append(copy, words);
    document.querySelector(".frame").append(cover);
    app.say(`${text} …`);
  },
};

show(document, store);
animate(store);
const scenes = createScenes(document, app);
listenForPhotos(document, app);
const tour = createTour(document, app);
for (const node of document.querySelectorAll(".thumb")) {
  node.addEventListener("click", () => app.open(node.dataset.example));
}
for (const tab of tabs) {
  tab.addEventListener("click", () => app.setMode(tab.dataset.mode));
  tab.addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const other = tabs[1 - tabs.indexOf(tab)];
    other.focus();
    app.setMode(other.dataset.mode);
  });
}
app.mark();
app.live.show("photos");
const [start] = location.hash.slice(1).split("/"); // #scenes and #tour lead there
if (start === "scenes") await app.setMode("scenes");
if (start === "tour") await tour.go(0);
root.dataset.ready = "true";

requestAnimationFrame(() => setTimeout(load, 200));

// The model comes when the page is there, unless the visitor saves data: then with the first own image or edit.
function load() {
  if (app.live.impossible || navigator.connection?.saveData) return;
  app.live.load(app.mode).catch(() => {}); // the line about the model says what failed
}
