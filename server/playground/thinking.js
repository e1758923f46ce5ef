// The reply, token by token, and the steps behind the chosen token.

import { find, make, plural } from "./dom.js";

const ROWS = 5; // candidates in the table

export class Thinking {
  #list = find("tokens");
  #tokens = [];
  #decoder;
  #trained;
  #selected;
  #following; // the table shows the newest token, until somebody chooses another

  constructor() {
    this.#list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.#choose([...this.#list.children].indexOf(option));
    });
    this.#list.addEventListener("keydown", (event) => this.#move(event));
  }

  /** Begin a reply by a model that was trained with `trained` steps. */
  begin(trained) {
    this.#tokens = [];
    this.#decoder = new TextDecoder();
    this.#trained = trained;
    this.#selected = undefined;
    this.#following = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.#list.replaceChildren();
    find("changes").textContent = "";
    find("steps").hidden = true;
  }

  /** The reply's tokens so far, as the server traced them. */
  get tokens() {
    return this.#tokens;
  }

  get meanSteps() {
    return this.#tokens.reduce((sum, { steps }) => sum + steps.length - 1, 0) / Math.max(this.#tokens.length, 1);
  }

  add(tokens) {
    for (const token of tokens) {
      const text = this.#decoder.decode(Uint8Array.from(token.bytes ?? []), { stream: true });
      const shown = text.replaceAll("\n", "⏎\n") || "◌"; // so that line ends, and halves of characters, can be chosen
      const option = make("span", { role: "option", tabIndex: -1, ariaSelected: "false" }, shown.replace(/\n$/, ""));
      if (changed(token)) {
        option.classList.add("changed");
        option.title = `the backbone said ${quoted(best(token.steps[0]))}`;
      }
      this.#tokens.push(token);
      this.#list.append(option, shown.endsWith("\n") ? "\n" : ""); // outside, or else its frame would cross the line
    }
    if (this.#following) this.#select(this.#tokens.length - 1);
  }

  /** The reply is over: count what changed, and show the first of it unless somebody is looking at something else. */
  end() {
    const total = this.#tokens.length;
    if (!total) return;
    const changes = this.#changes();
    find("changes").textContent = changes.length
      ? `The recursion changed its mind about ${changes.length} of ${plural(total, "token")}, marked above.`
      : `The recursion changed its mind about none of ${plural(total, "token")}; choose one to see how sure it was.`;
    if (this.#following || this.#selected === undefined) this.#select(changes[0] ?? total - 1);
    this.#following = false;
  }

  #changes() {
    return [...this.#tokens.keys()].filter((index) => changed(this.#tokens[index]));
  }

  #move(event) {
    const here = this.#selected;
    const there = {
      ArrowLeft: () => here - 1,
      ArrowRight: () => here + 1,
      ArrowUp: () => this.#changes().findLast((index) => index < here),
      ArrowDown: () => this.#changes().find((index) => index > here),
      Home: () => 0,
      End: () => this.#tokens.length - 1,
    }[event.key]?.();
    if (event.key.startsWith("Arrow") || there !== undefined) event.preventDefault(); // the page stays where it is
    if (this.#tokens[there]) this.#choose(there);
  }

  #choose(index) {
    this.#following = false;
    this.#select(index);
    this.#list.children[index].focus();
  }

  #select(index) {
    const before = this.#list.children[this.#selected];
    if (before) Object.assign(before, { ariaSelected: "false", tabIndex: -1 });
    Object.assign(this.#list.children[index], { ariaSelected: "true", tabIndex: 0 });
    this.#selected = index;
    const token = this.#tokens[index];
    find("steps").hidden = false;
    find("steps-title").replaceChildren(`Token ${index + 1}: `, make("code", {}, visible(token)));
    find("story").textContent = story(token.steps);
    find("heat").replaceChildren(...heat(token.steps, this.#trained));
  }
}

const best = (step) => step[0];
const same = (one, other) => visible(one) === visible(other);
const changed = ({ steps }) => !same(best(steps[0]), best(steps.at(-1)));
const quoted = (token) => `“${visible(token)}”`;

/** A token by itself: its white space can be seen, and its bytes where they are no whole characters. */
function visible({ token, bytes }) {
  if (!bytes) return "no token";
  if (token.includes("\uFFFD")) return bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
  return token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍");
}

/** What happened, in a sentence. */
function story(steps) {
  const leaders = steps.map(best);
  const first = `The backbone said ${quoted(leaders[0])}`;
  if (steps.length === 1) return `${first}; the recursion was not asked.`;
  const turns = [];
  for (let step = 1; step < leaders.length; step++) {
    if (!same(leaders[step - 1], leaders[step])) {
      const back = leaders.slice(0, step).some((leader) => same(leader, leaders[step]));
      turns.push(`step ${step} changed it ${back ? "back " : ""}to ${quoted(leaders[step])}`);
    }
  }
  if (turns.length) return `${first}; ${turns.join(", ")}.`;
  return `${first}, and ${steps.length === 2 ? "the one step" : `all ${steps.length - 1} steps`} agreed.`;
}

/** The table's parts: one row for each of the likeliest candidates, one column for each step. */
function heat(steps, trained) {
  const candidates = new Map(); // by what they look like: the token, and its probability after each step
  steps.forEach((step, column) => {
    for (const candidate of step) {
      const name = visible(candidate);
      if (!candidates.has(name)) candidates.set(name, Array(steps.length).fill(null));
      candidates.get(name)[column] = Math.exp(candidate.logprob);
    }
  });
  const rows = [...candidates]
    .sort(([, one], [, other]) => Math.max(...other) - Math.max(...one))
    .slice(0, ROWS)
    .sort(([, one], [, other]) => other.at(-1) - one.at(-1));

  const columns = steps.map((_, column) => {
    const header = make("th", { scope: "col" }, String(column));
    if (column > trained) header.classList.add("beyond");
    return header;
  });
  const body = rows.map(([name, probabilities]) => {
    const cells = probabilities.map((probability, column) => cell(probability, visible(best(steps[column])) === name));
    return make("tr", {}, make("th", { scope: "row" }, make("code", {}, name)), ...cells);
  });
  const corner = make("th", { scope: "col", className: "corner" }, "step");
  return [make("thead", {}, make("tr", {}, corner, ...columns)), make("tbody", {}, ...body)];
}

function cell(probability, leads) {
  if (probability === null) return make("td", { title: "not among the likeliest" }, "·");
  const percent = probability * 100;
  const shown = percent < 0.5 ? "0" : percent.toFixed(0);
  const data = make("td", { title: `${percent.toPrecision(3)} %` }, shown);
  data.style.setProperty("--heat", Math.sqrt(probability).toFixed(3)); // so that a few percent can be seen
  data.classList.toggle("hot", probability > 0.45);
  if (leads) {
    data.classList.add("leads");
    data.append(make("span", { className: "unseen" }, ", leads"));
  }
  return data;
}
