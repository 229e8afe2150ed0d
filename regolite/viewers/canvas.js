// The front end of ImageCanvas (canvas.py): draws its state and reports picked boxes and points.
// Plain JavaScript without a build step. Coordinates are in pixels of the original image, the SVG's viewBox.

const SVG = "http://www.w3.org/2000/svg";
const STEPS = 100; // arrow key steps across the image
const EDGE = 0.003; // margin of clipped boxes, as a fraction of the image's longer side
const HEAT = [[255, 255, 255, 0], [230, 159, 0, 176], [213, 94, 0, 240]]; // as in regolite.plots.drawing
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function html(parent, tag, className, attributes = {}) {
  const node = document.createElement(tag);
  node.className = className;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
}

function svg(parent, tag, className = "") {
  const node = document.createElementNS(SVG, tag);
  if (className) node.setAttribute("class", className);
  parent.append(node);
  return node;
}

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null) node.removeAttribute(name);
    else node.setAttribute(name, value);
  }
}

// Add or remove children of a group until there is one per thing. The others stay, as one may have the focus.
function match(group, things, make) {
  while (group.children.length > things.length) group.lastElementChild.remove();
  while (group.children.length < things.length) make(group);
  return [...group.children];
}

function colorOf(shade) {
  const t = (shade / 255) * 2;
  const [from, to, part] = t < 1 ? [HEAT[0], HEAT[1], t] : [HEAT[1], HEAT[2], t - 1];
  return from.map((value, n) => Math.round(value + (to[n] - value) * part));
}

// JupyterLab and Notebook handle arrows, Enter and letters themselves, even if a drop-down has the focus, unless the
// focused element has this attribute. Here the controls get the keys, except Escape, Shift+Enter and those with Ctrl,
// Alt or Meta, which the notebook gets.
function guard(event) {
  if (!event.target.closest?.(".rg-figure, .rg-viewer")) return;
  const theirs = event.ctrlKey || event.altKey || event.metaKey || (event.shiftKey && event.key === "Enter");
  if (theirs || event.key === "Escape") event.target.removeAttribute("data-lm-suppress-shortcuts");
  else event.target.setAttribute("data-lm-suppress-shortcuts", "true");
}

function render({ model, el }) {
  const get = (name) => model.get(name);
  const figure = html(el, "div", "rg-figure");
  const stage = html(figure, "div", "rg-stage");
  const image = html(stage, "img", "rg-image", { role: "img", draggable: "false" });
  const heat = html(stage, "canvas", "rg-heat", { "aria-hidden": "true" });
  const overlay = svg(stage, "svg", "rg-overlay");
  set(overlay, { role: "group", "aria-label": "objects: press Enter to pick one" });
  const [lines, boxes, points] = ["rg-lines", "rg-boxes", "rg-points"].map((name) => svg(overlay, "g", name));
  for (const group of [lines, points]) set(group, { "aria-hidden": "true" });
  const point = html(stage, "div", "rg-point", { role: "application", "aria-roledescription": "point" });
  const tags = html(stage, "div", "rg-tags", { "aria-hidden": "true" });
  const tip = html(stage, "div", "rg-tip", { role: "tooltip" });
  const legend = html(figure, "div", "rg-legend");
  const caption = html(figure, "div", "rg-caption", { role: "status" });
  let url = null;

  // Drawing.

  function drawImage() {
    if (url) URL.revokeObjectURL(url);
    url = get("image").byteLength ? URL.createObjectURL(new Blob([get("image")], { type: "image/jpeg" })) : null;
    if (url) image.src = url;
    else image.removeAttribute("src");
    stage.style.aspectRatio = `${get("width")} / ${get("height")}`;
    // Tall images are narrower, to fit on the screen.
    stage.style.maxWidth = `min(100%, ${Math.round((480 * get("width")) / get("height"))}px)`;
    set(overlay, { viewBox: `0 0 ${get("width")} ${get("height")}` });
  }

  function drawHeat() {
    const [rows, columns] = get("heat_shape");
    const bytes = new Uint8Array(get("heat").buffer, get("heat").byteOffset, get("heat").byteLength);
    const valid = rows * columns > 0 && bytes.length === rows * columns;
    heat.hidden = !valid;
    stage.classList.toggle("rg-pale", valid);
    if (!valid) return;
    heat.width = columns;
    heat.height = rows;
    const pixels = new ImageData(columns, rows);
    bytes.forEach((shade, n) => pixels.data.set(colorOf(shade), 4 * n));
    heat.getContext("2d").putImageData(pixels, 0, 0);
    const [width, height] = get("heat_size");
    heat.style.width = `${(100 * width) / get("width")}%`;
    heat.style.height = `${(100 * height) / get("height")}%`;
    heat.style.imageRendering = get("smooth") ? "auto" : "pixelated";
  }

  function drawBoxes() {
    const things = get("boxes");
    const made = match(boxes, things, (group) => {
      const node = svg(group, "g", "rg-box");
      svg(node, "rect", "rg-seam");
      svg(node, "rect", "rg-line");
      const index = () => [...group.children].indexOf(node);
      node.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        pick(index());
      });
      // Screen readers click the button; mouse clicks go to the stage, see below.
      node.addEventListener("click", (event) => (event.stopPropagation(), pick(index())));
      node.addEventListener("focus", () => showTip(index()));
      node.addEventListener("blur", () => showTip(-1));
    });
    made.forEach((node, n) => {
      const thing = things[n];
      const [left, top, right, bottom] = inside(thing.box);
      const picked = n === get("picked");
      node.classList.toggle("rg-picked", picked);
      node.classList.toggle("rg-dashed", Boolean(thing.dashed));
      for (const rect of node.children) {
        set(rect, { x: left, y: top, width: Math.max(0, right - left), height: Math.max(0, bottom - top) });
      }
      node.lastElementChild.setAttribute("stroke", thing.color);
      set(node, {
        tabindex: thing.fixed ? null : 0, role: thing.fixed ? "img" : "button", "aria-label": thing.label,
        "aria-pressed": thing.fixed ? null : String(picked),
      });
    });
    const tagged = things.filter((thing) => thing.tag);
    match(tags, tagged, (parent) => html(parent, "span", "rg-tag")).forEach((node, n) => {
      node.textContent = tagged[n].tag;
      node.style.background = tagged[n].color;
      place(node, tagged[n].box);
    });
  }

  function drawLines() {
    match(lines, get("lines"), (group) => svg(group, "line")).forEach((node, n) => {
      const { ends, width, color } = get("lines")[n];
      set(node, { x1: ends[0], y1: ends[1], x2: ends[2], y2: ends[3], stroke: color, "stroke-width": width });
    });
  }

  function drawPoints() {
    match(points, get("points"), (group) => svg(group, "path")).forEach((node, n) => {
      const { x, y, r, opacity, color, shape } = get("points")[n];
      const dot = `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`;
      const cross = `M${x - r},${y}h${2 * r}M${x},${y - r}v${2 * r}`;
      set(node, { d: shape === "cross" ? cross : dot, opacity, "data-x": x, "data-y": y, class: `rg-${shape}` });
      set(node, shape === "cross" ? { stroke: color, fill: null } : { fill: color, stroke: null });
    });
  }

  function drawPoint() {
    const [x, y] = get("clicked");
    point.hidden = !get("asks");
    stage.classList.toggle("rg-pointing", get("asks") && get("pointing"));
    point.style.left = `${(100 * (x ?? get("width") / 2)) / get("width")}%`;
    point.style.top = `${(100 * (y ?? get("height") / 2)) / get("height")}%`;
    const where = x === undefined ? "no point yet" : `x ${Math.round(x)}, y ${Math.round(y)}`;
    set(point, { tabindex: 0, "aria-label": `point of the image, ${where}; move it with the arrow keys` });
  }

  function drawWords() {
    image.setAttribute("aria-label", get("label"));
    image.alt = get("label");
    caption.textContent = get("caption");
    match(legend, get("legend"), (parent) => {
      const node = html(parent, "span", "rg-entry");
      html(node, "span", "rg-swatch");
      html(node, "span", "rg-words");
    }).forEach((node, n) => {
      node.firstElementChild.style.background = get("legend")[n][0];
      node.lastElementChild.textContent = get("legend")[n][1];
    });
  }

  function draw() {
    for (const part of [drawHeat, drawLines, drawBoxes, drawPoints, drawPoint, drawWords]) part();
    figure.dataset.settings = get("settings"); // last: tests wait for it
  }

  // A box clipped to slightly inside the image, so that its border stays visible.
  function inside([left, top, right, bottom]) {
    const seam = EDGE * Math.max(get("width"), get("height"));
    const kept = (value, end) => Math.max(seam, Math.min(end - seam, value));
    const [width, height] = [get("width"), get("height")];
    return [kept(left, width), kept(top, height), kept(right, width), kept(bottom, height)];
  }

  // A label inside the image at the upper left corner of a box, or the upper right one of boxes far to the right.
  function place(node, box) {
    const [left, top, right] = inside(box).map((value, n) => (100 * value) / get(n % 2 ? "height" : "width"));
    const far = left > 60;
    node.style.left = far ? "auto" : `${left}%`;
    node.style.right = far ? `${100 - right}%` : "auto";
    node.style.top = `${Math.min(94, top)}%`;
  }

  function showTip(index) {
    const thing = get("boxes")[index];
    tip.classList.toggle("rg-shown", Boolean(thing));
    if (!thing) return;
    tip.textContent = thing.label;
    place(tip, thing.box);
  }

  // User input.

  function pick(index) {
    model.set("picked", index);
    model.save_changes();
  }

  function ask(x, y) {
    const kept = (value, end) => Math.max(0, Math.min(end - 0.01, value));
    model.set("clicked", [kept(x, get("width")), kept(y, get("height"))]);
    model.save_changes();
  }

  function whereIs(event) {
    const frame = stage.getBoundingClientRect();
    return [
      ((event.clientX - frame.left) / frame.width) * get("width"),
      ((event.clientY - frame.top) / frame.height) * get("height"),
    ];
  }

  // Of overlapping boxes, the smallest one around the position is picked.
  function boxAt([x, y]) {
    let best = -1;
    let least = Infinity;
    get("boxes").forEach(({ box: [left, top, right, bottom], fixed }, n) => {
      const area = (right - left) * (bottom - top);
      if (!fixed && left <= x && x <= right && top <= y && y <= bottom && area < least) [best, least] = [n, area];
    });
    return best;
  }

  stage.addEventListener("click", (event) => {
    const place = whereIs(event);
    const box = get("pointing") && get("asks") ? -1 : boxAt(place);
    if (box >= 0) pick(box);
    else if (get("asks")) ask(...place);
  });
  stage.addEventListener("mousemove", (event) => showTip(boxAt(whereIs(event))));
  stage.addEventListener("mouseleave", () => showTip(-1));
  point.addEventListener("keydown", (event) => {
    const way = KEYS[event.key];
    if (!way) return;
    event.preventDefault();
    const step = Math.max(1, Math.max(get("width"), get("height")) / STEPS) * (event.shiftKey ? 10 : 1);
    const [x, y] = get("clicked").length ? get("clicked") : [get("width") / 2, get("height") / 2];
    ask(x + step * way[0], y + step * way[1]);
  });

  // A message from Python changes several attributes at once: draw after the last one.
  let waiting = false;
  const drawSoon = () => {
    if (waiting) return;
    waiting = true;
    queueMicrotask(() => {
      waiting = false;
      draw();
    });
  };
  const imageChanged = () => (drawImage(), drawSoon());
  const guardOwn = (event) => guard(event); // one listener per view, removed with the view
  window.addEventListener("keydown", guardOwn, true); // on the window: before the notebook's handlers
  model.on("change:image", imageChanged);
  model.on("change", drawSoon);
  drawImage();
  draw();

  return () => {
    window.removeEventListener("keydown", guardOwn, true);
    model.off("change:image", imageChanged);
    model.off("change", drawSoon);
    if (url) URL.revokeObjectURL(url);
  };
}

export default { render };
