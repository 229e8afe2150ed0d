// The guided tour: seven steps of a question, something to look at, and an answer that the visitor reveals. Each step
// sets the page's state and marks the part that it speaks of; the page stays usable meanwhile.

import { element, percent } from "./elements.js";
import { boxOf, className, middle, objects, pointsOf, relatedTo, rowOf, stepBox, steps } from "./look.js";
import { ALL } from "./state.js";

const [CATS, CAR, BEACH, SCENE] = ["photo-555705", "photo-234748", "photo-214753", "scene-42"];
const LARGEST = 10; // weights in the sentence about the points
const CHAPTERS = [
  ["00_start_here", "00 · Start here"],
  ["09_deformable_attention", "09 · Deformable attention"],
  ["10_glimpses", "10 · Glimpses"],
  ["11_recurrent_decoder", "11 · The recurrent decoder"],
  ["13_look_inside", "13 · Look inside"],
];

const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

// Each step: `set` what the page shows, `target` what is marked; `question`, `look` and `answer` are texts, or functions
// that give them from the numbers of the image.
function stepsOf(app) {
  const state = () => app.store.state;
  const set = (stage, show) => {
    for (const [name, value] of Object.entries(show)) app.store.send({ type: "show", name, value });
    for (const name of ["head", "level"]) app.store.send({ type: "set", name, value: ALL });
    app.store.send({ type: "clear" });
    app.store.send({ type: "stage", value: stage });
  };
  const photo = (id, stage, kind, show) => async () => {
    await app.setMode("photos", id);
    const { data, threshold } = state();
    const last = { stage: data.stages, threshold };
    const found = objects(data, last).filter((query) => className(data, rowOf(data, data.stages), query) === kind);
    set(stage, show);
    app.store.send({ type: "focus", query: found[0] ?? null });
  };
  const scene = async (stage, wanted, show) => {
    await app.setMode("scenes", SCENE);
    set(stage, show);
    app.select(state().data.scene.things.findIndex(wanted));
  };
  const all = { reads: true, glimpse: true, relations: true };
  const name = () => className(state().data, rowOf(state().data, state().data.stages), state().object);

  return [
    {
      set: photo(CATS, 3, null, all),
      target: "#view",
      question: "What does a detector say about a photograph?",
      look: "Read the label of a box, then the list of objects.",
      answer: () =>

          "Each box is one answer: the box says where, its class says what, and the score, from 0 to 1, says how " +
          `sure the detector is. Only answers with a score of ${state().threshold.toFixed(2)} or more are shown. ` +
          "Move “Score from” to the left to see the doubtful ones.",
    },
    {
      set: photo(CAR, 0, "person", { reads: true, glimpse: false, relations: false }),
      target: "#view",
      question: () => `Where did it look to find this ${name()}?`,
      look:
        "Each dot is a place where the detector read the image for this one object. The larger the dot, the more it " +
        "counted.",
      answer: () => {
        const { data, object } = state();
        const points = pointsOf(data, state());
        const total = points.reduce((sum, { weight }) => sum + weight, 0);
        const [left, top, right, bottom] = boxOf(data, rowOf(data, 0), object);
        const inside = points.filter(({ x, y }) => left <= x && x <= right && top <= y && y <= bottom);
        const share = inside.reduce((sum, { weight }) => sum + weight, 0) / total;
        const heavy = points.slice(-LARGEST).reduce((sum, { weight }) => sum + weight, 0) / total;
        return (
          `The detector has a list of queries; each looks for one object. This query read ${points.length} points ` +
          `instead of the whole image: ${percent(share)} of their weight lies inside its box, and the ${LARGEST} ` +
          `heaviest points have ${percent(heavy)}.`
        );
      },
    },
    {
      set: photo(CAR, 1, "person", { reads: false, glimpse: true, relations: false }),
      target: "#view",
      question: "What does a second look see?",
      look:
        "The bright part is the glimpse of stage 1. The solid box is what the detector makes of it. Then move the " +
        "slider to stages 2 and 3.",
      answer: () => {
        const { alphas } = state().data;
        return (
          "REGO looks again at each box. It cuts a glimpse out of the image’s feature maps: the previous box, " +
          `enlarged by α. Stage 1 takes α = ${alphas[0]}, so that the surroundings are in it; the last stage takes ` +
          `α = ${alphas.at(-1)}, the object alone. From each glimpse it corrects the box and the class.`
        );
      },
    },
    {
      set: photo(BEACH, 0, null, all),
      target: "#stages",
      question: "What do the three looks change?",
      look: "This is the base detector, after one look. Move the slider to stage 3. Which boxes come, go, or move?",
      answer: () => {
        const { data, threshold } = state();
        const [base, last] = [0, data.stages].map((stage) => objects(data, { stage, threshold }).length);
        return (
          `The base detector shows ${count(base, "object")} here, stage 3 shows ${last}. The looks do not always ` +
          "help: over 158 new photographs, the accuracy of stage 3 and of the base detector differ by less than the " +
          "uncertainty of the measurement. In the drawn scenes every stage adds: average precision rises from 69.9 " +
          "to 76.1."
        );
      },
    },
    {
      set: async () => {
        await scene(3, ({ texture, shape }) => `${texture} ${shape}` === "checked square", all);
        app.store.send({ type: "pin", query: state().object });
      },
      target: "#view",
      question: "How does a box find its place?",
      look:
        "A drawn scene, and a detector that was trained on such scenes. The path starts at the cross, where the " +
        "query begins, and ends at the thick box of stage 3.",
      answer: () => {
        const { data, object } = state();
        const path = steps(data).map((step) => [step.name, middle(stepBox(data, step, object))]);
        const moves = path.slice(1).map(([to, [x, y]], n) => {
          const [from, [left, top]] = path[n];
          return [Math.hypot(x - left, y - top), from, to];
        });
        const [far, from, to] = moves.reduce((best, move) => (move[0] > best[0] ? move : best));
        const [near] = moves.at(-1);
        return (
          "No step searches from the beginning: each adds a correction to the box before it. The longest is from " +
          `${from} to ${to}, by ${far.toFixed(1)} of the image’s ${data.width} pixels; the last moves the center by ` +
          `${near.toFixed(1)}. The list shows how the score changes meanwhile.`
        );
      },
    },
    {
      set: () => scene(3, ({ shape }) => shape === "ball", { reads: false, glimpse: false, relations: true }),
      target: "#view",
      question: "Do objects take notice of each other?",
      look: "Lines lead from the ball to the objects that it attends to. The thicker the line, the larger the weight.",
      answer: () => {
        const { others = [], itself = 0 } = relatedTo(state().data, state()) ?? {};
        const row = rowOf(state().data, state().stage - 1);
        const [first] = others;
        const name = first && className(state().data, row, first.query);
        const most = first
          ? ` The largest share, ${percent(first.weight)}, goes to the ${name}; ${percent(itself)} to the ball itself.`
          : "";
        return (
          `Before a stage answers, it mixes what it knows of all objects, weighted by attention.${most} A weight ` +
          "says what was mixed. It does not say whether that mattered. How could you find out?"
        );
      },
    },
    {
      set: () => scene(3, ({ shape }) => shape === "ball", { reads: false, glimpse: true, relations: true }),
      target: "#experiment",
      question: "Which neighbor decides what the ball is?",
      look:
        "Balls look alike; the nearest square or star gives a ball its name. Pick a neighbor in the list: the page " +
        "takes each one away and asks the detector again.",
      answer: async () => {
        if (!app.experiment.finished) await app.experiment.run(null);
        return `${app.experiment.brief()} A map suggests; an experiment shows what an answer depends on.`;
      },
      links: true,
    },
  ];
}

export function createTour(page, app) {
  const find = (id) => page.getElementById(id);
  const tour = find("tour");
  const list = stepsOf(app);
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const text = (words) => (typeof words === "function" ? words() : words);
  let at = null;

  for (let n = 0; n < list.length; n++) {
    const label = `step ${n + 1}`;
    const dot = element(element(find("tour-dots"), "li"), "button", "dot", { type: "button", "aria-label": label });
    dot.addEventListener("click", () => go(n));
  }
  find("tour-start").addEventListener("click", () => go(0));
  find("tour-back").addEventListener("click", () => go(at - 1));
  find("tour-next").addEventListener("click", () => (at < list.length - 1 ? go(at + 1) : close()));
  find("tour-close").addEventListener("click", close);
  find("tour-reveal").addEventListener("click", reveal);
  tour.addEventListener("keydown", (event) => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (way && list[at + way]) go(at + way);
    else if (event.key === "Escape") close();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  async function go(n) {
    at = n;
    const step = list[n];
    page.documentElement.dataset.tour = n + 1;
    tour.hidden = false;
    await step.set();
    if (at !== n) return; // the visitor is already elsewhere
    find("tour-count").textContent = `Step ${n + 1} of ${list.length}`;
    find("tour-question").textContent = text(step.question);
    find("tour-look").textContent = step.look;
    find("tour-answer").replaceChildren();
    find("tour-reveal").hidden = false;
    find("tour-back").disabled = n === 0;
    find("tour-next").textContent = n === list.length - 1 ? "Finish" : "Next";
    [...find("tour-dots").children].forEach(({ firstChild: dot }, k) => {
      dot.setAttribute("aria-current", k === n ? "step" : false);
    });
    spot(step.target);
    find("tour-question").focus({ preventScroll: true });
  }

  async function reveal() {
    const n = at;
    const { answer, links } = list[n];
    find("tour-next").focus({ preventScroll: true });
    find("tour-reveal").hidden = true;
    const words = await answer();
    if (at !== n) return;
    element(find("tour-answer"), "p").textContent = words;
    if (links) addLinks(element(find("tour-answer"), "p", "note"));
  }

  function addLinks(parent) {
    parent.append("Build all of this yourself: ");
    CHAPTERS.forEach(([file, title], n) => {
      if (n) parent.append(", ");
      if (app.book) element(parent, "a", "", { href: `${app.book}${file}.html` }).textContent = title;
      else parent.append(title);
    });
    parent.append(".");
  }

  function spot(target) {
    for (const node of page.querySelectorAll(".spot")) node.classList.remove("spot");
    const node = target && page.querySelector(target);
    if (!node) return;
    node.classList.add("spot");
    const behavior = still.matches ? "auto" : "smooth";
    (node.id === "experiment" ? node : find("figure")).scrollIntoView({ block: "start", behavior });
  }

  function close() {
    at = null;
    tour.hidden = true;
    delete page.documentElement.dataset.tour;
    spot(null);
    find("tour-start").focus();
  }

  return { go };
}
