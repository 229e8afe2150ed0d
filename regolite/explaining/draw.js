// Drawing on canvases: what `data` and `state` say, wherever the data come from.

import {
  boxBetween, className, glimpseOf, heatOf, middle, middleInside, objects, originOf, pointsOf, relatedTo, rowOf,
  stepBox, steps, title,
} from "./look.js";

const NARROW = 480; // pixels of an image with short labels
export const TOP = 4; // related objects that are drawn

// The colors of regolite.plots.drawing: by stage from cold to warm, and by level.
export const STAGE_COLORS = ["#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#CC79A7", "#F0E442"];
export const LEVEL_COLORS = ["#D55E00", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#F0E442"];
const HEAT = [[255, 255, 255, 0], [230, 159, 0, 176], [213, 94, 0, 240]];
const INK = "#222222";
const SHADE = "rgb(10 12 16 / 0.45)"; // outside of a glimpse
const SEAM = "rgb(255 255 255 / 0.75)"; // around colored lines, for contrast on any photograph

export const stageColor = (stage) => STAGE_COLORS[stage % STAGE_COLORS.length];
export const levelColor = (level) => LEVEL_COLORS[level % LEVEL_COLORS.length];

// Dark or white letters on a color.
function inkOn(color) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16) / 255);
  return 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 ? INK : "#FFFFFF";
}

// Fit a canvas to its place on the screen and give a context whose unit is one pixel of CSS.
function contextOf(canvas, width, height) {
  const density = window.devicePixelRatio || 1;
  const [across, down] = [Math.round(width * density), Math.round(height * density)];
  if (canvas.width !== across || canvas.height !== down) [canvas.width, canvas.height] = [across, down];
  const context = canvas.getContext("2d");
  context.setTransform(density, 0, 0, density, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// The photograph with all that is chosen.
export function draw(canvas, data, state) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width) return;
  const context = contextOf(canvas, width, height);
  const row = rowOf(data, state.phase);
  const brush = { context, scale: width / data.width, shift: [0, 0], width, height, data, state, row, labels: [] };
  const { object, show, stage, pinned, stale } = state;
  const color = stageColor(stage);
  const last = rowOf(data, stage);

  const maps = object !== null && show.reads && stage === 0 ? heatOf(data, state).maps : [];
  context.filter = maps.length ? "grayscale(1) opacity(0.62)" : "none";
  context.drawImage(data.image, 0, 0, width, height);
  context.filter = "none";
  for (const map of maps) drawHeat(brush, map);
  if (stale) { // the boxes of before stay until the answer comes, faintly and without words
    for (const query of objects(data, state)) drawBox(brush, boxBetween(data, row, query), color, 1.5, 0.3);
    return;
  }

  const glimpsed = object !== null && data.arrays.regions && show.glimpse && stage > 0 && !pinned;
  const region = glimpsed ? glimpseOf(data, stage, object).region : null;
  if (region) shadeOutside(brush, region);
  const others = pinned ? [] : objects(data, state).filter((query) => query !== object);
  for (const query of others.reverse()) {
    const box = boxBetween(data, row, query);
    drawBox(brush, box, color, object === null ? 2 : 1.25, object === null ? 1 : 0.7);
    if (object === null) brush.labels.unshift([box, title(data, last, query), color]);
  }
  if (object !== null) {
    const box = boxBetween(data, row, object);
    if (region) drawBox(brush, region, color, 1.75, 1, [7, 5]);
    if (show.relations && !pinned) drawRelations(brush, color);
    if (show.reads && !pinned) drawPoints(brush);
    if (pinned) drawPath(brush);
    else drawBox(brush, box, color, 3.5);
    brush.labels.unshift([box, title(data, last, object), color]);
  }
  drawLabels(brush);
}

// A box inside the image, so that its border stays visible.
function placed({ scale, shift: [x, y], width, height }, [left, top, right, bottom], edge) {
  const inside = (value, end) => Math.max(edge, Math.min(end - edge, value));
  const [across, down] = [(value) => inside(value * scale - x, width), (value) => inside(value * scale - y, height)];
  return [across(left), down(top), across(right), down(bottom)];
}

function drawBox(brush, box, color, line, opacity = 1, dash = []) {
  const { context } = brush;
  const [left, top, right, bottom] = placed(brush, box, line / 2 + 1);
  context.save();
  context.globalAlpha = opacity;
  for (const [style, thick] of [[SEAM, line + 2], [color, line]]) {
    context.strokeStyle = style;
    context.lineWidth = thick;
    context.setLineDash(dash);
    context.strokeRect(left, top, right - left, bottom - top);
  }
  context.restore();
}

function shadeOutside(brush, region) {
  const { context, width, height } = brush;
  const [left, top, right, bottom] = placed(brush, region, 0);
  context.fillStyle = SHADE;
  context.beginPath();
  context.rect(0, 0, width, height);
  context.rect(left, top, right - left, bottom - top);
  context.fill("evenodd");
}

function drawHeat({ context, width, height }, { rows, columns, right, bottom, values }) {
  const cells = new OffscreenCanvas(columns, rows);
  const pixels = new ImageData(columns, rows);
  values.forEach((share, n) => {
    const [from, to, part] = share < 0.5 ? [HEAT[0], HEAT[1], 2 * share] : [HEAT[1], HEAT[2], 2 * share - 1];
    pixels.data.set(from.map((value, channel) => value + (to[channel] - value) * part), 4 * n);
  });
  cells.getContext("2d").putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(cells, 0, 0, right * width, bottom * height);
  context.imageSmoothingEnabled = true;
}

function drawPoints({ context, scale, width, height, data, state }) {
  const points = pointsOf(data, state);
  if (!points.length) return;
  const peak = points.at(-1).weight || 1;
  const largest = Math.min(11, Math.max(6, 0.016 * Math.max(width, height)));
  for (const { x, y, weight, level } of points) {
    const share = weight / peak;
    context.beginPath();
    // The area is proportional to the weight.
    context.arc(x * scale, y * scale, Math.max(1.2, largest * Math.sqrt(share)), 0, 2 * Math.PI);
    context.globalAlpha = 0.35 + 0.65 * share;
    context.fillStyle = levelColor(level);
    context.fill();
    context.strokeStyle = "#FFFFFF";
    context.lineWidth = 1;
    context.stroke();
  }
  context.globalAlpha = 1;
  drawCross(context, originOf(data, state).map((value) => value * scale));
}

function drawCross(context, [x, y], arm = 7) {
  for (const [style, line] of [["#FFFFFF", 4.5], [INK, 2]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.setLineDash([]);
    context.beginPath();
    context.moveTo(x - arm, y);
    context.lineTo(x + arm, y);
    context.moveTo(x, y - arm);
    context.lineTo(x, y + arm);
    context.stroke();
  }
}

// Lines from the object to those that it attends to most, where the previous stage has them.
function drawRelations(brush, color) {
  const { context, scale, data, state } = brush;
  const related = relatedTo(data, state);
  if (!related) return;
  const row = rowOf(data, Math.max(state.stage - 1, 0));
  const from = middleInside(data, boxBetween(data, brush.row, state.object)).map((value) => value * scale);
  for (const { query, weight } of related.others.slice(0, TOP)) {
    const box = boxBetween(data, row, query);
    const to = middleInside(data, box).map((value) => value * scale);
    const line = Math.min(1.25 + 20 * weight, 12);
    context.lineCap = "round";
    for (const [style, thick] of [[SEAM, line + 2], [color, line]]) {
      context.strokeStyle = style;
      context.lineWidth = thick;
      context.beginPath();
      context.moveTo(...from);
      context.lineTo(...to);
      context.stroke();
    }
    drawBox(brush, box, INK, 1.5);
    const share = `${Math.round(100 * weight)}\u00a0%`;
    brush.labels.push([box, brush.width < NARROW ? share : `${className(data, row, query)} ${share}`, INK]);
  }
}

// The path of the box: each step in the color of its stage, up to the present one, and the way of its middle.
function drawPath(brush, line = 3.5) {
  const { context, scale, shift, data, state } = brush;
  const all = steps(data);
  const boxes = all.map((step) => stepBox(data, step, state.object));
  const last = Math.min(state.trail, all.length - 1);
  for (let n = 0; n <= last; n++) {
    if (all[n].row >= 0) drawBox(brush, boxes[n], stageColor(all[n].stage), 1.5, 0.9);
  }
  const [from, to] = [boxes[Math.floor(last)], boxes[Math.ceil(last)]];
  const now = from.map((value, n) => value + (to[n] - value) * (last - Math.floor(last)));
  drawBox(brush, now, stageColor(all[Math.ceil(last)].stage), line);
  const onCanvas = (box) => middle(box).map((value, n) => value * scale - shift[n]);
  const way = [...boxes.slice(0, Math.floor(last) + 1), now].map(onCanvas);
  for (const [style, line] of [["#FFFFFF", 4], [INK, 1.5]]) {
    context.strokeStyle = style;
    context.lineWidth = line;
    context.beginPath();
    way.forEach(([x, y], n) => (n ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.stroke();
  }
  way.slice(0, Math.floor(last) + 1).forEach(([x, y], n) => {
    context.beginPath();
    context.arc(x, y, 4.5, 0, 2 * Math.PI);
    context.fillStyle = stageColor(all[n].stage);
    context.fill();
    context.strokeStyle = "#FFFFFF";
    context.lineWidth = 1.5;
    context.stroke();
  });
  drawCross(context, way[0]);
}

// The path alone, as large as it fits.
export function drawWay(canvas, data, state) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width || !state.pinned) return;
  const context = contextOf(canvas, width, height);
  const boxes = steps(data).map((step) => stepBox(data, step, state.object));
  const [left, top, right, bottom] = [0, 1, 2, 3].map((n) => {
    const sides = boxes.map((box) => box[n]); // of all boxes on the way, inside the image
    return n < 2 ? Math.max(0, Math.min(...sides)) : Math.min([data.width, data.height][n - 2], Math.max(...sides));
  });
  const scale = 0.86 * Math.min(width / (right - left), height / (bottom - top));
  const shift = [
    within(((left + right) * scale - width) / 2, data.width * scale - width),
    within(((top + bottom) * scale - height) / 2, data.height * scale - height),
  ];
  context.drawImage(data.image, -shift[0], -shift[1], data.width * scale, data.height * scale);
  drawPath({ context, scale, shift, width, height, data, state }, 2);
}

// A shift that shows no more than the image; a small image is in the middle.
const within = (shift, most) => (most < 0 ? most / 2 : Math.max(0, Math.min(shift, most)));

// Labels at the corners of their boxes, where they hide least of the labels before and are moved least.
function drawLabels(brush) {
  const { context, width, height } = brush;
  const narrow = width < NARROW;
  const size = narrow ? 10 : 13;
  context.font = `600 ${size}px ${getComputedStyle(context.canvas).fontFamily}`;
  context.textBaseline = "middle";
  context.textAlign = "center";
  const taken = [];
  for (const [box, text, color] of brush.labels) {
    const words = shortened(context, text, Math.min(width * 0.6, 240));
    const [wide, high] = [context.measureText(words).width + 10, size + 7];
    const [left, top, right, bottom] = placed(brush, box, 1);
    const hidden = (x, y) =>
      taken.reduce((sum, [a, b, c, d]) => {
        const [across, down] = [Math.min(x + wide, c) - Math.max(x, a), Math.min(y + high, d) - Math.max(y, b)];
        return sum + Math.max(0, across) * Math.max(0, down);
      }, 0);
    const corners = [
      [left, top - high], [left, top], [right - wide, top],
      [left, bottom - high], [left, bottom], [right - wide, bottom],
    ].slice(0, narrow ? 2 : 6).map(([x, y]) => {
      const [a, b] = [Math.max(0, Math.min(width - wide, x)), Math.max(0, Math.min(height - high, y))];
      return { x: a, y: b, cost: hidden(a, b) + high * Math.hypot(a - x, b - y) };
    });
    const { x, y } = corners.reduce((best, corner) => (corner.cost < best.cost ? corner : best));
    if (hidden(x, y) > 0.15 * wide * high) continue; // the list beside the photograph has it
    taken.push([x, y, x + wide, y + high]);
    context.fillStyle = color;
    context.globalAlpha = 0.92;
    context.beginPath();
    context.roundRect(x, y, wide, high, 3);
    context.fill();
    context.globalAlpha = 1;
    context.fillStyle = inkOn(color);
    context.fillText(words, x + wide / 2, y + high / 2 + 0.5);
  }
}

// A text that is no wider than so many pixels.
function shortened(context, text, most) {
  if (context.measureText(text).width <= most) return text;
  const letters = [...text];
  while (letters.length > 1 && context.measureText(`${letters.join("")}…`).width > most) letters.pop();
  return `${letters.join("")}…`;
}

// A glimpse as RoIAlign cuts it: its region stretched to a square with 7 x 7 bins, and two boxes in it, that of the
// previous stage dashed. What lies outside the photograph stays transparent.
export function drawGlimpse(canvas, data, stage, query) {
  const side = canvas.clientWidth;
  if (!side) return;
  const context = contextOf(canvas, side, side);
  const [left, top, right, bottom] = glimpseOf(data, stage, query).region;
  const [across, down] = [side / (right - left), side / (bottom - top)];
  context.drawImage(data.image, -left * across, -top * down, data.width * across, data.height * down);
  context.save();
  context.beginPath();
  context.rect(-left * across, -top * down, data.width * across, data.height * down);
  context.clip(); // no bins outside of the photograph
  context.strokeStyle = "rgb(255 255 255 / 0.4)";
  context.lineWidth = 0.75;
  context.beginPath();
  for (let n = 1; n < 7; n++) {
    const at = (side * n) / 7;
    context.moveTo(at, 0);
    context.lineTo(at, side);
    context.moveTo(0, at);
    context.lineTo(side, at);
  }
  context.stroke();
  context.restore();
  for (const [number, dash] of [[stage - 1, [4, 3]], [stage, []]]) {
    const [x0, y0, x1, y1] = boxBetween(data, rowOf(data, number), query);
    const place = [(x0 - left) * across, (y0 - top) * down, (x1 - x0) * across, (y1 - y0) * down];
    for (const [style, line] of [[SEAM, 3.5], [stageColor(number), 2]]) {
      context.strokeStyle = style;
      context.lineWidth = line;
      context.setLineDash(dash);
      context.strokeRect(...place);
    }
  }
  context.setLineDash([]);
}
