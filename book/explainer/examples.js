// The stored examples: each is an element of the page, which is read when it is chosen.

import { bytesOf, unpack } from "./pack.js";

// Examples by id: { mode, read() }, where `read` gives data as look.js reads them, for scenes with `scene` (as scene.js
// draws it) and `studies` (scores of each ball without each of the others).
export function readExamples(page) {
  const found = new Map();
  for (const node of page.querySelectorAll("script.example")) {
    let data = null;
    const mode = node.id.startsWith("scene") ? "scenes" : "photos";
    found.set(node.id, { mode, read: async () => (data ??= await read(node)) });
  }
  return found;
}

async function read(node) {
  const { id, header, numbers, image, scene, studies } = JSON.parse(node.textContent);
  const data = { ...unpack(header, bytesOf(numbers)), id, studies };
  if (scene) return { ...data, scene: { ...scene, background: new Uint8ClampedArray(bytesOf(scene.background)) } };
  const photo = new Image();
  photo.src = image;
  await photo.decode();
  return { ...data, image: photo };
}
