// Data of a page: a header (JSON) and arrays of quantized numbers, as regolite/explaining/packing.py writes them.
// A model that runs in the browser can fill the same structure: sizes, names, and `arrays` of { shape, values }.

const KINDS = { uint8: Uint8Array, uint16: Uint16Array }; // little-endian, as all machines that browsers run on

// The header with its arrays as numbers: value = low + step * code.
export function unpack(header, bytes) {
  const arrays = {};
  for (const [name, { kind, shape, low, step, at }] of Object.entries(header.arrays)) {
    const length = shape.reduce((product, side) => product * side, 1);
    const codes = new KINDS[kind](bytes.buffer, bytes.byteOffset + at, length);
    arrays[name] = { shape, values: Float32Array.from(codes, (code) => low + step * code) };
  }
  return { ...header, arrays };
}

// The values of an array at the first indices, flat: part(boxes, stage, query) are four numbers.
export function part({ shape, values }, ...indices) {
  let [start, length] = [0, values.length];
  indices.forEach((index, axis) => {
    length /= shape[axis];
    start += index * length;
  });
  return values.subarray(start, start + length);
}

// Bytes of a text in Base64.
export const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

// What regolite.explain has put into the page.
export function readPage(page) {
  const numbers = bytesOf(page.getElementById("numbers").textContent);
  const data = unpack(JSON.parse(page.getElementById("header").textContent), numbers);
  return { ...data, image: page.getElementById("photo") };
}
