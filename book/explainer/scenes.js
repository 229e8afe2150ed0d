// Scenes mode: the visitor moves, adds, removes and swaps the things of a drawn scene, and the detector answers.

import { element, match } from "./elements.js";
import { createExperiment } from "./experiment.js";
import { dropped } from "./live.js";
import { addThing, DECIDERS, drawScene, TEXTURES } from "./scene.js";
import { balls, boxesOf, frameOf, namesOf, queryOf, scoresOf, without } from "./things.js";

const FINE = 4; // pixels of the shown image to one of the detector's
const STEP = 4; // pixels, of a key; one with Alt
const PLACES = 40; // that are tried for a new thing in a crowded scene
const MOVED = 2; // pixels on the screen: less is a click
const SIGNS = { square: "■", star: "★", triangle: "▲", cross: "✚", ball: "●" };
const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export function createScenes(page, app) {
  const find = (id) => page.getElementById(id);
  const layer = element(find("view"), "div", "", { id: "things", role: "group" });
  layer.setAttribute("aria-label", "Objects of the scene: arrow keys choose one, Shift and arrow keys move it");
  layer.hidden = true;
  const image = page.createElement("canvas"); // the scene as it is shown, finer than the detector sees it
  let stored = null; // the example
  let scene = null;
  let selected = null;
  let marked = null; // a thing that the experiment speaks of
  let pending = null; // the promise of the answer to the last edit
  let frame = 0;
  let visits = 0; // of scenes: answers to edits of an earlier one are not shown

  for (const [shape, sign] of Object.entries(SIGNS)) {
    const label = `Add a ${shape}`;
    const button = element(find("tools").querySelector(".adds"), "button", "plain-button sign", { type: "button" });
    Object.assign(button, { textContent: sign, title: label, ariaLabel: label });
    button.addEventListener("click", () => add(shape));
  }
  find("swap").addEventListener("click", () => swap(selected));
  find("remove").addEventListener("click", () => remove(selected));
  find("restore").addEventListener("click", () => enter(stored));

  const experiment = createExperiment(page, app, {
    async measure(k, ball, label) {
      const box = boxesOf(scene)[ball];
      const answer = await app.live.detect("scenes", drawn(without(scene, k), 1), { name: stored.name });
      return scoresOf(answer, queryOf(answer, box), label);
    },
    preview(k) {
      if (!scene) return;
      paint(k === null ? scene : without(scene, k));
      app.store.send({ type: "set", name: "stale", value: k !== null || pending !== null });
    },
    highlight(k) {
      marked = k;
      update();
    },
    choose: (k) => select(k),
    async settled() {
      while (frame || pending) await (pending ?? new Promise(requestAnimationFrame));
    },
  });
  app.experiment = experiment;
  app.select = select;
  app.store.subscribe(({ pinned }) => layer.classList.toggle("quiet", pinned));

  // ------------------------------------------------------------------------------------------------ the scene

  function enter(data) {
    leave();
    stored = data;
    [scene, selected, marked] = [data.scene, null, null];
    paint(scene);
    layer.hidden = false;
    app.showData({ ...data, image });
    experiment.set({ scene, data: app.store.state.data, studies: data.studies });
    select(balls(scene)[0] ?? null);
  }

  function leave() {
    experiment.stop();
    cancelAnimationFrame(frame);
    frame = 0;
    visits += 1;
    layer.hidden = true;
    [scene, pending] = [null, null];
  }

  function paint(shown) {
    const fine = drawn(shown, FINE);
    [image.width, image.height] = [fine.width, fine.height];
    image.getContext("2d").drawImage(fine, 0, 0);
  }

  // The query that stands for the selected thing is the object that the panel is about.
  function select(k) {
    selected = k;
    if (k !== null && scene.things[k].shape === "ball") experiment.select(k);
    const { data } = app.store.state;
    app.store.send({ type: "clear" });
    app.store.send({ type: "focus", query: k === null ? null : queryOf(data, boxesOf(scene)[k]) });
    update();
  }

  // ------------------------------------------------------------------------------------------------ edits

  // Whether the model is there; what to do if not is said beside the image.
  function editable() {
    if (!app.live.impossible) return true;
    app.say(`Editing needs the model. ${app.live.impossible}`);
    return false;
  }

  // The image follows at once, the boxes with the answer; what is asked meanwhile is left out by the model's client.
  function edit(things, chosen = selected) {
    scene = { ...scene, things };
    selected = chosen;
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      paint(scene);
      app.store.send({ type: "set", name: "stale", value: true });
      pending = ask(scene);
      pending.catch(() => {}); // it is said beside the image
    });
    update();
  }

  async function ask(asked) {
    const visit = visits;
    try {
      if (page.documentElement.dataset.model !== "ready") app.say("The model is loading; its answer follows.");
      const about = { name: stored.name, credit: "changed by you", book: app.book };
      const answer = await app.live.detect("scenes", drawn(asked, 1), about);
      if (visit !== visits) return;
      const data = { ...answer, image, id: stored.id };
      const same = selected !== null && asked.things.length === scene.things.length;
      const query = same ? queryOf(data, boxesOf(asked)[selected]) : null;
      app.store.send({ type: "answer", data, query });
      if (scene !== asked) return app.store.send({ type: "set", name: "stale", value: true });
      pending = null;
      experiment.set({ scene, data });
      app.say(`Answer in ${answer.seconds.toFixed(1)} s, computed in this browser.`);
    } catch (error) {
      if (dropped(error) || visit !== visits) return;
      pending = null;
      app.say(error.message);
      throw error;
    }
  }

  function move(k, x, y) {
    const { radius } = scene.things[k];
    const inside = (value) => Math.min(Math.max(value, radius), scene.size - radius);
    edit(scene.things.map((thing, n) => (n === k ? { ...thing, x: inside(x), y: inside(y) } : thing)));
  }

  function add(shape) {
    if (!editable()) return;
    const texture = TEXTURES[Math.floor(Math.random() * TEXTURES.length)];
    const things = addThing(scene, shape, texture)?.things ?? crowded(scene, shape, texture);
    if (things) edit(things, things.length - 1);
    else app.say("A ball needs a square or a star with some room around it.");
  }

  function remove(k) {
    if (k === null || !editable()) return;
    edit(scene.things.filter((_, n) => n !== k), null);
    (layer.querySelector("button") ?? find("tools").querySelector("button")).focus();
  }

  // A square becomes a star, and a star a square.
  function swap(k) {
    if (k === null || !editable()) return;
    const { shape } = scene.things[k];
    if (!DECIDERS.includes(shape)) return app.say("Select a square or a star to swap it.");
    const other = DECIDERS[1 - DECIDERS.indexOf(shape)];
    edit(scene.things.map((thing, n) => (n === k ? { ...thing, shape: other } : thing)), k);
  }

  // ------------------------------------------------------------------------------------------------ elements

  function update() {
    if (!scene) return;
    const names = namesOf(scene);
    const make = () => listen(element(layer, "button", "thing", { type: "button" }));
    match(layer, [...scene.things.keys()], make).forEach((node, k) => {
      const [left, top, right, bottom] = frameOf(scene.things[k]).map((value) => (100 * value) / scene.size);
      Object.assign(node.style, { left: `${left}%`, top: `${top}%`, right: `${100 - right}%`, bottom: `${100 - bottom}%` });
      node.tabIndex = k === (selected ?? 0) ? 0 : -1;
      node.setAttribute("aria-pressed", k === selected);
      node.setAttribute("aria-label", `${names[k]}, object ${k + 1} of ${names.length}`);
      node.classList.toggle("asked", k === experiment.ball && !experiment.finished);
      node.classList.toggle("marked", k === marked);
    });
    if (!scene.things.length) layer.replaceChildren();
    const swaps = selected !== null && DECIDERS.includes(scene.things[selected].shape);
    const fixed = app.live.impossible !== null;
    find("swap").setAttribute("aria-disabled", fixed || !swaps);
    find("remove").setAttribute("aria-disabled", fixed || selected === null);
  }

  function listen(node) {
    const index = () => Number(node.dataset.key);
    let drag = null; // where it began
    node.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      select(index());
      const { x, y } = scene.things[index()];
      drag = { x, y, from: [event.clientX, event.clientY], moved: false };
      node.setPointerCapture(event.pointerId);
    });
    node.addEventListener("pointermove", (event) => {
      if (!drag) return;
      event.stopPropagation();
      const shift = [event.clientX - drag.from[0], event.clientY - drag.from[1]];
      if (!drag.moved && Math.hypot(...shift) < MOVED) return;
      if (!drag.moved && !editable()) return (drag = null);
      drag.moved = true;
      const scale = scene.size / find("view").clientWidth;
      move(index(), drag.x + shift[0] * scale, drag.y + shift[1] * scale);
    });
    for (const name of ["pointerup", "pointercancel"]) node.addEventListener(name, () => (drag = null));
    node.addEventListener("click", (event) => {
      event.stopPropagation(); // the figure would show a path
      if (!event.detail) select(index()); // by keyboard
    });
    node.addEventListener("focus", () => node.matches(":focus-visible") && select(index()));
    node.addEventListener("keydown", (event) => {
      const way = WAYS[event.key];
      if (way && event.shiftKey) {
        const { x, y } = scene.things[index()];
        const step = event.altKey ? 1 : STEP;
        if (editable()) move(index(), x + step * way[0], y + step * way[1]);
      } else if (way) {
        const count = scene.things.length;
        select((index() + way[0] + way[1] + count) % count);
        layer.children[selected].focus();
      } else if (event.key === "Delete" || event.key === "Backspace") remove(index());
      else if (event.key === "s") swap(index());
      else return;
      event.preventDefault();
    });
    return node;
  }

  return { enter, leave };
}

// The things with one more where a scene has no room by its rules: at the emptiest of some places. A ball gets none.
function crowded(scene, shape, texture) {
  const gap = (a, b) => Math.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius;
  const room = (thing) => Math.min(...scene.things.map((other) => gap(thing, other)));
  const places = [...Array(PLACES)].map(() => addThing({ ...scene, things: [] }, shape, texture)?.things[0]);
  if (!places.every(Boolean)) return null;
  return [...scene.things, places.reduce((best, place) => (room(place) > room(best) ? place : best))];
}

const backgrounds = new WeakMap(); // enlarged, by the background that they come from

// The image of a scene on a canvas, enlarged by a factor.
function drawn(scene, factor) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = factor * scene.size;
  canvas.getContext("2d").putImageData(drawScene(factor === 1 ? scene : enlarged(scene, factor)), 0, 0);
  return canvas;
}

function enlarged({ size, background, things }, factor) {
  if (!backgrounds.has(background)) {
    const small = drawn({ size, background, things: [] }, 1);
    const large = new OffscreenCanvas(factor * size, factor * size).getContext("2d", { willReadFrequently: true });
    large.imageSmoothingQuality = "high";
    large.drawImage(small, 0, 0, factor * size, factor * size);
    backgrounds.set(background, large.getImageData(0, 0, factor * size, factor * size).data);
  }
  const grown = things.map((thing) => {
    const [x, y, radius, period] = [thing.x, thing.y, thing.radius, thing.period].map((value) => factor * value);
    return { ...thing, x, y, radius, period };
  });
  return { size: factor * size, background: backgrounds.get(background), things: grown };
}
