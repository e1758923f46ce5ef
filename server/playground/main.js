// The page: a question in, its answer out, and what happened in between.

import { apiKey, chat, servedModels, ServerError, solve } from "./api.js";
import { find, make, plural } from "./dom.js";
import { EXAMPLES } from "./examples.js";
import { showSteps } from "./steps.js";
import { Thinking } from "./thinking.js";
import { showVotes } from "./vote.js";

const CANDIDATES = 5; // that the server reports for each step
const STARTING_MS = 500; // between two questions whether it has loaded its model

const question = find("question");
const effort = find("effort");
const thinking = new Thinking();
let models = []; // as the server describes them
let model; // the chosen one
let controller; // of the newest request
let last = Promise.resolve(); // when the one before it has cleaned up

async function loadModels() {
  model = undefined;
  effort.disabled = true;
  try {
    models = await servedModels();
  } catch (error) {
    complain(error);
    if (error.code === "starting") setTimeout(loadModels, STARTING_MS);
    return;
  }
  find("models").replaceChildren(...models.map(({ id }) => make("option", {}, id)));
  find("choice").hidden = models.length === 1;
  find("problem").hidden = true;
  showModel();
}

function showModel() {
  model = models[find("models").selectedIndex];
  const { id, n_supervision: trained, max_supervision: deepest } = model;
  find("model").replaceChildren(
    make("strong", {}, id),
    ` goes over every token ${trained === 1 ? "once more" : `${trained} times`} before it says it. `,
    "Here you can see what it changes.",
  );
  Object.assign(effort, { max: deepest, value: trained, disabled: false });
  find("scale").style.setProperty("--trained", trained / deepest);
  find("trained").textContent = `trained ${trained}`;
  find("deepest").textContent = deepest > trained ? deepest : "";
  if (!model.work.includes(work().value)) work().value = model.work[0];
  showWork();
  showEffort();
}

const work = () => find("form").elements.work; // its radio buttons

function showWork() {
  find("work-words").textContent = !model || model.work.includes(work().value) ? "" : "this model has not learned it";
}

function showEffort() {
  const steps = effort.valueAsNumber;
  const notes = { 0: ", the backbone alone", [model.n_supervision]: ", as trained" };
  const note = notes[steps] ?? (steps > model.n_supervision ? ", beyond training" : "");
  find("effort-words").textContent = `${plural(steps, "step")} a token${note}`;
}

/** Of whom, how much work to show, and how deep to think. */
const chosen = () => ({
  work: work().value,
  ...(model && { model: model.id, supervision_steps: effort.valueAsNumber }),
});

/** One request at a time: a new one stops the one before it, and waits until that has left the page. */
function exclusively(request) {
  controller?.abort();
  const own = (controller = new AbortController());
  last = last.then(async () => {
    if (own.signal.aborted) return;
    find("problem").hidden = true;
    find("stop").hidden = false;
    try {
      await request(own.signal);
    } catch (error) {
      if (error.name !== "AbortError") complain(error);
    } finally {
      find("stop").hidden = true;
    }
  });
}

function complain(error) {
  const known = error instanceof ServerError;
  if (!known) console.error(error);
  find("problem").textContent = known ? error.message : "Something in this page is broken; the console says what.";
  find("problem").hidden = false;
  if (error.status === 401) {
    find("access").open = true;
    find("key").focus();
  }
}

async function ask(signal) {
  const started = performance.now();
  const messages = [{ role: "user", content: question.value }];
  const { equations } = EXAMPLES.find((example) => example.question === question.value.trim()) ?? { equations: [] };
  find("reply").hidden = false;
  find("poll").hidden = true;
  showAnswer("", "waiting");
  find("summary").textContent = "thinking";
  find("says").hidden = true;
  thinking.begin(model?.n_supervision ?? Infinity);
  let end;
  try {
    for await (const chunk of chat({ messages, trace: CANDIDATES, ...chosen() }, signal)) {
      const [choice] = chunk.choices;
      if (choice.trace) thinking.add(choice.trace);
      if (choice.finish_reason) end = choice;
    }
  } finally {
    thinking.end();
    showSteps(end?.boxed_answer ? thinking.tokens : [], equations); // of half an answer there is nothing to tell
    find("reply").hidden = !end && !thinking.tokens.length;
    if (end?.boxed_answer) showAnswer(end.boxed_answer);
    else showAnswer(end ? "none" : "?", "missing");
    const how = { stop: "", length: "cut off after " }[end?.finish_reason] ?? "stopped after ";
    const seconds = (performance.now() - started) / 1000;
    find("summary").textContent =
      `${how}${plural(thinking.tokens.length, "token")}, ${thinking.meanSteps.toFixed(1)} steps each, ${seconds.toFixed(1)}\u00a0s`;
  }
}

function showAnswer(text, kind = "") {
  Object.assign(find("answer"), { textContent: text, className: kind });
}

async function vote(signal) {
  const n = find("samples").valueAsNumber;
  find("poll").hidden = false;
  find("reply").hidden = true;
  find("verdict").ariaBusy = "true"; // to be read aloud when it stands
  showVotes({ answer: null, votes: {}, samples: 0 }, n);
  try {
    for await (const event of solve({ question: question.value, n, ...chosen() }, signal)) {
      showVotes(event.result ?? event, n);
    }
  } finally {
    find("poll").hidden = !find("bars").children.length;
    find("verdict").ariaBusy = "false";
  }
}

for (const example of EXAMPLES) {
  const button = make("button", { type: "button", title: example.question }, example.name);
  button.addEventListener("click", () => {
    question.value = example.question;
    exclusively(ask);
  });
  find("examples").append(make("li", {}, button));
}
question.value ||= EXAMPLES[0].question; // a browser may have kept another one
find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  exclusively(ask);
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("form").requestSubmit(find("ask"));
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") controller?.abort();
});
find("vote").addEventListener("click", () => {
  if (question.reportValidity() && find("samples").reportValidity()) exclusively(vote);
});
find("stop").addEventListener("click", () => controller?.abort());
effort.addEventListener("input", showEffort);
find("work").addEventListener("change", showWork);
find("key").value = apiKey.get();
find("key").addEventListener("change", () => {
  apiKey.set(find("key").value.trim());
  loadModels();
});
find("models").addEventListener("change", showModel);
loadModels();
