"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const FALLING = new Set(data.falling);
const NAMES = {
  "recall@1": "Recall@1", "recall@5": "Recall@5", "recall@10": "Recall@10", "mrr@10": "MRR@10", "ndcg@10": "nDCG@10",
  "answer_hit@1": "Answer in the first passage", "answer_hit@10": "Answer in the first ten passages",
  "document_hit@1": "Right document first", "answer_nll": "NLL of answers (nats a token)",
  "answer_nll_gold": "NLL with the right passage", "answer_nll_none": "NLL without a passage",
  "em": "Exact match", "f1": "F1",
};

// Every text goes in as text: nothing of the data is ever read as HTML.
function el(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "rect", "g"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const section = (title, ...children) => page.append(el("h2", {}, title), ...children.filter((child) => child !== null));
const short = (x) => x === null || x === undefined ? "–" : Math.abs(x) >= 1000 || (x !== 0 && Math.abs(x) < 0.001)
  ? x.toExponential(2) : String(Number(x.toPrecision(4)));
const metric = (x) => x === null || x === undefined || Math.abs(x) >= 1000 ? short(x) : x.toFixed(3);
const percent = (x) => `${(100 * x).toFixed(0)} %`;
const seconds = (s) => s < 60 ? `${s.toFixed(1)} s` : s < 3600 ? `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`
  : `${Math.floor(s / 3600)} h ${Math.round(s % 3600 / 60)} min`;
const color = (i) => `var(--s${i % 6})`;

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= raw);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9 * step; v += step) found.push(Math.abs(v) < 1e-12 ? 0 : v);
  return found;
}

// series: [{name, points: [[x, y, low?, high?]], dots?}]
function plot(title, series, options = {}) {
  series = series.filter((s) => s.points.length);
  const figure = el("figure", {}, el("h3", {}, title)), tip = el("div", { class: "tip", role: "status" });
  const W = 420, H = options.height || 200, L = 46, R = 8, T = 8, B = 24;
  const xs = series.flatMap((s) => s.points.map((p) => p[0]));
  const ys = series.flatMap((s) => s.points.flatMap((p) => p.slice(1)));
  let [x0, x1] = options.x || [Math.min(...xs), Math.max(...xs)], [y0, y1] = options.y || [Math.min(...ys), Math.max(...ys)];
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  if (y0 === y1) { y0 -= Math.abs(y0) * 0.1 || 1; y1 += Math.abs(y1) * 0.1 || 1; }
  const X = (x) => L + (x - x0) / (x1 - x0) * (W - L - R), Y = (y) => H - B - (y - y0) / (y1 - y0) * (H - T - B);
  const svg = el("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
  for (const y of ticks(y0, y1, 4)) svg.append(el("line", { class: "axis", x1: L, x2: W - R, y1: Y(y), y2: Y(y) }),
    el("text", { x: L - 6, y: Y(y) + 4, "text-anchor": "end" }, short(y)));
  for (const x of ticks(x0, x1, 5)) svg.append(el("text", { x: X(x), y: H - 6, "text-anchor": "middle" }, short(x)));
  if (options.diagonal) svg.append(el("line", { class: "axis", x1: X(x0), y1: Y(y0), x2: X(x1), y2: Y(y1) }));
  series.forEach((s, i) => {
    const banded = s.points.filter((p) => p.length > 3);
    if (banded.length > 1) svg.append(el("path", { fill: color(i), opacity: 0.15, d:
      "M" + banded.map((p) => `${X(p[0])} ${Y(p[3])}`).join("L") + "L" + banded.reverse().map((p) => `${X(p[0])} ${Y(p[2])}`).join("L") + "Z" }));
    if (s.points.length > 1) svg.append(el("path", { fill: "none", stroke: color(i), "stroke-width": 1.6,
      d: "M" + s.points.map((p) => `${X(p[0])} ${Y(p[1])}`).join("L") }));
    if (s.dots || s.points.length === 1) for (const p of s.points) svg.append(el("circle", { cx: X(p[0]), cy: Y(p[1]), r: 3, fill: color(i) }));
  });
  const cursor = el("line", { class: "axis", y1: T, y2: H - B, visibility: "hidden" });
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), at = x0 + ((event.clientX - box.left) / box.width * W - L) / (W - L - R) * (x1 - x0);
    const near = series.map((s) => s.points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    const x = near.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)[0];
    cursor.setAttribute("x1", X(x)); cursor.setAttribute("x2", X(x)); cursor.setAttribute("visibility", "visible");
    tip.textContent = [`${options.xName || "step"} ${short(x)}`, ...series.map((s, i) =>
      `${s.name}: ${short(near[i][1])}${near[i].length > 3 ? ` (${short(near[i][2])} to ${short(near[i][3])})` : ""}`)].join("\n");
    tip.style.display = "block";
    tip.style.left = `${Math.min(X(x) / W * box.width + 10, Math.max(0, box.width - tip.offsetWidth))}px`;
    tip.style.top = "34px";
  });
  svg.addEventListener("pointerleave", () => { tip.style.display = "none"; cursor.setAttribute("visibility", "hidden"); });
  figure.append(svg, tip);
  if (series.length > 1) figure.append(el("div", { class: "legend" }, series.map((s, i) =>
    el("span", {}, el("i", { style: `background:${color(i)}` }), s.name))));
  return figure;
}

function table(heads, rows, numeric) {
  const cls = (i) => numeric && numeric(i) ? "n" : null;
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, heads.map((h, i) => el("th", { class: cls(i) }, h)))),
    el("tbody", {}, rows.map((r) => el("tr", {}, r.map((c, i) => c instanceof Node && c.tagName === "TD" ? c : el("td", { class: cls(i) }, c)))))));
}

// What changed, in words: whether the intervals of both evaluations leave room for chance.
function verdict(name, before, after) {
  const a = before.metrics[name], b = after.metrics[name], x = before.intervals[name], y = after.intervals[name];
  if (a === undefined || b === undefined) return "";
  if (metric(a) === metric(b)) return "unchanged";  // as shown: of a frozen model the last bits may differ
  const better = FALLING.has(name) ? b < a : b > a;
  const apart = x && y && (x[1] < y[0] || y[1] < x[0]);
  return el("span", { class: better ? "good" : "bad" }, `${better ? "better" : "worse"}${apart ? "" : ", may be chance"}`);
}

const run = data.runs[0], evaluations = run.evaluations, first = evaluations[0], last = evaluations[evaluations.length - 1];
document.title = `${data.title}: report`;
page.append(el("h1", {}, data.title));
const facts = run.facts, between = facts["generator.path"] ? `${facts["retriever.path"]} and ${facts["generator.path"]}` : String(facts["retriever.path"]);
page.append(el("p", { class: "faint wrap" }, `${between}, objective ${facts["objective.name"]}, ${run.steps} of ${facts["total_steps"]} steps of ${facts["batch_size"]} queries; rows ${facts["data.train"]}, held out ${facts["data.eval"]}`));
for (const [key, text] of Object.entries(data.read)) page.append(el("p", { class: "faint wrap" }, `${key}: ${text}`));
if (data.warnings.length) page.append(el("ul", { class: "notes" }, data.warnings.map((w) => el("li", {}, w))));

if (last) {
  const order = Object.keys(NAMES).filter((n) => n in last.metrics), more = Object.keys(last.metrics).filter((n) => !(n in NAMES)).sort();
  const range = (e, n) => e.intervals[n] ? ` (${metric(e.intervals[n][0])} to ${metric(e.intervals[n][1])})` : "";
  const line = (n) => [NAMES[n] || n, first !== last ? metric(first.metrics[n]) + range(first, n) : "", metric(last.metrics[n]) + range(last, n),
    first !== last ? verdict(n, first, last) : ""];
  const heads = ["", first !== last ? `step ${first.step}` : "", `step ${last.step}`, ""], right = (i) => i === 1 || i === 2;
  section("What training changed",
    el("p", { class: "faint" }, `${last.counts.queries ?? "?"} held-out queries, ${last.counts.passages ?? "?"} passages; in brackets 95 % intervals. "May be chance" where the two intervals overlap.`),
    table(heads, order.map(line), right),
    more.length ? el("details", {}, el("summary", {}, `${more.length} further metrics, and what each means`), table(heads, more.map(line), right),
      el("dl", {}, Object.entries(data.definitions).map(([k, v]) => [el("dt", {}, k), el("dd", { class: "faint" }, String(v))]))) : null);
}
if (data.runs.length > 1 || last) {
  const copy = (text) => el("button", { class: "plain", onclick: (e) => navigator.clipboard.writeText(text).then(() => { e.target.textContent = "copied"; }) }, "copy");
  const names = Object.keys(NAMES).filter((n) => data.runs.some((r) => r.evaluations.length && n in r.evaluations[r.evaluations.length - 1].metrics));
  const ends = data.runs.map((r) => [r.name, r.evaluations[r.evaluations.length - 1]]);
  if (first && first !== last && first.step === 0) ends.unshift(["untrained", first]);
  if (data.runs.length > 1) section("Runs side by side", table(["", ...names.map((n) => NAMES[n])],
    ends.map(([name, e]) => [name, ...names.map((n) => e ? metric(e.metrics[n]) : "–")]), (i) => i > 0), Object.keys(data.differences).length ? el("details", {}, el("summary", {}, "What tells their configs apart"),
    table(["key", ...data.runs.map((r) => r.name)], Object.entries(data.differences).map(([k, v]) => [k, ...v.map((x) => JSON.stringify(x))]))) : null);
  page.append(el("details", {}, el("summary", {}, "The table to paste, as Markdown and as LaTeX"),
    copy(data.markdown), el("pre", {}, data.markdown), copy(data.latex), el("pre", {}, data.latex)));
}

if (evaluations.length > 1 || data.runs.some((r) => r.evaluations.length > 1)) {
  const over = (n) => data.runs.map((r) => ({ name: r.name, dots: true, points: r.evaluations.filter((e) => n in e.metrics).map((e) =>
    data.runs.length === 1 && e.intervals[n] ? [e.step, e.metrics[n], ...e.intervals[n]] : [e.step, e.metrics[n]]) }));
  section("Evaluations over steps", el("div", { class: "plots" }, ["recall@1", "recall@10", "mrr@10", "answer_nll", "em", "f1"]
    .filter((n) => last && n in last.metrics).map((n) => plot(NAMES[n], over(n)))));
}

const curves = data.curves, named = (prefix, labels) => Object.keys(curves).filter((n) => n.startsWith(prefix) && (!labels || labels.includes(n)))
  .map((n) => ({ name: n.slice(n.indexOf("/") + 1), points: curves[n] }));
const plots = [["Loss", named("loss/").filter((s) => s.name !== "spike")], ["Gradient norms", named("optim/grad_norm")],
  ["Learning rate", named("optim/learning_rate")], ["Queries a second", named("throughput/queries_per_s")],
  ["Seconds a step", named("time/step_s")], ["Share of padding", named("throughput/padding_share")],
  ["Share of peak FLOP/s", named("throughput/mfu")]].filter(([, s]) => s.length && s[0].points.length > 1);
if (plots.length) section("Training", el("div", { class: "plots" }, plots.map(([t, s]) => plot(t, s))));
const mined = named("mining/").filter((s) => ["not_first", "random_not_first", "similarity", "random_similarity"].includes(s.name));
if (mined.length) section("Mined groups", el("p", { class: "faint" }, "How hard groups are beside random ones: the share of rows whose own passage is not the nearest of its group, and the mean similarity of a query to the other passages."),
  el("div", { class: "plots" }, plot("Own passage not first", mined.filter((s) => s.name.endsWith("not_first")).map((s) => ({ ...s, dots: true }))),
    plot("Similarity of others", mined.filter((s) => s.name.endsWith("similarity")).map((s) => ({ ...s, dots: true })))));
const spent = Object.entries(data.time), whole = spent.reduce((a, [, s]) => a + s, 0);
if (whole > 0) section("Where the time went", el("p", { class: "faint" }, "Up to the last step; what came after it, such as the last evaluation, is not part of it."), el("div", { class: "bar", role: "img", "aria-label": spent.map(([n, s]) => `${n} ${percent(s / whole)}`).join(", ") },
  spent.map(([, s], i) => el("div", { style: `width:${100 * s / whole}%;background:${color(i)}` }))),
  el("div", { class: "legend" }, spent.map(([n, s], i) => el("span", {}, el("i", { style: `background:${color(i)}` }), `${n} ${seconds(s)} (${percent(s / whole)})`))));

const moved = data.kept_neighbours, weighed = Object.entries(data.calibration).filter(([, p]) => p.length);
if ((moved && moved.mean !== null) || weighed.length) {
  const figures = [];
  if (moved && moved.mean !== null) figures.push(plot("Nearest passages kept by training", [{ name: "queries", dots: true, points: moved.histogram.map((n, i) => [i / 10, n]) }],
    { xName: "share kept", x: [0, 1] }));
  if (weighed.length) figures.push(plot("How often the passage weighed most is right", weighed
    .map(([n, p]) => ({ name: n, dots: true, points: p.map(([w, r]) => [w, r]) })), { xName: "p(k | query)", x: [0, 1], y: [0, 1], diagonal: true }));
  section("How retrieval moved", el("p", { class: "faint" }, (moved && moved.mean !== null ? `Of a query's nearest passages before training, ${percent(moved.mean)} are still among them. ` : "") +
    "On the diagonal, a passage is right as often as its weight p(k | query) says."), el("div", { class: "plots" }, figures));
}

// Queries and the passages of their rows, each pair joined by a line, before and after on the same axes.
function map(title, points) {
  const figure = el("figure", {}, el("h3", {}, title)), tip = el("div", { class: "tip", role: "status" }), S = 420;
  const all = [...data.plane.before, ...data.plane.after].flatMap((p) => [[p[0], p[1]], [p[2], p[3]]]);
  const most = Math.max(...all.flat().map(Math.abs)) * 1.05 || 1, at = (v) => S / 2 + v / most * S / 2;
  const svg = el("svg", { viewBox: `0 0 ${S} ${S}`, role: "img", "aria-label": title });
  points.forEach(([a, b, c, d], i) => {
    const row = data.rows.find((r) => r.row === data.plane.row[i]);
    const show = (event) => {
      const box = svg.getBoundingClientRect();
      tip.textContent = row ? row.query.slice(0, 80) : `row ${data.plane.row[i]}`;
      tip.style.display = "block"; tip.style.left = `${Math.min(event.clientX - box.left + 8, Math.max(0, box.width - tip.offsetWidth))}px`; tip.style.top = `${event.clientY - box.top + 34}px`;
    };
    svg.append(el("g", { onpointerenter: show, onpointerleave: () => { tip.style.display = "none"; } },
      el("line", { class: "axis", x1: at(a), y1: at(b), x2: at(c), y2: at(d) }),
      el("circle", { cx: at(c), cy: at(d), r: 2.6, fill: color(1) }), el("circle", { cx: at(a), cy: at(b), r: 2.6, fill: color(0) })));
  });
  figure.append(svg, tip);
  return figure;
}
if (data.plane.row) section("Queries and their passages on a plane",
  el("p", { class: "faint" }, "The plane on which they spread most, of each evaluation; the first is turned to fit the second. A line joins a query to the passage of its row: the shorter it is beside the whole, the nearer they are."),
  el("div", { class: "plots" }, map("before", data.plane.before), map("after", data.plane.after)),
  el("div", { class: "legend" }, [["queries", 0], ["passages of their rows", 1]].map(([n, i]) => el("span", {}, el("i", { style: `background:${color(i)}` }), n))));

if (data.rows.length) {
  const state = { text: "", only: "all", key: "change", down: true, most: 50, open: null };
  const rank = (s) => s.rank ? s.rank : Infinity;
  const change = (r) => (r.after["mrr@10"] ?? 0) - (r.before["mrr@10"] ?? 0) + 0.1 * ((r.before.answer_nll ?? 0) - (r.after.answer_nll ?? 0));
  const kinds = {
    all: ["all rows", () => true],
    won: ["right passage found higher", (r) => rank(r.after) < rank(r.before)],
    lost: ["right passage found lower", (r) => rank(r.after) > rank(r.before)],
    missed: ["right passage not found", (r) => "gold" in r && !r.after.rank],
    answered: ["answered exactly", (r) => r.after.em === 1],
  };
  const values = {
    query: (r) => r.query.toLowerCase(), before: (r) => rank(r.before), after: (r) => rank(r.after), nll: (r) => r.after.answer_nll ?? Infinity,
    f1: (r) => r.after.f1 ?? -1, change: (r) => Math.abs(change(r)),
  };
  const body = el("tbody", {}), shown = el("span", { class: "faint" }), more = el("button", { class: "plain", onclick: () => { state.most += 200; draw(); } }, "show more");
  const heads = [["query", "question"], ["before", "rank before"], ["after", "rank after"], ["nll", "NLL after"], ["f1", "F1 after"], ["change", "change"]];
  const titles = { change: "of the reciprocal rank of the right passage, less a tenth of that of the NLL" };
  const side = (title, s) => el("div", {}, el("h3", {}, title), s.answer !== undefined ? el("p", { class: "wrap" }, `answer: ${s.answer || "(nothing)"}`) : null,
    el("ol", {}, (s.found || []).map(([p, score, right, share]) => el("li", { class: right ? "right wrap" : "wrap" },
      `${score.toFixed(3)}${share === undefined ? "" : `, evidence ${percent(share)}`}  ${data.passages[p]}`))));
  function draw() {
    const text = state.text.toLowerCase(), of = values[state.key];
    const rows = data.rows.filter((r) => kinds[state.only][1](r) && (!text || r.query.toLowerCase().includes(text) || (r.answer || "").toLowerCase().includes(text)));
    rows.sort((a, b) => { const x = of(a), y = of(b); return (x < y ? -1 : x > y ? 1 : 0) * (state.down ? -1 : 1); });
    body.replaceChildren(...rows.slice(0, state.most).flatMap((r) => {
      const place = (s) => s.rank || ((s.found || []).length ? "–" : "");
      const toggle = () => { state.open = state.open === r ? null : r; draw(); };
      const line = el("tr", { class: "row", tabindex: 0, "aria-expanded": state.open === r, onclick: toggle, onkeydown: (e) => { if (e.key === "Enter") toggle(); } },
        el("td", { class: "wrap" }, r.query), el("td", { class: "n" }, place(r.before)), el("td", { class: "n" }, place(r.after)),
        el("td", { class: "n" }, short(r.after.answer_nll)), el("td", { class: "n" }, short(r.after.f1)),
        el("td", { class: `n ${change(r) > 0 ? "good" : change(r) < 0 ? "bad" : ""}` }, (change(r) > 0 ? "+" : "") + short(change(r))));
      if (state.open !== r) return [line];
      return [line, el("tr", {}, el("td", { class: "detail", colspan: 6 }, r.answer !== undefined ? el("p", { class: "wrap" }, `right answer: ${r.answer}`) : null,
        r.gold !== undefined ? el("p", { class: "wrap faint" }, `right passage: ${data.passages[r.gold]}`) : null,
        el("div", { class: "cols" }, side("before", r.before), side("after", r.after))))];
    }));
    shown.textContent = `${rows.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} rows${data.left_out ? ` (${data.left_out.toLocaleString("en")} that changed least are left out)` : ""}`;
    more.style.display = rows.length > state.most ? "" : "none";
  }
  const sorted = (key) => () => { state.down = state.key === key ? !state.down : key !== "query"; state.key = key; draw(); };
  section("Row by row", el("p", { class: "faint" }, "Where the right passage stands among those found; a click shows the passages and the answers."),
    el("div", { class: "tools" }, el("input", { type: "search", placeholder: "search questions and answers", "aria-label": "search", oninput: (e) => { state.text = e.target.value; draw(); } }),
      el("select", { "aria-label": "which rows", onchange: (e) => { state.only = e.target.value; draw(); } }, Object.entries(kinds).map(([k, [label]]) => el("option", { value: k }, label))), shown),
    el("div", { class: "scroll" }, el("table", { id: "rows" }, el("thead", {}, el("tr", {}, heads.map(([k, label], i) => el("th", { class: i ? "n" : null, title: titles[k] }, el("button", { onclick: sorted(k) }, label))))), body)), more);
  draw();
}

const changed = Object.entries(data.changed.changed || {});
section("Config", changed.length ? el("div", {}, el("p", { class: "faint" }, `What was given on the command line, other than ${data.changed.file} has it:`),
  table(["key", "file", "run"], changed.map(([k, [a, b]]) => [k, ...[a, b].map((v) => el("td", { class: "wrap" }, JSON.stringify(v)))]))) : null, el("details", {}, el("summary", {}, `${Object.keys(data.config).length} keys`),
  table(["key", "value"], Object.entries(data.config).map(([k, v]) => [k, el("td", { class: "wrap" }, JSON.stringify(v))]))));
