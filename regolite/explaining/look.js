// What the data say about a choice: objects, points, glimpses, relations, steps. Pure functions; boxes are
// [left, top, right, bottom] in pixels of the original image.

import { part } from "./pack.js";

const SAME = 0.5; // least IoU of two boxes that stand for the same object, as in regolite.plots.stages

// Row of the predictions of a stage; the decoder's layers come first, the last of which is the base detector.
export const rowOf = (data, stage) => data.layers - 1 + stage;

export const stageName = (stage) => (stage ? `stage ${stage}` : "the base detector");

function corners(data, [x, y, width, height]) {
  const [left, top] = [(x - width / 2) * data.width, (y - height / 2) * data.height];
  return [left, top, left + width * data.width, top + height * data.height];
}

export const boxOf = (data, row, query) => corners(data, part(data.arrays.boxes, row, query));

export const scoreOf = (data, row, query) => part(data.arrays.scores, row, query)[0];

export const labelOf = (data, row, query) => part(data.arrays.labels, row, query)[0];

// Names are text of one line, whatever they contain; those that run from right to left keep that to themselves.
export function className(data, row, query) {
  const label = labelOf(data, row, query);
  const name = (data.classes[label] ?? `class ${label}`).replace(/\s+/g, " ");
  return /[\u0590-\u08ff\ufb1d-\ufefc]/.test(name) ? `\u2068${name}\u2069` : name;
}

export const title = (data, row, query) => `${className(data, row, query)} ${scoreOf(data, row, query).toFixed(2)}`;

// A box on the way between two rows.
export function boxBetween(data, at, query) {
  const [from, to] = [boxOf(data, Math.floor(at), query), boxOf(data, Math.ceil(at), query)];
  return from.map((value, n) => value + (to[n] - value) * (at - Math.floor(at)));
}

// The queries whose score at the stage reaches the threshold, best first; the best one if none does.
export function objects(data, { stage, threshold }) {
  const row = rowOf(data, stage);
  const ranked = [...data.arrays.queries.values].sort((a, b) => scoreOf(data, row, b) - scoreOf(data, row, a));
  const found = ranked.filter((query) => scoreOf(data, row, query) >= threshold);
  return found.length ? found : ranked.slice(0, 1);
}

// Position of a query among those that the large arrays have rows for.
const kept = (data, query) => data.arrays.queries.values.indexOf(query);

// The sampling points of a query: { x, y, weight, head, level }, heaviest last. Weights sum to 1 for each head.
export function pointsOf(data, { object, layer, head, level }) {
  const { points, weights } = data.arrays;
  if (!points) return [];
  const [, , heads, levels, count] = points.shape;
  const places = part(points, layer, kept(data, object));
  const shares = part(weights, layer, kept(data, object));
  const found = [];
  for (let h = 0; h < heads; h++) {
    for (let l = 0; l < levels; l++) {
      if ((head >= 0 && h !== head) || (level >= 0 && l !== level)) continue;
      for (let n = (h * levels + l) * count; n < (h * levels + l + 1) * count; n++) {
        const [x, y] = [places[2 * n] * data.width, places[2 * n + 1] * data.height];
        found.push({ x, y, weight: shares[n], head: h, level: l });
      }
    }
  }
  return found.sort((a, b) => a.weight - b.weight);
}

// The reference point of a layer of the decoder.
export function originOf(data, { object, layer }) {
  const [x, y] = part(data.arrays.origins, layer, kept(data, object));
  return [x * data.width, y * data.height];
}

// Dense attention: the maps of a query, { rows, columns, right, bottom, values }, and the largest weight of a cell.
export function heatOf(data, { object, layer, level }) {
  const { cells, peaks } = data.arrays;
  if (!cells) return { maps: [], peak: 0 };
  const values = part(cells, layer, kept(data, object));
  let start = 0;
  const maps = data.maps.map((map) => ({ ...map, values: values.subarray(start, (start += map.rows * map.columns)) }));
  const chosen = maps.filter((_, n) => level < 0 || n === level);
  return { maps: chosen, peak: part(peaks, layer, kept(data, object))[0] };
}

// The region of a stage's glimpse and the stride of the map that it is cut from.
export function glimpseOf(data, stage, query) {
  const [left, top, right, bottom] = part(data.arrays.regions, stage - 1, query);
  const region = [left * data.width, top * data.height, right * data.width, bottom * data.height];
  return { region, stride: data.glimpse_strides[part(data.arrays.region_levels, stage - 1, query)[0]] };
}

// The intersection over union of two boxes.
export function overlap(a, b) {
  const wide = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const high = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  if (wide <= 0 || high <= 0) return 0;
  const area = ([left, top, right, bottom]) => (right - left) * (bottom - top);
  return (wide * high) / (area(a) + area(b) - wide * high);
}

export const relationLayers = (data, stage) => data.relations.filter(([s]) => s === stage).map(([, layer]) => layer);

// The attention of a query to all queries, in a layer of a stage's relations; null where there is none.
export function attentionOf(data, stage, layer, query) {
  const entry = data.relations.findIndex(([s, l]) => s === stage && l === layer);
  return entry < 0 ? null : part(data.arrays.relations, entry, kept(data, query));
}

// A query's attention to the objects of the previous stage, as regolite.plots.stages.related groups it: every query
// stands for the object that its box overlaps most. { others: [{ query, weight }], itself, nothing }, or null.
export function relatedTo(data, { stage, object, threshold, relations }) {
  const layer = relations ?? relationLayers(data, stage).at(-1);
  const weights = object === null ? null : attentionOf(data, stage, layer, object);
  if (!weights) return null;
  const row = rowOf(data, Math.max(stage - 1, 0));
  const boxes = [...weights].map((_, query) => boxOf(data, row, query));
  const rank = (query) => (query === object ? 2 : scoreOf(data, row, query));
  const candidates = [...boxes.keys()].filter((query) => rank(query) >= threshold).sort((a, b) => rank(b) - rank(a));
  const found = []; // after non-maximum suppression by class; the first is the object itself
  for (const query of candidates) {
    const same = (other) => labelOf(data, row, other) === labelOf(data, row, query);
    if (!found.some((other) => same(other) && overlap(boxes[other], boxes[query]) > SAME)) found.push(query);
  }
  const shares = found.map(() => 0);
  let nothing = 0;
  boxes.forEach((box, query) => {
    let nearest = found.indexOf(query);
    if (nearest < 0) {
      const overlaps = found.map((other) => overlap(boxes[other], box));
      nearest = overlaps.indexOf(Math.max(...overlaps));
      if (overlaps[nearest] < SAME) nearest = -1;
    }
    if (nearest < 0) nothing += weights[query];
    else shares[nearest] += weights[query];
  });
  const others = found.map((query, n) => ({ query, weight: shares[n] })).slice(1);
  return { others: others.sort((a, b) => b.weight - a.weight), itself: shares[0], nothing };
}

// The path of a box: the reference, each layer of the decoder, each stage. Rows of the predictions, -1 the reference.
export function steps(data) {
  const rows = [...Array(data.layers + data.stages).keys()];
  const found = rows.map((row) => ({ row, stage: Math.max(0, row - data.layers + 1), name: stepName(data, row) }));
  return data.arrays.references ? [{ row: -1, stage: 0, name: "reference" }, ...found] : found;
}

function stepName(data, row) {
  if (row >= data.layers) return `stage ${row - data.layers + 1}`;
  return row === data.layers - 1 ? "base" : `layer ${row}`;
}

// The box of a step; a reference point is a box without size.
export function stepBox(data, step, query) {
  if (step.row >= 0) return boxOf(data, step.row, query);
  const [x, y, width = 0, height = 0] = part(data.arrays.references, query);
  return corners(data, [x, y, width, height]);
}

export const middle = ([left, top, right, bottom]) => [(left + right) / 2, (top + bottom) / 2];

// The middle of the part of a box inside the image.
export function middleInside(data, [left, top, right, bottom]) {
  const inside = (value, end) => Math.min(Math.max(value, 0), end);
  return middle([
    inside(left, data.width), inside(top, data.height), inside(right, data.width), inside(bottom, data.height),
  ]);
}

// Of overlapping boxes the smallest one around a position.
export function objectAt(data, state, [x, y]) {
  let [best, least] = [null, Infinity];
  for (const query of objects(data, state)) {
    const [left, top, right, bottom] = boxOf(data, rowOf(data, state.stage), query);
    const area = (right - left) * (bottom - top);
    if (left <= x && x <= right && top <= y && y <= bottom && area < least) [best, least] = [query, area];
  }
  return best;
}
