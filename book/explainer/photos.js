// The visitor's own photo: chosen, dropped, pasted, or a frame of the webcam; only the model in this browser gets it.

import { dropped } from "./live.js";

const LONGEST = 1280; // pixels, of what is kept of a photo
const OWN = "your own photo, which stays in this browser";

export function listenForPhotos(page, app) {
  const find = (id) => page.getElementById(id);
  const input = find("file-input");
  const dialog = find("webcam");
  const video = find("video");

  find("file").addEventListener("click", () => (app.live.impossible ? app.say(app.live.impossible) : input.click()));
  input.addEventListener("change", () => {
    take(input.files[0]);
    input.value = ""; // the same file can be chosen again
  });

  // Drop and paste, anywhere on the page.
  let over = 0;
  const files = (event) => [...(event.dataTransfer ?? event.clipboardData).items].filter(({ kind }) => kind === "file");
  page.addEventListener("dragenter", (event) => {
    if (files(event).length) find("drop").hidden = !(over += 1);
  });
  page.addEventListener("dragleave", () => (find("drop").hidden = !(over = Math.max(0, over - 1))));
  page.addEventListener("dragover", (event) => files(event).length && event.preventDefault());
  page.addEventListener("drop", (event) => {
    [over, find("drop").hidden] = [0, true];
    if (!files(event).length) return;
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
  page.addEventListener("paste", (event) => {
    const [file] = files(event);
    if (file) take(file.getAsFile());
  });

  async function take(file) {
    if (!file) return;
    if (app.live.impossible) return app.say(app.live.impossible);
    let bitmap;
    try {
      bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
    } catch {
      return app.say(`The browser cannot read ${file.name || "this file"} as an image. JPEG, PNG and WebP work.`);
    }
    answer(bitmap, file.name || "Your photo");
  }

  async function answer(source, name) {
    const image = kept(source);
    await app.setMode("photos");
    app.wait(image, "The detector is looking at your photo");
    try {
      const about = { name, credit: OWN, book: app.book, threshold: app.threshold };
      const data = await app.live.detect("photos", image, about);
      const own = { ...data, image, id: "own" };
      app.examples.set("own", { mode: "photos", read: async () => own });
      keepThumbnail(image);
      app.showData(own, "photos");
      if (app.mode === "photos") app.say(`Answer in ${data.seconds.toFixed(1)} s, computed in this browser.`);
    } catch (error) {
      if (app.mode === "photos" && !dropped(error)) app.say(error.message);
    } finally {
      app.wait(null);
    }
  }

  // The last own photo stays in the gallery while others are looked at.
  function keepThumbnail(image) {
    const thumbs = page.querySelector("[data-of='photos'] .thumbs");
    let button = thumbs.querySelector("[data-example='own']");
    if (!button) {
      button = page.createElement("button");
      Object.assign(button, { type: "button", className: "thumb" });
      button.dataset.example = "own";
      Object.assign(button, { title: "Your photo", ariaLabel: "Your photo" });
      button.append(page.createElement("canvas"));
      button.addEventListener("click", () => app.open("own"));
      thumbs.append(button);
    }
    const canvas = button.firstChild;
    [canvas.width, canvas.height] = [264, 176];
    const scale = Math.max(264 / image.width, 176 / image.height);
    const [width, height] = [scale * image.width, scale * image.height];
    canvas.getContext("2d").drawImage(image, (264 - width) / 2, (176 - height) / 2, width, height);
    app.mark();
  }

  // The webcam: a preview, and one frame of it.
  find("camera").addEventListener("click", async () => {
    if (app.live.impossible) return app.say(app.live.impossible);
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } } });
    } catch (error) {
      const denied = error.name === "NotAllowedError";
      return app.say(denied ? "The browser was not allowed to use the webcam." : "No webcam was found.");
    }
    dialog.showModal();
  });
  find("webcam-cancel").addEventListener("click", () => dialog.close());
  find("webcam-take").addEventListener("click", () => {
    if (!video.videoWidth) return;
    const frame = kept(video);
    dialog.close();
    answer(frame, "Webcam");
  });
  dialog.addEventListener("close", () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
  });
}

// A canvas with the image, its longer side at most LONGEST.
function kept(source) {
  const [width, height] = [source.videoWidth ?? source.width, source.videoHeight ?? source.height];
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(scale * width));
  canvas.height = Math.max(1, Math.round(scale * height));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas;
}
