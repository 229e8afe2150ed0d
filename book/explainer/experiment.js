// The experiment: the visitor says which neighbor decides what a ball is, then each neighbor is taken away in turn. How
// the score of the ball changes stands beside what the relation map says of the same neighbor.

import { element, match, percent } from "./elements.js";
import { dropped } from "./live.js";
import { relationLayers, stageName } from "./look.js";
import { deciderOf } from "./scene.js";
import { balls, boxesOf, namesOf, queryOf, scoresOf, sharesOf } from "./things.js";

const PAUSE = 650; // milliseconds for each removal of a stored study, to see what is gone
const LARGE = 0.1; // a change of the score that is worth mentioning
const HELD = { effect: 92, map: 38, chance: 30, balls: 206 }; // notebooks/results/relations.json, last layer of stage 3

const signed = (change) => `${change < -0.005 ? "−" : change < 0.005 ? "±" : "+"}${Math.abs(change).toFixed(2)}`;

// `hooks`: measure(k, ball, label) gives the ball's scores for a class without thing k, preview(k) shows this scene
// (null: all things), highlight(k) marks a thing, choose(k) selects a ball, settled() waits for the answer to the last edit.
export function createExperiment(page, app, hooks) {
  const find = (id) => page.getElementById(id);
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  let given = null; // { scene, data, studies }
  let ball = null;
  let picked = null;
  let before = null; // scores of the ball by stage
  let after = new Map(); // the same without each neighbor
  let running = 0; // number of the run in progress, 0 for none
  let runs = 0;
  let brief = ""; // the result in a sentence

  find("again").addEventListener("click", () => {
    reset();
    find("choices").querySelector("button")?.focus();
  });
  let map = ""; // that is chosen: stage and layer
  app.store.subscribe(({ stage, relations }) => {
    if (`${stage} ${relations}` === map) return;
    map = `${stage} ${relations}`;
    if (after.size) showResults();
  });

  function reset() {
    const stopped = running > 0;
    [before, after, picked, running] = [null, new Map(), null, 0];
    if (stopped) hooks.preview(null);
    show();
  }

  function show() {
    if (!given) return;
    const { scene } = given;
    const names = namesOf(scene);
    const all = balls(scene);
    if (!all.includes(ball)) ball = all[0] ?? null;
    const decider = ball === null ? null : deciderOf(scene, ball);
    find("ask-text").textContent =
      ball === null
        ? "Add a ball to ask about it: its class depends on the nearest square or star."
        : decider === null
          ? "There is no square and no star in this scene. Add one to ask."
          : "The ball marked “?” is a ball of square or a ball of star, and its pixels do not say which. Pick the " +
            "neighbor on which the answer depends.";
    match(find("balls"), all.length > 1 ? all : [], () => {
      const node = element(find("balls"), "button", "plain-button", { type: "button" });
      node.addEventListener("click", () => hooks.choose(Number(node.dataset.key)));
      return node;
    }).forEach((node, n) => {
      node.textContent = names[all[n]];
      node.setAttribute("aria-pressed", all[n] === ball);
    });
    if (all.length < 2) find("balls").replaceChildren();
    const others = decider === null ? [] : neighbors();
    match(find("choices"), others, () => {
      const node = element(find("choices"), "button", "plain-button choice", { type: "button" });
      for (const name of ["pointerenter", "focus"]) {
        node.addEventListener(name, () => hooks.highlight(Number(node.dataset.key)));
      }
      for (const name of ["pointerleave", "blur"]) node.addEventListener(name, () => hooks.highlight(null));
      node.addEventListener("click", () => run(Number(node.dataset.key)));
      return node;
    }).forEach((node, n) => (node.textContent = names[others[n]]));
    if (!others.length) find("choices").replaceChildren();
    find("choices").hidden = running > 0 || after.size > 0;
    find("results").hidden = !after.size && !running;
    find("experiment-news").textContent = "";
  }

  const neighbors = () => [...given.scene.things.keys()].filter((k) => k !== ball);

  const labelOf = (k) => given.data.classes.indexOf(`ball of ${given.scene.things[deciderOf(given.scene, k)].shape}`);

  async function run(choice) {
    const number = ++runs;
    [picked, running, after] = [choice, number, new Map()];
    try {
      await hooks.settled();
      if (running !== number) return;
      hooks.choose(ball); // its lines are the map that the changes are compared with
      const { scene, studies } = given;
      const label = labelOf(ball);
      before = studies ? studies[ball].before : scoresOf(given.data, queryOf(given.data, boxesOf(scene)[ball]), label);
      show();
      showResults();
      for (const k of neighbors()) {
        hooks.preview(k);
        let scores = studies?.[ball].after[k];
        if (scores) await new Promise((done) => setTimeout(done, still.matches ? 0 : PAUSE));
        else scores = await hooks.measure(k, ball, label);
        if (running !== number) return; // the visitor went on
        after.set(k, scores);
        showResults();
      }
      running = 0;
      hooks.preview(null);
      hooks.highlight(null);
      showResults();
      find("experiment-news").textContent = find("verdict").textContent;
    } catch (error) {
      if (running !== number) return;
      reset();
      if (!dropped(error)) app.say(error.message);
    }
  }

  function showResults() {
    const { scene, data } = given;
    const { stage: at, relations } = app.store.state;
    const layer = relations ?? relationLayers(data, at).at(-1);
    const others = neighbors();
    const names = namesOf(scene);
    const query = queryOf(data, boxesOf(scene)[ball]);
    const shares = query === null ? names.map(() => 0) : sharesOf(data, at, layer, query, boxesOf(scene));
    const change = (k) => after.get(k)[at] - before[at];
    const done = running === 0;
    const effects = [...after.keys()];
    const strongest = effects.reduce((best, k) => (best === null || change(k) < change(best) ? k : best), null);
    const largest = others.reduce((best, k) => (shares[k] > shares[best] ? k : best), others[0]);
    const decides = done && change(strongest) <= -LARGE ? strongest : null;
    const scale = Math.max(0.3, ...effects.map((k) => Math.abs(change(k))));
    find("head-map").textContent = `Attention in ${stageName(at)}`;
    match(find("effects"), others, () => {
      const node = element(find("effects"), "li", "effect");
      for (const name of ["effect-name", "diverging", "number", "bar", "number"]) element(node, "span", name);
      return node;
    }).forEach((node, n) => {
      const k = others[n];
      const [name, bar, number, map, share] = node.children;
      const known = after.has(k);
      const tags = [k === picked && "your pick", k === decides && "decides"].filter(Boolean);
      name.textContent = [names[k], ...tags].join(" · ");
      node.classList.toggle("strongest", k === decides);
      bar.style.setProperty("--from", known ? Math.min(0, change(k)) / scale : 0);
      bar.style.setProperty("--size", known ? Math.abs(change(k)) / scale : 0);
      bar.classList.toggle("rises", known && change(k) > 0);
      number.textContent = known ? signed(change(k)) : "…";
      map.style.setProperty("--share", done ? shares[k] : 0);
      share.textContent = done ? percent(shares[k]) : "…";
    });
    brief = done
      ? `Without the ${names[strongest]} the score changes most, by ${signed(change(strongest))}; the map gives ` +
        `this neighbor ${percent(shares[strongest])} of the attention, and the ${names[largest]} most, ` +
        `${percent(shares[largest])}.`
      : "";
    find("again").hidden = !done;
    find("verdict").textContent = done ? verdict() : `Taking away ${after.size + 1} of ${others.length} …`;
    find("overall").textContent = done
      ? `Over ${HELD.balls} balls of unseen scenes, the largest drop names the deciding neighbor for ` +
        `${HELD.effect} %. The last relation map of stage 3 points at it for ${HELD.map} %; chance: ${HELD.chance} %.`
      : "";

    function verdict() {
      const decider = deciderOf(scene, ball);
      const kind = data.classes[labelOf(ball)];
      const [from, to] = [before[at].toFixed(2), after.get(strongest)[at].toFixed(2)];
      if (decides === null) {
        const small = `No removal lowers the score for “${kind}” (${from}) by ${LARGE} or more`;
        return `${small}: in ${stageName(at)} the answer depends on no single neighbor.`;
      }
      const said = [
        `Without the ${names[strongest]} the score for “${kind}” falls from ${from} to ${to}: the answer depends on this.`,
      ];
      if (strongest !== decider) said.push(`By the rule of these scenes it should depend on the ${names[decider]}.`);
      if (picked === strongest) said.push("You were right.");
      else if (picked !== null) said.push(`Your pick, the ${names[picked]}, changes it by ${signed(change(picked))}.`);
      const most = percent(shares[largest]);
      said.push(
        largest === strongest
          ? `Here the map agrees: it gives this neighbor the most attention, ${most}.`
          : `The map points elsewhere: most attention, ${most}, goes to the ${names[largest]}, whose removal changes ` +
            `the score by ${signed(change(largest))}.`,
      );
      return said.join(" ");
    }
  }

  return {
    // A scene with the answer to it, and the stored study if it is as it was drawn.
    set(next) {
      given = next;
      reset();
    },
    stop() {
      [running, after] = [0, new Map()];
    },
    select(k) {
      if (k === ball || !given) return;
      ball = k;
      reset();
    },
    run,
    brief: () => brief,
    get ball() {
      return ball;
    },
    get finished() {
      return after.size > 0 && running === 0;
    },
  };
}
