// Drawn scenes as regolite.data.scenes makes them, for a visitor who moves, adds and removes things. A scene is
// { size, background, things }: background is RGB or RGBA of size x size pixels, things are those of the Python class
// Thing: { shape, texture, x, y, radius, angle, colors, period, phase }, later ones in front. A ball's class is that of
// the nearest square or star. Functions change no scene that they are given.

export const TEXTURES = ["striped", "dotted", "checked"];
export const DECIDERS = ["square", "star"];
const ARM = [[1, -0.36], [1, 0.36], [0.36, 0.36]].map(([x, y]) => [0.94 * x, 0.94 * y]); // of the cross

// Corners of each shape within a circle of radius 1.
const CORNERS = {
  square: polar([1, 1, 1, 1]),
  star: polar([1, 0.45, 1, 0.45, 1, 0.45, 1, 0.45, 1, 0.45]),
  triangle: polar([1, 1, 1]),
  cross: [[1, 0], [0, 1], [-1, 0], [0, -1]].flatMap(([cos, sin]) => turned(ARM, cos, sin)),
};
export const SHAPES = [...Object.keys(CORNERS), "ball"];
export const CLASSES = [
  ...Object.keys(CORNERS).flatMap((shape) => TEXTURES.map((texture) => `${texture} ${shape}`)),
  ...DECIDERS.map((shape) => `ball of ${shape}`),
];

const FINE = 4; // coverage is counted on a grid finer by this factor
const EDGE = 2; // pixels of free margin around a ball's box
const TRIES = 200; // places for a new thing

function polar(radii) {
  const angle = (2 * Math.PI) / radii.length;
  return radii.map((radius, n) => [radius * Math.cos(n * angle), radius * Math.sin(n * angle)]);
}

function turned(points, cos, sin) {
  return points.map(([x, y]) => [x * cos - y * sin, x * sin + y * cos]);
}

// ------------------------------------------------------------------------------------------------------- drawing

// The image of a scene, as ImageData or, where there is no such class, its { data, width, height }.
export function drawScene({ size, background, things }) {
  const step = background.length / size ** 2;
  const image = new Float32Array(3 * size ** 2);
  for (let n = 0; n < size ** 2; n++) for (let c = 0; c < 3; c++) image[3 * n + c] = background[step * n + c];
  for (const thing of things) {
    const color = painter(thing);
    covered(thing, size, (x, y, cover) => {
      const blend = color(x, y);
      for (let c = 0; c < 3; c++) {
        const at = 3 * (y * size + x) + c;
        image[at] += cover * (thing.colors[1][c] + (thing.colors[0][c] - thing.colors[1][c]) * blend - image[at]);
      }
    });
  }
  const data = new Uint8ClampedArray(4 * size ** 2).fill(255);
  for (let n = 0; n < size ** 2; n++) for (let c = 0; c < 3; c++) data[4 * n + c] = Math.floor(image[3 * n + c]);
  return typeof ImageData === "undefined" ? { data, width: size, height: size } : new ImageData(data, size, size);
}

// The share of a thing's first color at a pixel.
function painter({ shape, texture, x, y, radius, angle, period, phase }) {
  const clipped = (value) => Math.min(Math.max(value, 0), 1);
  if (shape === "ball") { // lit from the upper left
    const away = (column, row) => Math.hypot((column + 0.5 - x) / radius + 0.35, (row + 0.5 - y) / radius + 0.35);
    return (column, row) => clipped(1 - away(column, row) / 1.5);
  }
  const [cos, sin, turn] = [Math.cos(angle), Math.sin(angle), (2 * Math.PI) / period];
  const wave = {
    striped: (u) => Math.sin(u),
    dotted: (u, v) => Math.cos(u) + Math.cos(v) - 0.7,
    checked: (u, v) => 2 * Math.sin(0.75 * u) * Math.sin(0.75 * v),
  }[texture];
  return (column, row) => {
    const [dx, dy] = [column + 0.5 - x, row + 0.5 - y];
    const u = (dx * cos + dy * sin) * turn + 2 * Math.PI * phase[0];
    const v = (dy * cos - dx * sin) * turn + 2 * Math.PI * phase[1];
    return clipped(0.5 + 1.5 * wave(u, v));
  };
}

// Calls visit(x, y, coverage in (0, 1]) for the pixels of the image that a thing covers at least in part.
function covered(thing, size, visit) {
  const reach = Math.ceil(thing.radius) + 1;
  const [left, top] = [Math.floor(thing.x) - reach, Math.floor(thing.y) - reach];
  const side = 2 * reach + 1;
  const fine = new Uint8Array((FINE * side) ** 2);
  const fill = (row, start, end) => fine.fill(1, FINE * side * row + start, FINE * side * row + end + 1);
  const center = [thing.x - left, thing.y - top];
  if (thing.shape === "ball") {
    fillEllipse(center.map((c) => Math.floor(FINE * (c - thing.radius))),
      center.map((c) => Math.floor(FINE * (c + thing.radius))), fill);
  } else {
    const corners = turned(CORNERS[thing.shape], Math.cos(thing.angle), Math.sin(thing.angle));
    fillPolygon(corners.map((corner) => corner.map((c, n) => Math.floor(FINE * (c * thing.radius + center[n])))), fill);
  }
  const width = FINE * side;
  for (let y = Math.max(0, -top); y < side && top + y < size; y++) {
    for (let x = Math.max(0, -left); x < side && left + x < size; x++) {
      let count = 0;
      for (let n = FINE * (y * width + x), row = 0; row < FINE; row++, n += width) {
        for (let column = 0; column < FINE; column++) count += fine[n + column];
      }
      if (count) visit(left + x, top + y, Math.round((255 * count) / FINE ** 2) / 255);
    }
  }
}

// Rows of a polygon with integer corners, as Pillow fills it: pixels whose center lies on an edge belong to it.
function fillPolygon(corners, fill) {
  const rows = corners.map(([, y]) => y);
  const last = Math.max(...rows);
  const sloping = [];
  corners.forEach(([x, y], n) => {
    const [nextX, nextY] = corners[(n + 1) % corners.length];
    const slope = (nextX - x) / (nextY - y);
    if (y === nextY) fill(y, Math.min(x, nextX), Math.max(x, nextX));
    else sloping.push({ top: Math.min(y, nextY), bottom: Math.max(y, nextY), slope, at: (row) => x + (row - y) * slope });
  });
  for (let row = Math.min(...rows); row <= last; row++) {
    const crossings = [];
    sloping.forEach((edge, n) => {
      if (row < edge.top || row > edge.bottom) return;
      if (row === edge.bottom && row < last) crossings.push(edge.at(row), edge.at(row)); // so that their number is even
      else if (row === edge.top || row === last) crossings.push(tip(edge, sloping.slice(0, n), row));
      else crossings.push(edge.at(row));
    });
    crossings.sort((a, b) => a - b);
    for (let n = 1; n < crossings.length; n += 2) {
      fill(row, Math.floor(crossings[n - 1] + 0.5), Math.ceil(crossings[n] - 0.5));
    }
  }
}

// Where an edge begins in its first row (or ends in the polygon's last). At a flat corner the two edges are far from the
// corner already in the next row: the row of the corner then reaches up to them.
function tip(edge, others, row) {
  const x = edge.at(row);
  const next = row === edge.bottom ? row - 1 : row + 1;
  const meets = ({ top, bottom, slope, at }) =>
    (row === top || row === bottom) && slope && Math.round(at(row)) === Math.round(x) && next >= top && next <= bottom;
  const other = edge.slope && others.find(meets);
  if (!other) return x;
  const [near, far] = [edge.at(next), other.at(next)].sort((a, b) => a - b);
  if (x > far + 1) return Math.round(far) + 1;
  return x < near - 1 ? Math.round(near) - 1 : x;
}

// Rows of an ellipse within integer bounds, both included. In each row, the pixel nearest to the curve is the last one.
function fillEllipse([left, top], [right, bottom], fill) {
  const [a, b] = [right - left, bottom - top];
  const off = (x, y) => Math.abs((a * y) ** 2 + (b * x) ** 2 - (a * b) ** 2); // from the curve; in half pixels
  let [x, y] = [a, b % 2];
  for (let row = -1; y <= b; ) {
    if (y !== row) { // the first and widest pixel of the row
      for (const sign of y ? [-1, 1] : [1]) fill(top + (b + sign * y) / 2, left + (a - x) / 2, left + (a + x) / 2);
      row = y;
    }
    const steps = [[x, y + 2], [x - 2, y + 2], [x - 2, y]].filter(([next]) => next >= 0);
    [x, y] = steps.reduce((best, step) => (off(...step) < off(...best) ? step : best));
  }
}

// -------------------------------------------------------------------------------------------------- what a scene says

// Distance between the circumscribed circles of two things.
const gap = (a, b) => Math.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius;

// The things that may decide a ball's class, nearest first, as indices.
function decidersOf({ things }, k) {
  const found = [...things.keys()].filter((n) => DECIDERS.includes(things[n].shape));
  return found.sort((a, b) => gap(things[k], things[a]) - gap(things[k], things[b]));
}

// For a ball the index of the nearest square or star, null if there is none; null for other things.
export function deciderOf(scene, k) {
  return scene.things[k].shape === "ball" ? (decidersOf(scene, k)[0] ?? null) : null;
}

// The class of a thing as an index of CLASSES; null for a ball without a decider.
export function labelOf(scene, k) {
  const { shape, texture } = scene.things[k];
  if (shape !== "ball") return CLASSES.indexOf(`${texture} ${shape}`);
  const decider = deciderOf(scene, k);
  return decider === null ? null : CLASSES.indexOf(`ball of ${scene.things[decider].shape}`);
}

// The box of the visible part of a thing, [left, top, right, bottom] in pixels; null if nothing of it is visible.
export function boxOf({ size, things }, k) {
  const mine = new Uint8Array(size ** 2);
  things.slice(k).forEach((thing, n) => {
    covered(thing, size, (x, y, cover) => {
      if (cover >= 0.5) mine[y * size + x] = n === 0;
    });
  });
  let [left, top, right, bottom] = [size, size, 0, 0];
  mine.forEach((visible, n) => {
    if (!visible) return;
    const [x, y] = [n % size, Math.floor(n / size)];
    [left, top] = [Math.min(left, x), Math.min(top, y)];
    [right, bottom] = [Math.max(right, x + 1), Math.max(bottom, y + 1)];
  });
  return left < right ? [left, top, right, bottom] : null;
}

// ---------------------------------------------------------------------------------------------------- what may change

const placed = (scene, k, x, y) => {
  return { ...scene, things: scene.things.map((thing, n) => (n === k ? { ...thing, x, y } : thing)) };
};

// Whether a scene stays unambiguous if thing k moves to x, y: it lies inside the image; at least 60 % of every thing is
// visible, 80 % of a decider; nothing touches the box of a ball; and of the squares and stars around a ball, the nearest
// is clearly nearer than the others.
export function fits(scene, k, x, y) {
  const { size, things } = placed(scene, k, x, y);
  const room = things[k].radius + 3;
  return Math.min(x, y) >= room && Math.max(x, y) <= size - room && isClear({ size, things });
}

function isClear(scene) {
  const { size, things } = scene;
  const balls = [...things.keys()].filter((k) => things[k].shape === "ball");
  for (const k of balls) {
    const [nearest, next] = decidersOf(scene, k);
    if (next !== undefined && gap(things[k], things[next]) < gap(things[k], things[nearest]) + 0.1 * size) return false;
  }
  const owner = new Int16Array(size ** 2).fill(-1);
  const areas = things.map(() => 0);
  for (const [k, thing] of things.entries()) {
    const kept = balls.filter((ball) => ball !== k).map((ball) => around(things[ball]));
    let touches = false;
    covered(thing, size, (x, y, cover) => {
      if (cover < 0.5) return;
      owner[y * size + x] = k;
      areas[k]++;
      for (const [left, top, right, bottom] of kept) touches ||= x >= left && y >= top && x < right && y < bottom;
    });
    if (touches) return false;
  }
  const seen = areas.map(() => 0);
  for (const k of owner) if (k >= 0) seen[k]++;
  const deciding = new Set(balls.map((k) => deciderOf(scene, k)));
  return seen.every((count, k) => count >= areas[k] * (deciding.has(k) ? 0.8 : 0.6));
}

// A ball's box with a free margin.
function around({ x, y, radius }) {
  const reach = radius + EDGE;
  return [Math.floor(x - reach), Math.floor(y - reach), Math.ceil(x + reach), Math.ceil(y + reach)];
}

// The scene with one more thing in front, of random size, colors and place, drawn as in Python; null if no place was
// found, or for a ball without a square or star. `random` gives numbers in [0, 1).
export function addThing(scene, shape, texture, random = Math.random) {
  const { size, things } = scene;
  const between = (low, high) => low + (high - low) * random();
  const ball = shape === "ball";
  const radius = ball ? size * between(0.06, 0.085) : 0.09 * size * 2.2 ** random();
  const gray = between(-20, 20);
  const colors = ball ? [Array(3).fill(225 + gray), Array(3).fill(70 + gray)] : twoColors(between);
  const [angle, period] = ball ? [0, 8] : [between(0, 2 * Math.PI), size * between(0.05, 0.075)];
  const thing = { shape, texture: ball ? "" : texture, radius, angle, colors, period, phase: [random(), random()] };
  const deciders = things.filter((other) => DECIDERS.includes(other.shape));
  if (ball && !deciders.length) return null;
  for (let n = 0; n < TRIES; n++) {
    let [x, y] = [between(radius + 3, size - radius - 3), between(radius + 3, size - radius - 3)];
    if (ball) { // beside its decider, which stays outside of the ball's box, so that no corner tells its shape
      const decider = deciders[Math.floor(random() * deciders.length)];
      const distance = decider.radius + Math.SQRT2 * (radius + EDGE) + size * between(0, 0.03);
      const direction = between(0, 2 * Math.PI);
      [x, y] = [decider.x + distance * Math.cos(direction), decider.y + distance * Math.sin(direction)];
    }
    const more = { ...scene, things: [...things, { ...thing, x, y }] };
    if (fits(more, things.length, x, y)) return more;
  }
  return null;
}

// A light and a dark color of different hue, in either order.
function twoColors(between) {
  const hue = between(0, 1);
  const light = rgb(hue, between(0.25, 0.85), between(0.85, 1));
  const dark = rgb((hue + between(0.3, 0.7)) % 1, between(0.4, 1), between(0.1, 0.4));
  return between(0, 1) < 0.5 ? [light, dark] : [dark, light];
}

// Hue, saturation and value in [0, 1] as RGB in [0, 255].
function rgb(hue, saturation, value) {
  const channel = (n) => {
    const place = (n + 6 * hue) % 6;
    return 255 * (value - value * saturation * Math.max(0, Math.min(place, 4 - place, 1)));
  };
  return [channel(5), channel(3), channel(1)];
}
