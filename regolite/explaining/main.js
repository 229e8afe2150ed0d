// The page: the data that are stored in it, a store, and the drawing. Boxes move from stage to stage and along their
// path, at once if the visitor prefers reduced motion.

import { steps } from "./look.js";
import { readPage } from "./pack.js";
import { createStore, initialState } from "./state.js";
import { show } from "./view.js";

const SPEED = { phase: 4, trail: 1.6 }; // stages, and steps of the path, in a second

const store = createStore(initialState(readPage(document)));
const still = matchMedia("(prefers-reduced-motion: reduce)");
await store.state.data.image.decode();
show(document, store);

let [moving, before] = [false, 0];
store.subscribe(() => {
  if (moving || !goals().length) return;
  [moving, before] = [true, performance.now()];
  requestAnimationFrame(step);
});
document.documentElement.dataset.ready = "true";

// What is still on its way: its name, and where it goes.
function goals() {
  const { data, stage, pinned, phase, trail } = store.state;
  const end = pinned ? steps(data).length - 1 : 0;
  return [["phase", phase, stage], ["trail", trail, end]].filter(([, at, goal]) => at !== goal);
}

function step(now) {
  const seconds = still.matches ? Infinity : Math.max(0.001, (now - before) / 1000);
  for (const [name, at, goal] of goals()) {
    const most = SPEED[name] * seconds;
    const value = Math.abs(goal - at) <= most ? goal : at + Math.sign(goal - at) * most;
    store.send({ type: "set", name, value });
  }
  before = now;
  moving = goals().length > 0;
  if (moving) requestAnimationFrame(step);
}
