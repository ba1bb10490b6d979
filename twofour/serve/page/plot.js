// Lines over time and bars over buckets, as SVG of the width that there is.

import { html, svg } from "./dom.js";

const LEFT = 52, RIGHT = 8, TOP = 6, BOTTOM = 18, HEIGHT = 150;

// The ends of an axis from 0: 1, 2 or 5 times a power of ten a step.
function ticks(most) {
  const rough = Math.max(most, 1e-9) / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const steps = Math.max(Math.ceil(most / step - 1e-9), 1);
  return Array.from({ length: steps + 1 }, (_, index) => index * step);
}

// A path that breaks where values are null; a value alone becomes a short stroke.
function path(values, x, y) {
  let text = "";
  values.forEach((value, index) => {
    if (value === null || value === undefined) return;
    const begins = index === 0 || values[index - 1] === null || values[index - 1] === undefined;
    text += `${begins ? "M" : "L"}${x(index).toFixed(1)} ${y(value).toFixed(1)}`;
    if (begins && (values[index + 1] ?? null) === null) text += "h1.5";
  });
  return text;
}

function grid(levels, width, y, format) {
  return levels.map((level) => [
    svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(level), y2: y(level) }),
    svg("text", { x: LEFT - 6, y: y(level) + 4, "text-anchor": "end" }, format(level)),
  ]);
}

function times(points, seconds, x, height) {
  const minutes = Math.round((points * seconds) / 60);
  const every = minutes > 5 ? 2 : 1;
  const marks = [];
  for (let minute = 0; minute <= minutes; minute += every) {
    const text = minute ? `\u2212${minute} min` : "now";
    const at = x(points - 1 - (minute * 60) / seconds);
    if (at < LEFT + 20) break;
    const anchor = minute ? "middle" : "end";
    marks.push(svg("text", { x: at, y: height - 4, "text-anchor": anchor }, text));
  }
  return marks;
}

// Lines over time.
//   options: {title, lines: [{name, values, style, area}], points, seconds, format, axis, width, at}
// `at` is the index under the pointer, or null: the legend then shows the newest values.
export function lines(options) {
  const { lines: all, points, width } = options;
  const most = Math.max(...all.flatMap((line) => line.values.map((value) => value ?? 0)), 0);
  const levels = ticks(most || 1);
  const x = (index) => LEFT + (index / Math.max(points - 1, 1)) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value / levels.at(-1)) * (HEIGHT - TOP - BOTTOM);
  const drawing = svg("svg", { width, height: HEIGHT, role: "img", "aria-label": options.title });
  drawing.append(...grid(levels, width, y, options.axis ?? options.format).flat());
  drawing.append(...times(points, options.seconds, x, HEIGHT));
  for (const line of all) {
    const text = path(line.values, x, y);
    const first = line.values.findIndex((value) => value !== null);
    if (line.area && first >= 0) {
      const closed = `${text}L${x(points - 1)} ${y(0)}L${x(first)} ${y(0)}Z`;
      drawing.append(svg("path", { class: `area ${line.style}`, d: closed }));
    }
    drawing.append(svg("path", { class: line.style, d: text }));
  }
  if (options.at !== null) {
    const at = x(options.at);
    drawing.append(svg("line", { class: "cursor", x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM }));
  }
  drawing.addEventListener("pointermove", (event) => {
    const left = event.clientX - drawing.getBoundingClientRect().left;
    const index = Math.round(((left - LEFT) / (width - LEFT - RIGHT)) * (points - 1));
    options.hover(Math.min(Math.max(index, 0), points - 1));
  });
  drawing.addEventListener("pointerleave", () => options.hover(null));
  return html("div", { class: "panel" }, html("h3", {}, options.title), legend(options), drawing);
}

function legend({ lines: all, at, points, format, seconds, now }) {
  const index = at ?? points - 1;
  const items = all.map((line) =>
    html("span", {}, html("i", { class: line.style }), `${line.name} `,
      html("b", {}, format(line.values[index] ?? null))));
  if (at !== null) {
    const when = new Date(now - (points - 1 - at) * seconds * 1000);
    items.push(html("span", {}, when.toLocaleTimeString()));
  }
  return html("div", { class: "legend" }, items);
}

// Bars over buckets whose bounds grow by factors; only those from the first to the last that
// counted something, and one more on each side.
//   options: {title, note, counts, bounds, format, width, from, to, centered}
export function bars(options) {
  const { title, counts, bounds, format, width, from, to } = options;
  const height = 96, left = 4, right = 4, top = 6, bottom = 18;
  const shown = counts.slice(from, to + 1);
  const most = Math.max(...shown, 1);
  const step = (width - left - right) / shown.length;
  const scale = (height - top - bottom) / most;
  const total = counts.reduce((sum, each) => sum + each, 0);
  const drawing = svg("svg", { width, height, role: "img", "aria-label": title });
  const floor = height - bottom;
  drawing.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: floor, y2: floor }));
  shown.forEach((each, index) => {
    const x = left + index * step, tall = each * scale;
    const name = from + index < bounds.length ? `up to ${format(bounds[from + index])}` : "beyond";
    const text = `${name}: ${each} (${((100 * each) / Math.max(total, 1)).toFixed(1)} %)`;
    if (each) {
      const box = { class: "count", x: x + 1, y: floor - Math.max(tall, 1),
        width: Math.max(step - 2, 1), height: Math.max(tall, 1) };
      drawing.append(svg("rect", box, svg("title", {}, text)));
    }
  });
  drawing.append(...boundTexts(options, left, step, height));
  const head = html("div", { class: "legend" }, html("b", {}, title));
  return html("div", {}, head, html("div", { class: "legend" }, options.note ?? ""), drawing);
}

// As many bounds as there is room for, each below the right edge of its bar, or its middle.
function boundTexts({ bounds, format, from, to, centered, width }, left, step, height) {
  const every = Math.ceil((centered ? 26 : 52) / step);
  const texts = [];
  for (let index = from; index <= to && index < bounds.length; index += 1) {
    if ((index - from) % every !== Math.floor((every - 1) / 2)) continue;
    const x = left + (index - from + (centered ? 0.5 : 1)) * step;
    const place = x > width - 20 ? { x: width, "text-anchor": "end" } : { x, "text-anchor": "middle" };
    texts.push(svg("text", { ...place, y: height - 4 }, format(bounds[index])));
  }
  return texts;
}

// A line without axes for a cell of a table.
export function spark(values, points, style) {
  const width = 90, height = 20;
  const most = Math.max(...values.map((value) => value ?? 0), 1e-9);
  const x = (index) => ((points - values.length + index) / Math.max(points - 1, 1)) * width;
  const y = (value) => height - 2 - (value / most) * (height - 4);
  return svg("svg", { width, height, "aria-hidden": "true" },
    svg("path", { class: style, d: path(values, x, y) }));
}
