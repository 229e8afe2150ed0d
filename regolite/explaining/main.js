// The page: the data that are stored in it, a store, and the drawing.

import { animate } from "./motion.js";
import { readPage } from "./pack.js";
import { createStore, initialState } from "./state.js";
import { show } from "./view.js";

const store = createStore(initialState(readPage(document)));
await store.state.data.image.decode();
show(document, store);
animate(store);
document.documentElement.dataset.ready = "true";
