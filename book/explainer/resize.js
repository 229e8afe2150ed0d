// Resizing as the package does it (make_transform): bilinear with antialiasing, in Pillow's fixed-point arithmetic, so
// that the model gets the same numbers as in Python. Some versions of Pillow resize the columns of an image that is more
// than twice as high as wide before its rows; there, numbers differ by up to 1/255.

const BITS = 22; // of a coefficient's fraction

// The longer side of an image becomes `size`; { planes, rows, columns }: RGB in [0, 1], [3, size, size], the image in
// the upper left corner. `pixels` are RGBA.
export function resized(pixels, width, height, size) {
  const [columns, rows] = sidesOf(width, height, size);
  const narrow = pass(pixels, width, height, columns, [4, 4 * width], [4, 4 * columns]);
  const small = pass(narrow, height, columns, rows, [4 * columns, 4], [4 * columns, 4]);
  const planes = new Float32Array(3 * size * size);
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++) {
      for (let c = 0; c < 3; c++) planes[(c * size + y) * size + x] = small[4 * (y * columns + x) + c] / 255;
    }
  }
  return { planes, rows, columns };
}

// Width and height after resizing, rounded down, but at least 1.
export function sidesOf(width, height, size) {
  const long = Math.max(width, height);
  return [width, height].map((side) => (side === long ? size : Math.max(1, Math.floor((size * side) / long))));
}

// Resizes one axis: `lines` lines of `from` pixels get `to` pixels; strides of a pixel and of a line in numbers.
function pass(source, from, lines, to, [pixel, line], [newPixel, newLine]) {
  if (from === to) return source;
  const target = new Uint8ClampedArray(4 * lines * to);
  for (let n = 0; n < to; n++) {
    const { start, shares } = window(n, from, to);
    for (let row = 0; row < lines; row++) {
      for (let c = 0; c < 3; c++) {
        let sum = 2 ** (BITS - 1); // half, to round
        for (let k = 0; k < shares.length; k++) sum += source[row * line + (start + k) * pixel + c] * shares[k];
        target[row * newLine + n * newPixel + c] = Math.floor(sum / 2 ** BITS);
      }
    }
  }
  return target;
}

// The pixels of the source that a pixel of the target is the weighted mean of: a triangle as wide as two target pixels.
function window(n, from, to) {
  const scale = from / to;
  const reach = Math.max(scale, 1);
  const center = (n + 0.5) * scale;
  const start = Math.max(0, Math.floor(center - reach + 0.5));
  const end = Math.min(from, Math.floor(center + reach + 0.5));
  const weights = [];
  for (let k = start; k < end; k++) weights.push(Math.max(0, 1 - Math.abs((k - center + 0.5) / reach)));
  const sum = weights.reduce((total, weight) => total + weight, 0);
  return { start, shares: weights.map((weight) => Math.floor((weight / sum) * 2 ** BITS + 0.5)) };
}
