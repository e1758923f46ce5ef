// Small helpers around the document.

export const find = (id) => document.getElementById(id);

/** An element with some properties and children; strings become text, never markup. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
