// What the visitor has chosen, and how each action changes it. Input -> data -> state -> drawing: nothing flows back.

export const ALL = -1; // all heads, all levels

export function createStore(state) {
  const listeners = [];
  return {
    get state() {
      return state;
    },
    send(action) {
      const next = reduce(state, action);
      if (next === state) return;
      state = next;
      for (const listener of listeners) listener(state);
    },
    subscribe(listener) {
      listeners.push(listener);
      listener(state);
    },
  };
}

// At first the last stage with all its objects.
export function initialState(data) {
  return {
    data, // what is shown: the page's own numbers, or those of a model that runs in the browser
    stage: data.stages, // 0 is the base detector
    phase: data.stages, // the stage that is drawn; between two while boxes move
    threshold: data.threshold,
    object: null, // a query, or none: all objects
    stale: false, // the boxes are of an image before the present one
    pinned: false, // the object stays while the mouse moves on, and its path is drawn
    trail: 0, // how far the path is drawn, in steps
    layer: data.layers - 1, // of the decoder
    head: ALL,
    level: ALL,
    relations: null, // layer of the relations; null is the last
    show: { reads: true, glimpse: true, relations: true },
  };
}

export function reduce(state, action) {
  switch (action.type) {
    case "data": // of another image
      return { ...initialState(action.data), show: state.show };
    case "answer": // of the same image after a change: the choices stay
      return { ...state, data: action.data, object: action.query, pinned: false, stale: false };
    case "stage":
      return { ...state, stage: action.value, relations: null };
    case "show":
      return { ...state, show: { ...state.show, [action.name]: action.value } };
    case "set": // threshold, layer, head, level, relations, phase, trail, stale
      return { ...state, [action.name]: action.value };
    case "point": // the mouse is over a box
      return state.pinned || [null, state.object].includes(action.query) ? state : { ...state, object: action.query };
    case "focus": // the keyboard or a button chooses
      return action.query === state.object ? state : { ...state, object: action.query, pinned: false };
    case "pin": // again on the same object: release
      return { ...state, object: action.query, pinned: !(state.pinned && state.object === action.query), trail: 0 };
    case "clear": // first the path, then the object
      return { ...state, object: state.pinned ? state.object : null, pinned: false };
    default:
      throw new Error(`unknown action ${action.type}`);
  }
}
