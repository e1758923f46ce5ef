// What each step says: the answer that it alone would have given, the likeliest token of every place joined.

import { find, make, plural } from "./dom.js";

const OPENING = "\\boxed{";
const MARKS = /\\.|[{}]|<\|/gs; // braces, but no escaped ones, and where a reply ends, whose end token is spelt <|…|>

/**
 * Show it of a reply that is nothing but its box: any other writes its steps down, and one place of it is no answer.
 * `tokens` as the server traced them; `equations` lead to the right answer, step by step, where they are known.
 */
export function showSteps(tokens, equations) {
  const texts = joined(tokens);
  const atOnce = texts.length > 0 && texts.at(-1).startsWith(OPENING);
  find("says").hidden = !atOnce;
  if (!atOnce) return;
  const said = texts.map(answer);
  const last = said.length - 1;
  const settled = said.findLastIndex(({ text }) => text !== said[last].text) + 1;
  const told = Math.min(last, Math.max(settled, equations.length)); // the steps behind it say the same again
  const cards = said.slice(0, told + 1).map((one, step) => card(one, step, step, equations, step === settled));
  if (told < last) cards.push(card(said[last], told + 1, last, equations));
  find("says-steps").replaceChildren(...cards);
  find("says-story").textContent = story(said, settled, equations.length);
  find("says-right").hidden = !equations.length;
  find("says-cut").hidden = !said.some(({ cut }) => cut);
}

/** What each step says in all places together. */
function joined(tokens) {
  const decoder = new TextDecoder();
  const steps = Math.max(0, ...tokens.map(({ steps }) => steps.length));
  return Array.from({ length: steps }, (_, step) => {
    const leaders = tokens.map(({ steps }) => (steps[step] ?? steps.at(-1))[0]);
    return decoder.decode(Uint8Array.from(leaders.flatMap(({ bytes }) => bytes ?? [])));
  });
}

/** The inside of a step's box, up to the brace that closes it. It is cut where the answer has no more places. */
function answer(said) {
  const inside = said.startsWith(OPENING) ? said.slice(OPENING.length) : said;
  let open = 1;
  for (const { 0: mark, index } of inside.matchAll(MARKS)) {
    open += { "{": 1, "}": -1 }[mark] ?? 0;
    if (!open || mark === "<|") return { text: inside.slice(0, index), cut: false };
  }
  return { text: inside, cut: true };
}

/** What the steps from `first` to `last` say, and where that is known, whether it is right, and what would be. */
function card({ text, cut }, first, last, equations, isAnswer) {
  const step = first === last ? `step ${first}` : `steps ${first} to ${last}`;
  const item = make(
    "li",
    { className: isAnswer ? "answer-step" : "" },
    make("span", { className: "step" }, first ? step : "backbone"),
    make("span", { className: "unseen" }, isAnswer ? ", the answer: " : ": "),
    make("strong", { title: text }, text + (cut ? "…" : "") || "–"),
  );
  if (first && equations.length) {
    const equation = equations[first - 1];
    const result = (equation ?? equations.at(-1)).split("=")[1];
    const right = cut ? text && result.startsWith(text) : text === result;
    const verdict = right ? "right" : "wrong";
    item.append(
      make("span", { className: verdict, title: verdict, ariaHidden: "true" }, right ? " ✓" : " ✗"),
      make("span", { className: "unseen" }, `, ${verdict}: `),
      make("span", { className: "result" }, equation ?? `still ${result}`),
    );
  }
  return item;
}

function story(said, settled, needed) {
  const steps = said.length - 1;
  const before = said.slice(0, settled).some(({ text }) => text === said[settled].text);
  const how = before ? "is back at the answer" : "is the first to say the answer";
  const first = settled ? `Step ${settled} ${how}` : "The backbone alone says the answer";
  const later = settled < steps ? ", and it stays." : ".";
  const missing = steps < needed ? ` The problem takes ${plural(needed, "step")}; it got ${steps}.` : "";
  return first + later + missing;
}
