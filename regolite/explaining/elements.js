// Elements of a page, made and kept by what they stand for.

export const percent = (share) => `${Math.round(100 * share)}\u00a0%`;

export function element(parent, tag, className = "", attributes = {}) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
}

// Children of a parent by key: kept where they are, since one may have the focus; made and removed where needed.
export function match(parent, keys, make) {
  const known = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  return keys.map((key, n) => {
    const node = known.get(String(key)) ?? make(key);
    known.delete(String(key));
    node.dataset.key = key;
    if (parent.children[n] !== node) parent.insertBefore(node, parent.children[n] ?? null);
    if (n === keys.length - 1) for (const old of known.values()) old.remove();
    return node;
  });
}

// The options of a select element, as pairs of value and text.
export function options(select, pairs) {
  match(select, pairs.map(([value]) => value), () => element(select, "option")).forEach((node, n) => {
    [node.value, node.textContent] = pairs[n];
  });
  if (!pairs.length) select.replaceChildren();
}
