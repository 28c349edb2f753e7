"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs.map((run, index) => ({ ...run, index, color: "run-" + (index % 8) }));
const hidden = new Set();
const redraws = [];
let smoothing = 0;

// Elements. Text goes in as text, never as markup: a rollout may contain anything.
const SVG = "http://www.w3.org/2000/svg";
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);
const visible = () => runs.filter((run) => !hidden.has(run.index));
const redraw = () => redraws.forEach((one) => one());

// Numbers.
const isShare = (name) => /(_frac|_share|avg_at_\d+|pass_at_\d+|\/reward)$/.test(name);
function format(value, name = "") {
  if (value === null || value === undefined) return "-";
  if (isShare(name)) return (100 * value).toFixed(1) + " %";
  if (/bytes$/.test(name)) return bytes(value);
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}
function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (Math.abs(value) >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return value.toFixed(unit ? 1 : 0) + " " + units[unit];
}
const unitOf = (value) => 1024 ** Math.floor(Math.log(Math.max(1, Math.abs(value))) / Math.log(1024));
function duration(seconds) {
  if (seconds < 90) return seconds.toFixed(0) + " s";
  if (seconds < 5400) return (seconds / 60).toFixed(1) + " min";
  return (seconds / 3600).toFixed(1) + " h";
}
function ticks(low, high, count) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / count;
  const power = Math.pow(10, Math.floor(Math.log10(rough)));
  const step = [1, 2, 2.5, 5, 10].map((one) => one * power).find((one) => span / one <= count) || 10 * power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}
function smooth(values) {
  if (!smoothing) return values;
  let mean = 0, weight = 0;
  return values.map((value) => {
    mean = smoothing * mean + (1 - smoothing) * value;
    weight = smoothing * weight + (1 - smoothing);
    return mean / weight;
  });
}
function nearest(steps, at) {
  let best = 0;
  for (let index = 1; index < steps.length; index += 1) if (Math.abs(steps[index] - at) < Math.abs(steps[best] - at)) best = index;
  return best;
}

// Paints when the host has a width, and again when it has another one.
function onWidth(host, paint) {
  let width = 0;
  new ResizeObserver(() => {
    if (host.clientWidth === width) return;
    width = host.clientWidth;
    requestAnimationFrame(paint);
  }).observe(host);
}

// Tooltip.
const tip = byId("tip");
function showTip(event, ...content) {
  tip.replaceChildren(...content.flat());
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 16 + box.width > window.innerWidth ? event.clientX - box.width - 12 : event.clientX + 16;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.max(4, Math.min(event.clientY + 14, window.innerHeight - box.height - 6)) + "px";
}
const hideTip = () => { tip.hidden = true; };
const row = (color, shape, name, value) => el("div", {}, el("span", { class: shape + " " + color }), el("span", {}, name), el("span", {}, value));

// One chart: a frame, its axes, and whatever is drawn into it.
function frame(host, { low, high, last, log, name, height = 170, lead = /bytes$/.test(name) ? 60 : 46 }) {
  const width = Math.max(240, host.clientWidth || 340);
  const edge = { top: 8, right: 12, bottom: 22, left: lead };
  const inner = { width: width - edge.left - edge.right, height: height - edge.top - edge.bottom };
  const scale = log ? Math.log10 : (value) => value;
  const [from, to] = [scale(low), scale(high)];
  const x = (step) => edge.left + (last ? step / last : 0.5) * inner.width;
  const y = (value) => edge.top + (1 - (scale(value) - from) / (to - from || 1)) * inner.height;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": name });
  const marks = log ? ticks(Math.floor(from), Math.ceil(to), 4).filter(Number.isInteger).map((one) => 10 ** one).filter((one) => one >= low * 0.99 && one <= high * 1.01) : /bytes$/.test(name) ? ticks(low / unitOf(high), high / unitOf(high), 4).map((one) => one * unitOf(high)) : ticks(low, high, 4);
  for (const mark of marks.length ? marks : [low, high]) {
    svg.append(draw("line", { class: "grid-line", x1: edge.left, x2: width - edge.right, y1: y(mark), y2: y(mark) }),
      draw("text", { x: edge.left - 7, y: y(mark) + 3.5, "text-anchor": "end" }, log ? mark.toExponential(0) : tickText(mark, name)));
  }
  svg.append(draw("line", { class: "axis", x1: edge.left, x2: width - edge.right, y1: height - edge.bottom, y2: height - edge.bottom }));
  for (const mark of ticks(0, last, Math.max(2, Math.floor(inner.width / 70))).filter(Number.isInteger)) {
    svg.append(draw("text", { x: x(mark), y: height - 6, "text-anchor": "middle" }, String(mark)));
  }
  return { svg, x, y, width, height, edge, inner, at: (event) => {
    const box = svg.getBoundingClientRect();
    return Math.max(0, Math.min(last, ((event.clientX - box.left) * width / box.width - edge.left) / inner.width * last));
  } };
}
function tickText(value, name) {
  if (isShare(name)) return Math.round(100 * value) + " %";
  if (/bytes$/.test(name)) return bytes(value).replace(/\.0 /, " ");
  const size = Math.abs(value);
  if (size >= 10000) return Number((value / 1000).toPrecision(3)) + "k";
  if (size && size < 1e-3) return value.toExponential(0);
  return String(Number(value.toPrecision(3)));
}
const path = (points) => points.map(([a, b], index) => (index ? "L" : "M") + a.toFixed(1) + " " + b.toFixed(1)).join("");
const lastStep = () => Math.max(1, ...runs.flatMap((run) => Object.values(run.series).map(([steps]) => steps[steps.length - 1])));

function bounds(values, name, log) {
  let low = Math.min(...values), high = Math.max(...values);
  if (log) {
    const decades = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    return [10 ** decades[0], 10 ** Math.max(decades[1], decades[0] + 1)];
  }
  if (isShare(name)) return [0, /_frac$/.test(name) ? Math.min(1, Math.max(high * 1.1, 0.05)) : 1];
  const pad = (high - low) * 0.07 || Math.abs(high) * 0.1 || 1;
  if (low >= 0 && (low < 0.4 * high || /^(time|memory)\//.test(name))) return [0, high + pad];
  return [low - pad, high + pad];
}

function lineChart(host, name, { height = 170, predictions = [] } = {}) {
  const paint = () => {
    host.replaceChildren();
    const log = data.logarithmic.includes(name);
    const shown = visible().filter((run) => run.series[name]).map((run) => {
      const [steps, values] = run.series[name];
      const kept = steps.map((step, index) => [step, values[index]]).filter(([, value]) => !log || value > 0);
      return { run, steps: kept.map(([step]) => step), values: kept.map(([, value]) => value) };
    }).filter((one) => one.steps.length);
    if (!shown.length) { host.append(el("p", { class: "quiet" }, "Hidden, or not measured.")); return; }
    const lines = predictions.filter((one) => !hidden.has(one.run.index));
    const [low, high] = bounds([...shown.flatMap((one) => one.values), ...lines.map((one) => one.value)], name, log);
    const area = frame(host, { low, high, last: lastStep(), log, name, height });
    for (const one of lines) {
      area.svg.append(draw("g", { class: one.run.color },
        draw("line", { class: "predicted", x1: area.edge.left, x2: area.width - area.edge.right, y1: area.y(one.value), y2: area.y(one.value) }),
        draw("text", { class: "predicted-text", x: area.edge.left + 14, y: area.y(one.value) - 5 }, "predicted " + one.value.toFixed(3))));
    }
    for (const one of shown) {
      one.smoothed = smooth(one.values);
      const points = one.steps.map((step, index) => [area.x(step), area.y(one.smoothed[index])]);
      const group = draw("g", { class: one.run.color });
      if (smoothing) group.append(draw("path", { class: "raw", d: path(one.steps.map((step, index) => [area.x(step), area.y(one.values[index])])) }));
      group.append(draw("path", { class: "line", d: path(points) }));
      if (points.length <= 30) points.forEach(([cx, cy]) => group.append(draw("circle", { class: "point", cx, cy, r: points.length <= 15 ? 3 : 2 })));
      area.svg.append(group);
    }
    const cross = draw("g", {});
    area.svg.append(cross);
    area.svg.addEventListener("pointermove", (event) => {
      const at = area.at(event);
      const hits = shown.map((one) => ({ ...one, index: nearest(one.steps, at) }));
      const step = hits.reduce((best, one) => (Math.abs(one.steps[one.index] - at) < Math.abs(best - at) ? one.steps[one.index] : best), Infinity);
      cross.replaceChildren(draw("line", { class: "cross", x1: area.x(step), x2: area.x(step), y1: area.edge.top, y2: area.height - area.edge.bottom }));
      const here = hits.filter((one) => one.steps[one.index] === step);
      for (const one of here) cross.append(draw("g", { class: one.run.color }, draw("circle", { class: "hot", cx: area.x(step), cy: area.y(one.smoothed[one.index]), r: 3.6 })));
      showTip(event, el("b", {}, (/^eval\//.test(name) ? "after step " : "step ") + step), here.map((one) => row(one.run.color, "dot", one.run.name, format(one.values[one.index], name))));
    });
    area.svg.addEventListener("pointerleave", () => { cross.replaceChildren(); hideTip(); });
    host.append(area.svg);
  };
  redraws.push(paint);
  onWidth(host, paint);
}
function chartCard(name, options) {
  const host = el("div", {});
  lineChart(host, name, options);
  return el("figure", { class: "card chart" }, el("h4", {}, name), el("p", {}, data.names[name] || ""), host);
}

// Sections.
function header() {
  const tasks = [...new Set(runs.map((run) => run.task).filter(Boolean))];
  const steps = runs.map((run) => run.numSteps + (run.plannedSteps && run.plannedSteps !== run.numSteps ? " of " + run.plannedSteps : ""));
  const text = [tasks.join(", "), runs.length > 1 ? runs.length + " runs" : runs[0].title, [...new Set(steps)].join(" / ") + " steps",
    duration(runs.reduce((sum, run) => sum + run.seconds, 0)) + (runs.length > 1 ? " together" : "")];
  byId("subtitle").textContent = text.filter(Boolean).join(" \u00b7 ");
  for (const run of runs) {
    byId("legend").append(el("button", { type: "button", class: "chip", "aria-pressed": "true", title: run.title, onclick: (event) => {
      if (hidden.has(run.index)) hidden.delete(run.index); else hidden.add(run.index);
      event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(run.index)));
      redraw();
    } }, el("span", { class: "dot " + run.color }), run.name, runs.length > 1 ? el("span", { class: "quiet" }, run.title) : null));
  }
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
  });
}
function links() {
  for (const section of document.querySelectorAll("main > section:not([hidden])")) byId("links").append(el("a", { href: "#" + section.id }, section.querySelector("h2").textContent));
}

function sparkline(run, name) {
  const values = run.series[name][1];
  if (values.length < 2) return null;
  const low = Math.min(...values), high = Math.max(...values);
  const points = values.map((value, index) => [3 + index / (values.length - 1) * 104, 25 - (high > low ? (value - low) / (high - low) : 0.5) * 22]);
  const [cx, cy] = points[points.length - 1];
  return draw("svg", { class: "spark " + run.color, viewBox: "0 0 110 28", "aria-hidden": "true" }, draw("path", { class: "line", d: path(points) }), draw("circle", { class: "hot", cx, cy, r: 2.6 }));
}
function delta(change, name) {
  const value = change.after - change.before;
  const sign = value < 0 ? "\u2212" : "+";
  if (isShare(name)) return sign + (100 * Math.abs(value)).toFixed(1) + " points";
  return change.before > 0 && change.after > 0 ? "\u00d7" + format(change.after / change.before) : sign + format(Math.abs(value), name);
}
function changeTable() {
  byId("change-lead").textContent = data.table.some((name) => name.startsWith("eval/"))
    ? "Held-out prompts before the first and after the last step; everything else as the mean over the first and the last tenth of the steps."
    : "Mean over the first and over the last tenth of the steps.";
  const paint = () => byId("change-table").replaceChildren(el("table", { class: visible().length > 2 ? "narrow" : "" },
    el("thead", {}, el("tr", {}, el("th", {}, "Metric"), visible().map((run) => el("th", {}, el("span", { class: "run-head" }, el("span", { class: "dot " + run.color }), run.name))))),
    el("tbody", {}, data.table.map((name) => el("tr", {}, el("th", { class: "name", scope: "row" }, el("code", {}, name), el("small", {}, data.names[name])),
      visible().map((run) => {
        const change = run.changes[name];
        if (!change) return el("td", { class: "quiet" }, "\u2013");
        const [before, after] = change;
        return el("td", {}, el("div", { class: "cell" }, el("span", { class: "values" }, el("span", { class: "before" }, format(before, name) + " \u2192 "), el("span", { class: "after" }, format(after, name)), el("span", { class: "delta" }, delta({ before, after }, name))), sparkline(run, name)));
      }))))));
  redraws.push(paint);
  paint();
}

function prediction() {
  const found = runs.filter((run) => run.prediction);
  if (!found.length) return;
  byId("prediction").hidden = false;
  const metric = found[0].prediction.metric;
  const host = el("div", {});
  byId("prediction-body").append(
    el("p", { class: "lead" }, "With a fixed teacher, theory says where the share of the first road comes to rest. It follows from the kind of future credit alone; nothing is fitted. Measured: mean over the second half of the run."),
    el("div", { class: "two even" }, el("figure", { class: "card chart" }, el("h4", {}, metric), el("p", {}, data.names[metric]), host),
      el("div", { class: "card scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["Run", "A token answers for", "Predicted", "Measured", "Difference"].map((text, index) => el("th", { class: index > 1 ? "number" : "" }, text)))),
        el("tbody", {}, found.map((run) => { const one = run.prediction; const off = one.measured - one.predicted; return el("tr", {}, el("th", { scope: "row" }, el("span", { class: "run-head" }, el("span", { class: "dot " + run.color }), run.name)),
          el("td", {}, one.why), el("td", { class: "number" }, one.predicted.toFixed(3)), el("td", { class: "number" }, one.measured.toFixed(3)), el("td", { class: "number quiet" }, (off < 0 ? "\u2212" : "+") + Math.abs(off).toFixed(3))); }))))));
  lineChart(host, metric, { height: 260, predictions: found.map((run) => ({ run, value: run.prediction.predicted })) });
}

function curves() {
  const body = byId("curves-body");
  for (const group of data.groups) {
    const grid = el("div", { class: "grid" });
    if (group.title.startsWith("All other")) {
      const more = el("details", { class: "more" }, el("summary", {}, group.title + " (" + group.names.length + ")"), grid);
      more.addEventListener("toggle", () => { if (!grid.childElementCount) { grid.append(...group.names.map((name) => chartCard(name))); redraw(); } });
      body.append(more);
    } else {
      grid.append(...group.names.map((name) => chartCard(name)));
      body.append(el("h3", {}, group.title), grid);
    }
  }
  byId("smoothing").addEventListener("input", (event) => { smoothing = Number(event.target.value); byId("smoothing-value").textContent = smoothing; redraw(); });
}

function tabs(host, candidates, pick) {
  if (candidates.length < 2) { candidates.forEach(pick); return; }
  const buttons = candidates.map((run) => el("button", { type: "button", "aria-pressed": "false", onclick: () => choose(run) }, el("span", { class: "run-head" }, el("span", { class: "dot " + run.color }), run.name)));
  const choose = (run) => { buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(candidates[index] === run))); pick(run); };
  host.append(...buttons);
  choose(candidates[0]);
}
function time() {
  const timed = runs.filter((run) => run.phases.step.length);
  if (!timed.length) return;
  byId("time").hidden = false;
  let current = null;
  const host = el("div", {}), side = el("div", { class: "card pad" });
  byId("time-body").append(el("div", { class: "two" }, el("figure", { class: "card chart" }, el("h4", {}, "seconds of a step"), el("p", {}, "By phase, stacked; the clock of the first rank."), host), side));
  const paint = () => { if (current) { areaChart(host, current); shares(side, current); } };
  redraws.push(paint);
  onWidth(host, paint);
  tabs(byId("time-runs"), timed, (run) => { current = run; paint(); });
}
function areaChart(host, run) {
  const { step, ...named } = run.phases;
  const names = data.phases.filter((name) => named[name]);
  const tops = step.map(() => 0);
  const layers = names.map((name) => ({ name, from: [...tops], to: step.map((_, index) => (tops[index] += named[name][index])) }));
  const last = Math.max(1, step[step.length - 1]);
  host.replaceChildren();
  const area = frame(host, { low: 0, high: Math.max(...tops) * 1.05 || 1, last, name: "seconds of a step by phase", height: 260 });
  for (const { name, from, to } of layers) {
    const up = step.map((one, index) => [area.x(one), area.y(to[index])]), down = step.map((one, index) => [area.x(one), area.y(from[index])]).reverse();
    area.svg.append(draw("g", { class: "phase-" + name }, draw("path", { class: "area", d: path([...up, ...down]) + "Z" })));
  }
  const cross = draw("g", {});
  area.svg.append(cross);
  area.svg.addEventListener("pointermove", (event) => {
    const index = nearest(step, area.at(event));
    cross.replaceChildren(draw("line", { class: "cross", x1: area.x(step[index]), x2: area.x(step[index]), y1: area.edge.top, y2: area.height - area.edge.bottom }));
    showTip(event, el("b", {}, "step " + step[index] + ": " + tops[index].toFixed(2) + " s"), names.map((name) => row("phase-" + name, "square", name, named[name][index].toFixed(2) + " s")).reverse());
  });
  area.svg.addEventListener("pointerleave", () => { cross.replaceChildren(); hideTip(); });
  host.append(area.svg);
}
function shares(side, run) {
  const bar = el("div", { class: "stack" }, run.steady.map((one) => { const part = el("div", { class: "phase-" + one.phase }); part.style.flex = String(Math.max(one.share, 0.001)) + " 1 0"; return part; }));
  const outside = run.steady.find((one) => one.phase === "other");
  const meaning = { ...data.phaseMeanings, other: "Outside the main phases." };
  side.replaceChildren(el("b", {}, "A steady step"), el("p", { class: "quiet" }, "Median over the steps without evaluation or save, the first left out. " + (outside ? (100 * outside.share).toFixed(1) + " % lie outside the main phases." : "")), bar,
    el("div", { class: "keys" }, run.steady.map((one) => el("div", { title: meaning[one.phase] }, el("span", { class: "square phase-" + one.phase }), el("b", {}, one.phase), el("span", { class: "number" }, one.seconds.toFixed(2) + " s"), el("span", { class: "number quiet" }, (100 * one.share).toFixed(1) + " %")))));
}

function rollouts() {
  const sampled = runs.filter((run) => run.samples.length);
  if (!sampled.length) return;
  byId("rollouts").hidden = false;
  let current = sampled[0], at = 0;
  const tabHost = el("div", { class: "tabs" });
  const slider = el("input", { type: "range", min: 0, value: 0, step: 1, "aria-label": "Step" });
  const says = el("output", {});
  const outcome = el("select", { "aria-label": "Outcome" }, ["every outcome", "passed", "failed", "timeout", "invalid", "unavailable"].map((text) => el("option", { value: text }, text)));
  const list = el("div", { class: "samples" });
  const steps = () => [...new Set(current.samples.map((sample) => sample.step))];
  const paint = () => {
    const step = steps()[at];
    says.textContent = "step " + step;
    const kept = current.samples.filter((sample) => sample.step === step && (outcome.value === "every outcome" || sample.outcome === outcome.value));
    list.replaceChildren(...(kept.length ? kept.map(sampleCard) : [el("p", { class: "quiet" }, "No rollout of this outcome was kept at this step.")]));
  };
  slider.addEventListener("input", () => { at = Number(slider.value); paint(); });
  outcome.addEventListener("change", paint);
  const heat = runs.some((run) => run.samples.some((sample) => (sample.tokens || []).some((token) => "teacher" in token)));
  byId("rollouts-body").append(
    el("p", { class: "lead" }, "What the student answered, what the judge said, and what the teacher read in place of the prompt. " + (heat ? "Each token is coloured by what the teacher thinks of it." : "")),
    el("div", { class: "card filters" }, tabHost, el("label", { class: "control" }, slider, says), outcome,
      heat ? el("span", { class: "scale" }, "teacher doubts", el("span", { class: "ramp" }), "teacher prefers") : null), list);
  tabs(tabHost, sampled, (run) => { current = run; slider.max = steps().length - 1; at = Math.min(at, steps().length - 1); slider.value = at; paint(); });
}
function sampleCard(sample) {
  const term = (name, ...content) => [el("dt", {}, name), el("dd", {}, ...content)];
  return el("article", { class: "card sample" },
    el("header", {}, el("span", { class: "badge " + sample.outcome }, sample.outcome), el("code", {}, sample.rollout),
      el("span", {}, "weights " + sample.version), sample.reward === null ? null : el("span", {}, "reward " + format(sample.reward)), sample.finish === "stop" ? null : el("span", {}, "ended by " + sample.finish)),
    el("dl", {}, term("Prompt", el("pre", { class: "text" }, sample.prompt)), term("Response", el("pre", { class: "text" }, sample.tokens ? sample.tokens.map(token) : sample.response)),
      sample.feedback ? term("Feedback", el("pre", { class: "text" }, sample.feedback)) : null,
      term("The teacher read", sample.context === null ? el("span", { class: "quiet" }, "nothing: this rollout has weight 0") : el("pre", { class: "text" }, inserted(sample.prompt, sample.context)))));
}
function token(one) {
  const text = one.text.replace(/\n/g, "\u21b5\n");
  if (!("teacher" in one)) return el("span", { class: "token" }, text);
  const isOutside = one.teacher === null;
  const gain = isOutside ? -4 : one.teacher - one.student;
  const node = el("span", { class: "token " + (gain < 0 ? "doubt" : "agree") + (isOutside ? " outside" : "") }, text);
  node.style.setProperty("--heat", Math.min(0.75, Math.abs(gain) / 3).toFixed(3));
  const percent = (logprob) => (100 * Math.exp(logprob)).toPrecision(3) + " %";
  node.addEventListener("pointermove", (event) => showTip(event, el("b", {}, JSON.stringify(one.text)),
    row("", "dot", "student", percent(one.student)), row("", "dot", "teacher", isOutside ? "outside the support" : percent(one.teacher)),
    one.best === undefined ? [] : row("", "dot", "teacher's first choice", JSON.stringify(one.best) + " " + (100 * one.best_prob).toPrecision(3) + " %")));
  node.addEventListener("pointerleave", hideTip);
  return node;
}
function inserted(prompt, context) {
  let start = 0, end = 0;
  while (start < prompt.length && prompt[start] === context[start]) start += 1;
  while (end < prompt.length - start && prompt[prompt.length - 1 - end] === context[context.length - 1 - end]) end += 1;
  const middle = context.slice(start, context.length - end);
  return start + end === prompt.length && middle ? [context.slice(0, start), el("mark", { title: "not in the prompt" }, middle), context.slice(context.length - end)] : [context];
}

function config() {
  const body = byId("config-body");
  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const table = (paths, field) => el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, field === "config" ? "Setting" : "Package"), runs.map((run) => el("th", {}, el("span", { class: "run-head" }, el("span", { class: "dot " + run.color }), run.name))))),
    el("tbody", {}, paths.map((path) => el("tr", {}, el("th", { scope: "row" }, el("code", {}, path)), runs.map((run) => el("td", {}, path in run[field] ? el("code", {}, text(run[field][path])) : "\u2013"))))));
  const all = (field) => [...new Set(runs.flatMap((run) => Object.keys(run[field])))];
  const paths = all("config");
  const differs = paths.filter((path) => new Set(runs.map((run) => JSON.stringify(run.config[path]))).size > 1);
  if (runs.length > 1) body.append(el("h3", {}, "What differs"), differs.length ? el("div", { class: "card scroll" }, table(differs, "config")) : el("p", { class: "quiet" }, "Nothing: the runs have one configuration."));
  const host = el("div", { class: "card scroll" }), search = el("input", { type: "search", placeholder: "Filter settings", "aria-label": "Filter settings" });
  const paint = () => host.replaceChildren(table(paths.filter((path) => path.includes(search.value.trim())), "config"));
  search.addEventListener("input", paint);
  paint();
  body.append(el("details", { class: "more", open: runs.length === 1 && paths.length < 40 }, el("summary", {}, "All settings (" + paths.length + ")"), el("p", {}, search), host));
  if (all("versions").length) body.append(el("details", { class: "more" }, el("summary", {}, "Versions"), el("div", { class: "card scroll" }, table(all("versions"), "versions"))));
}

header(); changeTable(); prediction(); curves(); time(); rollouts(); config(); links();
document.documentElement.dataset.ready = "true";
})();
