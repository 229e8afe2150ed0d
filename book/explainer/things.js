// The drawn objects of a scene ("things") and the detector's queries: which query stands for which thing, and what one
// says of the other. Pure functions.

import { attentionOf, boxOf, overlap, rowOf, scoreOf } from "./look.js";
import { part } from "./pack.js";
import { boxOf as visibleBox } from "./scene.js";

const SAME = 0.5; // least IoU of a box with the thing that it stands for

// The box around the circumscribed circle of a thing; of a ball, its box.
export const frameOf = ({ x, y, radius }) => [x - radius, y - radius, x + radius, y + radius];

const known = new WeakMap();

// The boxes of the visible parts of all things.
export function boxesOf(scene) {
  if (!known.has(scene)) known.set(scene, scene.things.map((thing, k) => visibleBox(scene, k) ?? frameOf(thing)));
  return known.get(scene);
}

export const balls = (scene) => [...scene.things.keys()].filter((k) => scene.things[k].shape === "ball");

export const without = (scene, k) => ({ ...scene, things: scene.things.filter((_, n) => n !== k) });

const plainName = ({ shape, texture }) => (shape === "ball" ? "ball" : `${texture} ${shape}`);

// Names of things; those that share one are told apart by their places.
export function namesOf(scene) {
  const plain = scene.things.map(plainName);
  return plain.map((name, k) => {
    const alike = [...plain.keys()].filter((n) => plain[n] === name);
    return alike.length < 2 ? name : `${name} at the ${placeOf(scene, k, alike)}`;
  });
}

// The side on which a thing lies of those that are called like it, along the axis in which they differ most.
function placeOf(scene, k, alike) {
  const axes = ["x", "y"].map((axis) => alike.map((n) => scene.things[n][axis]));
  const [wide, high] = axes.map((values) => Math.max(...values) - Math.min(...values));
  const [axis, ends] = wide >= high ? ["x", ["left", "right"]] : ["y", ["top", "bottom"]];
  const order = [...alike].sort((a, b) => scene.things[a][axis] - scene.things[b][axis]).indexOf(k);
  if (order === 0) return ends[0];
  return order === alike.length - 1 ? ends[1] : `middle (${order + 1})`;
}

// The query that stands for a thing: of those whose box in the last stage overlaps it, the highest-scoring one, or null. `box` is the visible box of the thing.
export function queryOf(data, box) {
  const row = rowOf(data, data.stages);
  const on = [...data.arrays.queries.values].filter((query) => overlap(boxOf(data, row, query), box) >= SAME);
  const score = (query) => scoreOf(data, row, query);
  return on.reduce((best, query) => (best === null || score(query) > score(best) ? query : best), null);
}

// The attention of a query to each thing in a layer of a stage, from 0 to 1: the sum of its weights on the queries that
// stand for the thing.
export function sharesOf(data, stage, layer, query, boxes) {
  const row = rowOf(data, Math.max(stage - 1, 0));
  const shares = boxes.map(() => 0);
  attentionOf(data, stage, layer, query).forEach((weight, other) => {
    const overlaps = boxes.map((box) => overlap(boxOf(data, row, other), box));
    const nearest = overlaps.indexOf(Math.max(...overlaps));
    if (overlaps[nearest] >= SAME) shares[nearest] += weight;
  });
  return shares;
}

// The scores of a query for a class, by stage; zeros where no query stands for the thing.
export function scoresOf(data, query, label) {
  return [...Array(data.stages + 1).keys()].map((stage) =>
    query === null ? 0 : part(data.arrays.class_scores, stage, query)[label],
  );
}
