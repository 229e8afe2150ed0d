// The page's elements: they show the state, and send actions. All names and classes are set as text, never as HTML.

import { draw, drawGlimpse, drawWay, levelColor, stageColor, TOP } from "./draw.js";
import { element, match, options, percent } from "./elements.js";
import {
  boxOf, className, glimpseOf, heatOf, labelOf, middle, objectAt, objects, pointsOf, relatedTo, relationLayers, rowOf,
  scoreOf, stageName, stepBox, steps, title,
} from "./look.js";
import { ALL } from "./state.js";

const LARGEST = 10; // weights in the sentence about the points
const whole = (number) => `${Math.round(number)}`.replace("-", "−");
const sides = ([left, top, right, bottom]) => `${whole(right - left)} × ${whole(bottom - top)}\u00a0px`;

export function show(page, store) {
  const find = (id) => page.getElementById(id);
  const send = (type, more = {}) => store.send({ type, ...more });
  const view = find("view");
  const canvas = find("canvas");
  const boxes = find("boxes");
  let data = null;
  let last = "";

  listen();
  store.subscribe((state) => {
    const { data: given, phase, trail, ...chosen } = state;
    const key = JSON.stringify(chosen);
    if (given !== data) {
      data = given;
      fill();
    } else if (key === last) {
      return drawAll(state);
    }
    last = key;
    update(state);
    drawAll(state);
  });
  new ResizeObserver(() => {
    drawAll(store.state);
    drawGlimpses(store.state);
  }).observe(view);

  function drawAll(state) {
    draw(canvas, data, state);
    drawWay(find("way"), data, state);
    markStep(state);
  }

  // Once for the data of an image: what no choice changes.

  function fill() {
    find("name").textContent = data.name;
    const about = [data.model, `${data.width} × ${data.height} px`, data.credit].filter(Boolean);
    find("about").textContent = about.join(" · ");
    canvas.setAttribute("aria-label", `${data.name}, ${data.width} by ${data.height} pixels`);
    view.style.setProperty("--ratio", data.width / data.height);
    find("stage").max = data.stages;
    find("most").textContent = data.stages;
    find("stages").hidden = !data.stages;
    find("stops").replaceChildren();
    for (let stage = 0; stage <= data.stages; stage++) {
      const stop = element(find("stops"), "span", "stop", { style: `--color: ${stageColor(stage)}` });
      stop.textContent = stage ? `stage ${stage}` : "base";
    }
    const { points, cells, relations, regions } = data.arrays;
    const parts = { points, cells, reads: points ?? cells, relations, stages: data.stages || null, regions };
    find("reads").textContent = points ? "Sampling points" : "Attention";
    find("reads-title").textContent = `${points ? "Sampling points" : "Cross-attention"} of the base detector`;
    for (const node of page.querySelectorAll("[data-if]")) node.hidden = !parts[node.dataset.if];
    const [, , heads = 0, levels = 0] = points?.shape ?? [];
    options(find("layer"), [...Array(data.layers).keys()].map((layer) => [layer, `${layer}`]));
    options(find("head"), [[ALL, `all ${heads}`], ...[...Array(heads).keys()].map((head) => [head, `${head}`])]);
    const strides = data.strides.map((stride, level) => [level, `${level} (stride ${stride})`]);
    options(find("level"), [[ALL, "all"], ...strides]);
    find("layer").parentElement.hidden = data.layers < 2;
    find("head").parentElement.hidden = !heads;
    find("level").parentElement.hidden = data.strides.length < 2;
    find("legend").replaceChildren();
    for (let level = 0; level < levels; level++) {
      const entry = element(find("legend"), "span", "entry", { style: `--color: ${levelColor(level)}` });
      entry.textContent = `level ${level}, stride ${data.strides[level]}`;
    }
    if (data.book) for (const node of page.querySelectorAll("[data-chapter], [data-module]")) link(node);
  }

  // Words that name a chapter or a part of the package become a link to its page of the book.
  function link(node) {
    const { chapter, module = "" } = node.dataset;
    const path = module.split(".").slice(1, -1).join("/");
    const href = data.book + (chapter ? `${chapter}.html` : `../package/${path}.html#${module}`);
    const words = node.textContent;
    node.replaceChildren();
    element(node, "a", "", { href }).textContent = words;
  }

  // What the visitor does.

  function listen() {
    find("stage").addEventListener("input", (event) => send("stage", { value: Number(event.target.value) }));
    find("threshold").addEventListener("input", (event) => choose("threshold", Number(event.target.value)));
    for (const name of ["reads", "glimpse", "relations"]) {
      find(`show-${name}`).addEventListener("change", (event) => send("show", { name, value: event.target.checked }));
    }
    for (const name of ["layer", "head", "level", "relations"]) {
      find(name).addEventListener("change", (event) => choose(name, Number(event.target.value)));
    }
    view.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse") send("point", { query: objectAt(data, store.state, whereIs(event)) });
    });
    view.addEventListener("click", (event) => {
      const query = objectAt(data, store.state, whereIs(event));
      if (query === null) send("clear");
      else if (event.pointerType === "touch" && query !== store.state.object) send("focus", { query }); // no hovering
      else send("pin", { query });
    });
    find("all").addEventListener("click", () => {
      if (store.state.pinned) send("clear");
      send("clear");
      find("list").querySelector("button").focus();
    });
    find("previous").addEventListener("click", () => move(-1));
    find("next").addEventListener("click", () => move(1));
    find("path").addEventListener("click", () => send("pin", { query: store.state.object }));
    boxes.addEventListener("keydown", (event) => {
      const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (way) {
        event.preventDefault();
        move(way);
        boxes.querySelector("[tabindex='0']").focus();
      }
    });
    page.addEventListener("keydown", (event) => {
      if (event.key === "Escape") send("clear");
      const digit = /^[0-9]$/.test(event.key) && Number(event.key) <= data.stages;
      if (digit && find("figure").contains(event.target)) send("stage", { value: Number(event.key) });
    });
  }

  const choose = (name, value) => send("set", { name, value });

  function whereIs(event) {
    const frame = view.getBoundingClientRect();
    return [
      ((event.clientX - frame.left) / frame.width) * data.width,
      ((event.clientY - frame.top) / frame.height) * data.height,
    ];
  }

  function move(way) {
    const found = objects(data, store.state);
    const at = found.indexOf(store.state.object);
    send("focus", { query: found[at < 0 ? 0 : (at + way + found.length) % found.length] });
  }

  // After every choice.

  function update(state) {
    const { stage, object } = state;
    const found = objects(data, state);
    document.documentElement.style.setProperty("--stage", stageColor(stage));
    find("stage").value = stage;
    find("stage").setAttribute("aria-valuetext", stageName(stage));
    find("threshold").value = state.threshold;
    find("least").textContent = state.threshold.toFixed(2);
    find("count").textContent = found.length === 1 ? "1 object" : `${found.length} objects`;
    for (const [name, value] of Object.entries(state.show)) find(`show-${name}`).checked = value;
    updateBoxes(state, found);
    find("panel").hidden = object === null;
    find("overview").hidden = object !== null;
    updateOverview(state, found);
    if (object !== null) updatePanel(state);
    const best = title(data, rowOf(data, stage), object ?? found[0]);
    find("caption").textContent =
      object === null
        ? `${find("count").textContent} in ${stageName(stage)}; the highest-scoring is ${best}.`
        : `${best} in ${stageName(stage)} (query ${object}) ${relationSentence(state, stage)}`;
    for (const group of page.querySelectorAll(".equations section")) {
      group.classList.toggle("now", (group.id === "base-equations") === (stage === 0));
    }
    updateEquations(state);
  }

  function updateBoxes(state, found) {
    const { stage, object, pinned } = state;
    const row = rowOf(data, stage);
    const made = match(boxes, found, (query) => {
      const node = element(boxes, "button", "box", { type: "button" });
      node.addEventListener("focus", () => node.matches(":focus-visible") && send("focus", { query }));
      node.addEventListener("click", (event) => (event.stopPropagation(), send("pin", { query })));
      return node;
    });
    made.forEach((node, n) => {
      const [left, top, right, bottom] = boxOf(data, row, found[n]);
      const inside = (value, end) => (100 * Math.min(Math.max(value, 0), end)) / end;
      node.style.left = `${inside(left, data.width)}%`;
      node.style.top = `${inside(top, data.height)}%`;
      node.style.right = `${100 - inside(right, data.width)}%`;
      node.style.bottom = `${100 - inside(bottom, data.height)}%`;
      node.tabIndex = found[n] === object || (n === 0 && !found.includes(object)) ? 0 : -1;
      node.setAttribute("aria-pressed", pinned && found[n] === object);
      node.setAttribute("aria-label", `${title(data, row, found[n])}, object ${n + 1} of ${found.length}`);
    });
  }

  function updateOverview({ stage }, found) {
    const row = rowOf(data, stage);
    find("stage-name").textContent = stage ? `Stage ${stage}` : "Base detector";
    match(find("list"), found, (query) => {
      const item = element(find("list"), "li");
      const node = element(item, "button", "step", { type: "button" });
      for (const name of ["step-name", "bar", "step-text"]) element(node, "span", name);
      node.addEventListener("click", () => {
        send("focus", { query });
        boxes.querySelector("[tabindex='0']").focus();
      });
      return item;
    }).forEach((item, n) => {
      const [name, bar, text] = item.firstElementChild.children;
      name.textContent = className(data, row, found[n]);
      bar.style.setProperty("--share", scoreOf(data, row, found[n]));
      text.textContent = scoreOf(data, row, found[n]).toFixed(2);
    });
  }

  function updatePanel(state) {
    const { stage, object, pinned } = state;
    const row = rowOf(data, stage);
    find("object").textContent = className(data, row, object);
    find("query").textContent = `query ${object} · ${sides(boxOf(data, row, object))}`;
    find("path").setAttribute("aria-pressed", pinned);
    find("way").hidden = !pinned;
    const all = steps(data);
    match(find("steps"), all.map((_, n) => n), () => {
      const node = element(find("steps"), "li", "step");
      for (const name of ["step-name", "bar", "step-text"]) element(node, "span", name);
      return node;
    }).forEach((node, n) => {
      const { row: at, name, stage: of } = all[n];
      node.style.setProperty("--color", stageColor(of));
      const score = at < 0 ? 0 : scoreOf(data, at, object);
      const other = at >= 0 && labelOf(data, at, object) !== labelOf(data, row, object);
      node.children[0].textContent = name;
      node.children[1].style.setProperty("--share", score);
      node.children[1].hidden = at < 0;
      const box = stepBox(data, all[n], object);
      const words = at < 0 ? `around (${middle(box).map(whole).join(", ")})` : score.toFixed(2);
      const size = pinned && at >= 0 ? ` · ${sides(box)}` : "";
      node.children[2].textContent = (other ? `${className(data, at, object)} ` : "") + words + size;
    });
    updateGlimpses(state);
    updateRelations(state);
    find("layer").value = state.layer;
    find("head").value = state.head;
    find("level").value = state.level;
  }

  function updateGlimpses(state) {
    const stages = [...Array(data.stages).keys()].map((n) => n + 1);
    match(find("glimpses"), data.arrays.regions ? stages : [], (stage) => {
      const node = element(find("glimpses"), "button", "glimpse", { type: "button" });
      node.style.setProperty("--color", stageColor(stage));
      element(node, "canvas", "", { "aria-hidden": "true" });
      element(node, "span", "alpha");
      node.addEventListener("click", () => send("stage", { value: stage }));
      return node;
    }).forEach((node, n) => {
      const stage = stages[n];
      const { stride } = glimpseOf(data, stage, state.object);
      const [name, alpha] = [`stage ${stage}`, `α\u00a0=\u00a0${data.alphas[n]}`];
      node.children[1].textContent = `${name}\n${alpha}`;
      node.setAttribute("aria-label", `${name} ${alpha}: glimpse from the map of stride ${stride}`);
      node.setAttribute("aria-current", stage === state.stage);
    });
    drawGlimpses(state);
  }

  function drawGlimpses(state) {
    if (state.object === null) return;
    for (const node of find("glimpses").children) {
      drawGlimpse(node.firstElementChild, data, Number(node.dataset.key), state.object);
    }
  }

  function updateRelations(state) {
    const layers = relationLayers(data, state.stage);
    options(find("relations"), layers.map((layer) => [layer, `${layer}`]));
    find("relations").value = state.relations ?? layers.at(-1);
    find("relations").parentElement.hidden = layers.length < 2;
    const related = relatedTo(data, state);
    find("relations-of").textContent = state.stage
      ? `Attention of the glimpse of ${stageName(state.stage)} to the queries of ${stageName(state.stage - 1)}.`
      : "Self-attention among the queries of the decoder.";
    const row = rowOf(data, Math.max(state.stage - 1, 0));
    const rows = related
      ? [
          ...related.others.slice(0, TOP).map(({ query, weight }) => [`${query}`, className(data, row, query), weight]),
          ["itself", "itself", related.itself],
          ["nothing", "no object", related.nothing],
        ]
      : [];
    match(find("related"), rows.map(([key]) => key), () => {
      const node = element(find("related"), "li", "step");
      for (const name of ["step-name", "bar", "step-text"]) element(node, "span", name);
      return node;
    }).forEach((node, n) => {
      const [key, name, weight] = rows[n];
      node.classList.toggle("rest", key === "itself" || key === "nothing");
      node.children[0].textContent = name;
      node.children[1].style.setProperty("--share", weight);
      node.children[2].textContent = percent(weight);
    });
  }

  function relationSentence(state, stage) {
    const related = relatedTo(data, { ...state, stage, relations: stage === state.stage ? state.relations : null });
    if (!related) return ".";
    const row = rowOf(data, Math.max(stage - 1, 0));
    const others = related.others.slice(0, TOP).map(({ query, weight }) => [className(data, row, query), weight]);
    const all = [...others, ["itself", related.itself], ["no object", related.nothing]];
    return `attends to ${all.map(([name, weight]) => `${name} ${percent(weight)}`).join(", ")}.`;
  }

  // The numbers of this object under each equation.
  function updateEquations(state) {
    const { object } = state;
    const base = rowOf(data, 0);
    if (object === null) {
      for (const node of page.querySelectorAll(".here")) node.textContent = "";
      return;
    }
    say("here-points", () => {
      const points = pointsOf(data, { ...state, level: ALL, head: ALL });
      const total = points.reduce((sum, { weight }) => sum + weight, 0);
      const heavy = points.slice(-LARGEST).reduce((sum, { weight }) => sum + weight, 0);
      const outside = points.filter(({ x, y }) => x < 0 || y < 0 || x > data.width || y > data.height).length;
      const most = Math.min(LARGEST, points.length);
      const share = `The ${most} largest of ${points.length} weights have ${percent(heavy / total)} of the total`;
      return `${share}; ${outside} points lie outside the image.`;
    });
    say("here-cells", () => `The largest weight of a cell is ${heatOf(data, state).peak.toFixed(3)}, mean over heads.`);
    say("here-self", () => `Query ${object} ${relationSentence(state, 0)}`);
    say("here-predict", () => `${title(data, base, object)}; box ${sides(boxOf(data, base, object))}.`);
    const stage = Math.max(state.stage, 1);
    if (!data.stages) return;
    const [before, after] = [rowOf(data, stage - 1), rowOf(data, stage)];
    const [from, to] = [boxOf(data, before, object), boxOf(data, after, object)];
    say("here-glimpse", () => {
      const { region, stride } = glimpseOf(data, stage, object);
      const glimpse = `a glimpse of ${sides(region)}, from the map of stride ${stride}`;
      return `Stage ${stage}, α = ${data.alphas[stage - 1]}: the box of ${sides(from)} gives ${glimpse}.`;
    });
    say("here-attend", () => `Stage ${stage}: the glimpse ${relationSentence(state, stage)}`);
    say("here-refine", () => {
      const signed = (number) => (Math.round(number) > 0 ? `+${whole(number)}` : whole(number));
      const shift = middle(to).map((value, n) => signed(value - middle(from)[n]));
      const grow = [0, 1].map((n) => ((to[n + 2] - to[n]) / (from[n + 2] - from[n])).toFixed(2));
      const words = `the center moves by (${shift.join(", ")}) px, width × ${grow[0]}, height × ${grow[1]}`;
      return `Stage ${stage}: ${words}; ${title(data, before, object)} → ${title(data, after, object)}.`;
    });
  }

  function say(id, words) {
    const node = find(id);
    if (!node.closest("[data-if][hidden]")) node.textContent = words();
  }

  // The step that the path has reached, or that of the present stage.
  function markStep(state) {
    const all = steps(data);
    const at = state.pinned ? Math.floor(state.trail) : all.findIndex(({ row }) => row === rowOf(data, state.stage));
    [...find("steps").children].forEach((node, n) => node.classList.toggle("now", n === at));
  }
}
