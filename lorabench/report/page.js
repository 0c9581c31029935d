"use strict";

// This script sorts the page's tables, says which verdicts other margins turn, filters the runs and draws their learning
// curves.
// It inserts text from tables only as text (textContent, Option), never as markup.

// ---- Tables that sort -------------------------------------------------------------------------------------------

const collator = new Intl.Collator("en", { numeric: true });

// Return what a cell sorts by: its data-v, or else the number that its text begins with, or else its text. Null means
// that the value is missing.
function sortKey(cell) {
  const text = (cell.dataset.v ?? cell.textContent).trim();
  if (text === "" || text === "–") return null;
  const number = parseFloat(text.replace(/,/g, "").replace("−", "-"));
  return Number.isNaN(number) || !/^[-+−]?[.\d]/.test(text) || /^[\da-f]{12}$/.test(text) ? text : number;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return collator.compare(String(a), String(b));
}

function sortBy(table, header) {
  const descending = header.getAttribute("aria-sort") === "ascending";
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const keyed = [...table.tBodies[0].rows].map((row) => [sortKey(row.cells[header.cellIndex]), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // missing values come last in both directions
    return descending ? compare(b, a) : compare(a, b);
  });
  table.tBodies[0].append(...keyed.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sorts")) {
  if (table.tBodies[0].rows.length < 2) continue;
  for (const header of table.tHead.rows[0].cells) {
    if (!header.textContent.trim()) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortBy(table, header));
    header.append(button);
  }
}

// ---- Other margins ----------------------------------------------------------------------------------------------

const margin = document.querySelector("#margin input");

function showMargin() {
  const table = document.querySelector("table.margins");
  const [header, ...claims] = table.rows;
  table.classList.add("picked");
  const place = Number(margin.value) + 1;
  for (const row of [header, ...claims]) {
    for (const cell of row.cells) cell.classList.toggle("now", cell.cellIndex === place);
  }
  const turned = new Map();
  for (const row of claims) {
    const cell = row.cells[place];
    if (cell.classList.contains("same")) continue;
    turned.set(cell.dataset.verdict, [...(turned.get(cell.dataset.verdict) ?? []), row.dataset.claim]);
  }
  const texts = [...turned].map(([verdict, ids]) => `${ids.join(", ")} would be ${verdict}`);
  const times = header.cells[place].textContent;
  document.getElementById("at-margin").textContent =
    header.cells[place].dataset.own !== undefined
      ? `${times}: the preset's own margins`
      : `${times}: ${texts.join("; ") || "all verdicts are as above"}`;
}

if (margin) {
  document.getElementById("margin").hidden = false;
  margin.addEventListener("input", showMargin);
  showMargin();
}

// ---- Explorer of runs -------------------------------------------------------------------------------------------

const DRAWN = 80; // the most curves that are drawn at once
const LABELLED = 15; // the most curves that are labelled at their ends
const FILTERS = ["experiments", "model", "dataset", "method", "rank", "lr", "status"];

const data = JSON.parse(document.getElementById("curves").textContent);
const form = document.querySelector("#explorer form");
const chart = document.getElementById("chart");
const pointed = document.getElementById("pointed");
const pointedAtFirst = pointed.textContent;
const rows = [...document.getElementById("all-runs").rows];
const ticks = new Map();
const runsOfClaim = new Map();

function optionsOf(select, values) {
  for (const value of values) select.add(new Option(value, value));
  select.closest("label").hidden = values.length < 2;
}

function svg(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function prepare() {
  for (const key of FILTERS) {
    const values = new Set(rows.flatMap((row) => (key === "experiments" ? row.dataset[key].split(" ") : [row.dataset[key]])));
    values.delete("");
    optionsOf(form.elements[key], [...values].sort((a, b) => (key === "lr" ? a - b : collator.compare(a, b))));
  }
  for (const claim of document.querySelectorAll(".claim")) {
    const links = [...claim.querySelectorAll('a[href^="#run-"]')];
    if (!links.length) continue;
    const id = claim.querySelector(".id").textContent;
    runsOfClaim.set(id, new Set(links.map((link) => link.hash.slice(1))));
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Draw them";
    button.setAttribute("aria-label", `Draw the runs behind claim ${id}`);
    button.addEventListener("click", () => {
      clear();
      form.elements.claim.value = id;
      update();
      reveal(document.getElementById("explorer"));
    });
    links[0].closest("details").after(button);
  }
  optionsOf(form.elements.claim, [...runsOfClaim.keys()]);
  data.measures.forEach(([split, metric], place) => {
    const first = split === "validation" && metric === "nll";
    form.elements.measure.add(new Option(`${split}: ${metric}`, place, first, first));
  });

  const table = rows[0].closest("table");
  const pick = document.createElement("th");
  pick.scope = "col";
  pick.className = "pick";
  pick.textContent = "Draw";
  table.tHead.rows[0].prepend(pick);
  for (const row of rows) {
    const tick = document.createElement("input");
    tick.type = "checkbox";
    tick.setAttribute("aria-label", `Draw run ${row.dataset.run}`);
    tick.addEventListener("change", update);
    ticks.set(row, tick);
    const cell = document.createElement("td");
    cell.className = "pick";
    cell.append(tick);
    row.prepend(cell);
    row.addEventListener("pointerenter", () => light(row));
    row.addEventListener("pointerleave", () => light(null));
  }
  form.addEventListener("change", update);
  document.getElementById("clear").addEventListener("click", clear);
}

// Show the runs of one experiment, model and dataset at first, since the curves of all runs are too many to read.
function begin() {
  const wanted = document.getElementById("explorer").dataset.begin;
  const row = rows.find((candidate) => candidate.dataset.experiments.split(" ").includes(wanted));
  if (!row) return;
  form.elements.experiments.value = wanted;
  form.elements.model.value = row.dataset.model;
  form.elements.dataset.value = row.dataset.dataset;
}

function clear() {
  form.reset();
  for (const tick of ticks.values()) tick.checked = false;
  update();
}

function matches(row) {
  const claim = form.elements.claim.value;
  if (claim && !runsOfClaim.get(claim).has(row.id)) return false;
  return FILTERS.every((key) => {
    const wanted = form.elements[key].value;
    return !wanted || (key === "experiments" ? row.dataset[key].split(" ").includes(wanted) : row.dataset[key] === wanted);
  });
}

// Return the curve of a run in the chosen measure as points; empty if it has none.
function curveOf(row, measure) {
  const own = Object.hasOwn(data.curves, row.dataset.run) ? data.curves[row.dataset.run] : [];
  const curve = own.find(([of]) => of === measure);
  if (!curve) return [];
  const [, grid, values] = curve;
  return data.grids[grid].map((step, place) => [step, values[place]]);
}

function update() {
  const matching = rows.filter(matches);
  const shown = new Set(matching);
  for (const row of rows) row.hidden = !shown.has(row);
  const ticked = rows.filter((row) => ticks.get(row).checked);
  const measures = data.measures.map((_, place) => place);
  const chosen = ticked.length ? ticked : matching;
  const of = (measure) => chosen.map((row) => ({ row, points: curveOf(row, measure) })).filter((curve) => curve.points.length);
  // If none of the chosen runs has the measure, the first measure that one of them has is shown.
  let curves = of(Number(form.elements.measure.value));
  if (!curves.length) {
    const other = measures.find((measure) => of(measure).length);
    if (other !== undefined) {
      form.elements.measure.value = other;
      curves = of(other);
    }
  }
  const drawn = curves.slice(0, DRAWN);
  const runs = (count) => `${count} run${count === 1 ? "" : "s"}`;
  document.getElementById("matching").textContent =
    `${matching.length} of ${runs(rows.length)} match; ` +
    `${drawn.length < curves.length ? `the first ${drawn.length} of ${curves.length}` : drawn.length} curves drawn` +
    (ticked.length ? `, of the ${runs(ticked.length)} ticked.` : ".") +
    (new Set(drawn.map(({ row }) => `${row.dataset.model}\n${row.dataset.dataset}`)).size > 1
      ? " They are of several models or datasets, whose losses can't be compared."
      : "");
  draw(drawn);
}

// Return round numbers that divide a range into about the given number of parts.
function niceTicks(low, high, about) {
  const raw = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const ticks = [];
  for (let place = Math.ceil(low / step); place * step <= high + step * 1e-9; place += 1) ticks.push(place * step);
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(low); power <= high; power += 1) {
    for (const factor of high - low < 2.2 ? [1, 2, 5] : [1]) ticks.push(factor * 10 ** power);
  }
  return ticks.filter((step) => Math.log10(step) >= low && Math.log10(step) <= high);
}

// Return the lowest and the highest value without outliers: values beyond 1.5 times the range of the middle half.
function usualRange(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const [lower, upper] = [0.25, 0.75].map((share) => sorted[Math.floor(share * (sorted.length - 1))]);
  const usual = sorted.filter((value) => value >= lower - 1.5 * (upper - lower) && value <= upper + 1.5 * (upper - lower));
  return [usual[0], usual.at(-1)];
}

const written = (value) => String(Number(value.toPrecision(4)));

let drawnNow = [];

function draw(curves) {
  chart.replaceChildren();
  drawnNow = [];
  light(null);
  const legend = document.getElementById("legend");
  legend.replaceChildren();
  const { width, height } = chart.getBoundingClientRect();
  const log = form.elements.scale.value === "log";
  const shown = curves
    .map(({ row, points }) => ({ row, points: points.filter(([step]) => !log || step > 0) }))
    .filter(({ points }) => points.length);
  if (!shown.length || !width) {
    chart.append(svg("text", { x: 12, y: 24 }, "No curve to draw: the chosen runs have no values of this measure."));
    return;
  }
  const all = shown.flatMap((curve) => curve.points);
  const lastStep = Math.max(...all.map(([step]) => step));
  const late = all.filter(([step]) => step >= lastStep / 10).map(([, value]) => value);
  const values = late.length ? late : all.map(([, value]) => value);
  let [low, high] = usualRange(values);
  const margin = (high - low || Math.abs(high) || 1) * 0.05;
  [low, high] = [low - margin, high + margin];
  const x = log ? Math.log10 : (step) => step;
  const [first, last] = [Math.min(...all.map(([step]) => x(step))), x(lastStep)];
  const named = shown.length <= LABELLED && width > 500;
  const box = { left: 58, right: width - (named ? 150 : 12), top: 10, bottom: height - 40 };
  const across = (step) => box.left + ((x(step) - first) / (last - first || 1)) * (box.right - box.left);
  const up = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);

  for (const value of niceTicks(low, high, 6)) {
    chart.append(svg("line", { x1: box.left, x2: box.right, y1: up(value), y2: up(value), stroke: "#e3e6e9" }));
    chart.append(svg("text", { x: box.left - 6, y: up(value) + 4, "text-anchor": "end" }, written(value)));
  }
  for (const step of log ? logTicks(first, last) : niceTicks(first, last, width > 500 ? 8 : 4)) {
    chart.append(svg("line", { x1: across(step), x2: across(step), y1: box.top, y2: box.bottom, stroke: "#e3e6e9" }));
    chart.append(svg("text", { x: across(step), y: box.bottom + 16, "text-anchor": "middle" }, written(step)));
  }
  chart.append(svg("text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, "step"));
  const clip = svg("clipPath", { id: "plot" });
  clip.append(svg("rect", { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top }));
  const group = svg("g", { "clip-path": "url(#plot)" });
  chart.append(clip, group);

  const labels = new Map();
  // Full fine-tuning is a wide line, so it is drawn first, below the others.
  const style = (curve) => data.styles[curve.row.dataset.label];
  for (const curve of shown.sort((a, b) => style(b)[2] - style(a)[2])) {
    const [stroke, dashes, thickness] = style(curve);
    const places = curve.points.map(([step, value]) => [across(step), up(value)]);
    const look = { class: "curve", stroke, "stroke-dasharray": dashes, "stroke-width": thickness };
    const path = svg("path", { ...look, d: `M${places.map((place) => place.map((part) => part.toFixed(1))).join("L")}` });
    path.addEventListener("click", () => { location.hash = curve.row.id; });
    group.append(path);
    drawnNow.push({ ...curve, places, path });
    const { label } = curve.row.dataset;
    labels.set(label, { stroke, dashes, thickness, count: (labels.get(label)?.count ?? 0) + 1 });
  }
  if (named) nameEnds(box);
  for (const [label, { stroke, dashes, thickness, count }] of [...labels].sort(([a], [b]) => collator.compare(a, b))) {
    const line = svg("line", { x1: 0, x2: 28, y1: 5, y2: 5, stroke, "stroke-dasharray": dashes, "stroke-width": thickness });
    const item = document.createElement("li");
    item.append(svg("svg", { viewBox: "0 0 28 10", "aria-hidden": "true" }, line), `${label}${count > 1 ? ` (${count})` : ""}`);
    legend.append(item);
  }
}

// Write the arm, LR and seed of each curve beside its last point, without overlap.
function nameEnds(box) {
  let free = box.top;
  const ends = drawnNow.map((curve) => ({ curve, y: Math.min(Math.max(curve.places.at(-1)[1], box.top), box.bottom) }));
  for (const { curve, y } of ends.sort((a, b) => a.y - b.y)) {
    const { label, lr, seed } = curve.row.dataset;
    const place = Math.max(y + 4, free);
    free = place + 12;
    const text = `${label.replace("LoRA ", "")} ${lr}, seed ${seed}`;
    chart.append(svg("text", { class: "end", x: curve.places.at(-1)[0] + 6, y: place }, text));
  }
}

// Highlight a run in the chart and in the table, and write out its point that is nearest to the pointer.
function light(row, point) {
  const lit = drawnNow.find((curve) => curve.row === row);
  chart.classList.toggle("pointing", Boolean(lit));
  for (const curve of drawnNow) curve.path.classList.toggle("lit", curve === lit);
  for (const other of rows) other.classList.toggle("lit", Boolean(lit && point && other === row));
  if (!lit) {
    pointed.textContent = pointedAtFirst;
    return;
  }
  const { run, label, model, dataset, lr, seed, status } = row.dataset;
  const [step, value] = point ?? lit.points.at(-1);
  pointed.textContent = `${run}: ${label} on ${model}, ${dataset}, LR ${lr}, seed ${seed}, ${status}; step ${step}: ${written(value)}`;
}

function pointAt(event) {
  const corner = chart.getBoundingClientRect();
  let best = { distance: 40 };
  for (const curve of drawnNow) {
    curve.places.forEach(([x, y], place) => {
      const distance = Math.hypot(x - (event.clientX - corner.left), y - (event.clientY - corner.top));
      if (distance < best.distance) best = { distance, row: curve.row, point: curve.points[place] };
    });
  }
  light(best.row ?? null, best.point);
}

// Open all closed details that hold an element, and go to it.
function reveal(element) {
  for (let part = element.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
  element.scrollIntoView();
}

// Go to the target of a link. If a filter hides it, all runs are shown again.
function showTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  if (target.hidden && ticks.has(target)) clear();
  reveal(target);
}

if (rows.length) {
  prepare();
  document.getElementById("explorer").hidden = false;
  begin();
  update();
  chart.addEventListener("pointermove", pointAt);
  chart.addEventListener("pointerleave", () => light(null));
  new ResizeObserver(() => update()).observe(chart);
}
window.addEventListener("hashchange", showTarget);
showTarget();
