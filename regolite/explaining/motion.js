// Boxes move from stage to stage and along their path, at once if the visitor prefers reduced motion.

import { steps } from "./look.js";

const SPEED = { phase: 4, trail: 1.6 }; // stages, and steps of the path, in a second

export function animate(store) {
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  let [moving, before] = [false, 0];
  store.subscribe(() => {
    if (moving || !goals(store.state).length) return;
    [moving, before] = [true, performance.now()];
    requestAnimationFrame(step);
  });

  function step(now) {
    const seconds = still.matches ? Infinity : Math.max(0.001, (now - before) / 1000);
    for (const [name, at, goal] of goals(store.state)) {
      const most = SPEED[name] * seconds;
      const value = Math.abs(goal - at) <= most ? goal : at + Math.sign(goal - at) * most;
      store.send({ type: "set", name, value });
    }
    before = now;
    moving = goals(store.state).length > 0;
    if (moving) requestAnimationFrame(step);
  }
}

// What is still on its way: its name, where it is, and where it goes.
function goals({ data, stage, pinned, phase, trail }) {
  const end = pinned ? steps(data).length - 1 : 0;
  return [["phase", phase, stage], ["trail", trail, end]].filter(([, at, goal]) => at !== goal);
}
