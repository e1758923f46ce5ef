// The vote of many samples, as bars.

import { find, make, plural } from "./dom.js";

/** Show a vote of `total` samples, of which `samples` have ended; `votes` maps answers to numbers, the rest had none. */
export function showVotes({ answer, votes, samples }, total) {
  const boxed = Object.values(votes).reduce((sum, count) => sum + count, 0);
  const bars = Object.entries(votes)
    .sort(([one, ones], [other, others]) => others - ones || (other === answer) - (one === answer))
    .map(([text, count]) => bar(text, count, total, text === answer ? "winner" : ""));
  if (boxed < samples) bars.push(bar("no answer", samples - boxed, total, "silent"));
  find("bars").replaceChildren(...bars);
  const ended = samples < total ? `${plural(samples, "vote")} so far; ${total} samples are asked` : plural(total, "vote");
  find("verdict").replaceChildren(
    ...(answer === null ? ["No answer"] : [make("strong", {}, answer), ` has ${votes[answer]}`]),
    ` of ${ended}.`,
  );
}

function bar(text, count, total, kind) {
  const fill = make("span", { className: "fill" });
  fill.style.setProperty("--share", count / total);
  return make(
    "li",
    { className: kind },
    make("span", { className: "said", title: text }, text),
    make("span", { className: "track", ariaHidden: "true" }, fill),
    make("span", { className: "count" }, String(count), make("span", { className: "unseen" }, " votes")),
  );
}
