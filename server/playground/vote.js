// The vote of many samples, as bars.

import { find, make } from "./dom.js";

/** Show the votes of `total` samples: a map from answer to number; the rest had no box. */
export function showVotes({ answer, votes }, total) {
  const boxed = Object.values(votes).reduce((sum, count) => sum + count, 0);
  const bars = Object.entries(votes)
    .sort(([, one], [, other]) => other - one)
    .map(([text, count]) => bar(text, count, total, text === answer ? "winner" : ""));
  if (boxed < total) bars.push(bar("no answer", total - boxed, total, "silent"));
  find("bars").replaceChildren(...bars);
  find("verdict").replaceChildren(
    ...(answer === null
      ? [`None of the ${total} samples gave an answer.`]
      : [make("strong", {}, answer), ` has ${votes[answer]} of ${total} votes.`]),
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
