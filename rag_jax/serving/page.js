"use strict";
const by = (id) => document.getElementById(id);
let names = [];  // of the pairs, where there are two

// Every text goes in as text: nothing that is answered or retrieved is ever read as HTML.
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const percent = (x) => `${(100 * x).toFixed(1)} %`;
const bar = (label, value, kind) => [el("span", {}, label),
  value === undefined ? el("span", {}) : el("meter", { class: kind, min: 0, max: 1, value, "aria-label": label }),
  el("span", {}, value === undefined ? "…" : percent(value))];

function passage(one) {
  const text = el("p", { class: "passage short", title: "show all of it", onclick: () => text.classList.toggle("short") }, one.passage);
  return el("li", {}, el("div", { class: "bars" }, bar("probability", one.probability, "before"), bar("evidence", one.evidence, "after")),
    text, one.source === undefined ? null : el("div", { class: "source" }, one.source));
}

function draw(article, record, open) {
  const shown = "answer" in record ? [["", record]] : names.map((name) => [name, record[name]]);
  article.querySelector(".pairs").replaceChildren(...shown.map(([name, found]) => {
    const head = name ? el("h3", {}, name) : null;
    if (!found) return el("section", {}, head, el("p", { class: "faint" }, "…"));
    const done = found.log_prob !== undefined;
    return el("section", { class: done || !open ? "" : "open" }, head,
      el("p", { class: "answer", "aria-live": "polite" }, found.answer || (done ? "(an empty answer)" : "")),
      done ? el("p", { class: "faint" }, `log p(answer | question) ${found.log_prob.toFixed(2)}, ${found.tokens} tokens`) : null,
      el("ol", {}, found.passages.map(passage)));
  }));
}

function failed(article, reason) {
  article.querySelector(".pairs").replaceChildren(el("p", { class: "error", role: "alert" }, reason));
}

// Server-sent events out of the body of an answer to POST.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const [, kind, data] = block.match(/^event: (.*)\ndata: (.*)$/s);
      yield [kind, JSON.parse(data)];
    }
  }
}

async function ask(question) {
  const article = el("article", {}, el("h2", {}, question), el("div", { class: "pairs" }, el("p", { class: "faint" }, "looking for passages …")));
  by("asked").prepend(article);
  let ended = false;
  try {
    const response = await fetch("/ask", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ question, stream: true }) });
    if (!response.ok) return failed(article, (await response.json()).error);
    for await (const [kind, record] of events(response.body)) {
      if (kind === "error") return failed(article, record.error);
      ended = kind === "answer";
      draw(article, record, !ended);
    }
    if (!ended) failed(article, "The server ended before the answer was complete.");
  } catch (error) {
    failed(article, "The server cannot be reached; is it still running?");
  }
}

by("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = by("question").value.trim();
  if (!question) return;
  by("question").value = "";
  by("question").focus();
  await ask(question);
});
by("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); by("form").requestSubmit(); }
});
fetch("/about").then((response) => response.json()).then((about) => {
  by("about").textContent = `${about.models.join(" and ")}, ${about.step ? `trained for ${about.step.toLocaleString("en")} steps` : "untrained"}; ` +
    `${about.passages.toLocaleString("en")} passages, ${about.candidates} read for an answer`;
  names = about.pairs;
  by("definitions").append(...Object.entries(about.definitions).flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]));
});
by("question").focus();
