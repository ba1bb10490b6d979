// One version closely: plots over the last minutes, and what the last minute's requests spent.

import { html } from "./dom.js";
import { count, milliseconds, shortMilliseconds } from "./format.js";
import { bars, lines } from "./plot.js";

const STYLES = ["v0", "v1", "v2", "v3", "v4", "v5"];
const PHASES = [
  ["total", "Total"], ["queue", "Queue"], ["assembly", "Assembly"],
  ["compute", "Compute"], ["output", "Output"],
];

// The newest `points` values of a column; null before the version was there.
function column(version, name, points) {
  const values = version.history[name].slice(-points);
  return [...Array(points - values.length).fill(null), ...values];
}

function plots(page, version, siblings, width) {
  const { points, seconds, at, hover, now } = page;
  const line = (name, style, title, area) =>
    ({ name: title, values: column(version, name, points), style, area });
  const same = { points, seconds, at, hover, now, width };
  const time = { format: milliseconds, axis: shortMilliseconds };
  const found = [
    lines({ ...same, title: "Requests per second", format: count, lines: [
      line("requests_per_s", "mark", "answered", true), line("errors_per_s", "error", "errors")] }),
    lines({ ...same, ...time, title: "Latency, arrival to answer", lines: [
      line("p99_ms", "high", "p99"), line("p90_ms", "middle", "p90"), line("p50_ms", "low", "p50")] }),
    lines({ ...same, title: "Load", format: count, lines: [
      line("queue_length", "mark", "waiting", true), line("busy", "high", "instances busy")] }),
  ];
  if (siblings.length > 1) {
    const every = siblings.slice(0, STYLES.length);
    const by = (name) => every.map((each, index) =>
      ({ name: `v${each.version}`, values: column(each, name, points), style: STYLES[index] }));
    found.push(
      lines({ ...same, ...time, title: "p99 by version", lines: by("p99_ms") }),
      lines({ ...same, title: "Requests per second by version", format: count,
        lines: by("requests_per_s") }));
  }
  return found;
}

// First and last bucket that any of these counts filled, and one more on each side.
function span(all) {
  const filled = all[0].map((_, index) => all.some((counts) => counts[index] > 0));
  const first = filled.indexOf(true), last = filled.lastIndexOf(true);
  return [Math.max(first - 1, 0), Math.min(last + 1, filled.length - 1)];
}

function phases(version, document, width) {
  const all = PHASES.map(([name]) => version.phases[name]);
  if (!all[0].some((each) => each > 0)) return html("p", { class: "soft" }, "No request was answered.");
  const [from, to] = span(all);
  return html("div", { class: "phases" }, PHASES.map(([name, title]) => {
    const { p50, p99 } = version.latency_ms[name];
    const note = `p50 ${milliseconds(p50)}, p99 ${milliseconds(p99)}`;
    return bars({ title, note, counts: version.phases[name], bounds: document.bounds_ms,
      format: shortMilliseconds, width, from, to });
  }));
}

function batches(version, document, width) {
  if (!version.batch_rows.some((each) => each > 0)) {
    return html("p", { class: "soft" }, "No batch ran.");
  }
  const [, last] = span([version.batch_rows]);
  return bars({ title: "Rows", note: `${count(version.mean_rows)} a batch on average`, counts: version.batch_rows,
    bounds: document.row_bounds, format: count, width, from: 0, to: Math.max(last, 3),
    centered: true });
}

function failures(version) {
  const all = Object.entries(version.failures);
  if (!all.length) return html("p", { class: "soft" }, "None.");
  all.sort((one, other) => other[1] - one[1]);
  return html("table", {}, all.map(([reason, number]) =>
    html("tr", {}, html("td", { class: "left" }, reason.replaceAll("_", " ")),
      html("td", {}, String(number)))));
}

// Columns and their width for the room that there is, as page.css lays panels out.
function room(total, least, gap) {
  const columns = Math.max(Math.floor((total + gap) / (least + gap)), 1);
  return Math.floor((total - gap * (columns - 1)) / columns);
}

export function detail(page, version, siblings, total) {
  const document = page.document;
  const width = room(total, 380, 24);
  const panel = (title, style, ...children) =>
    html("div", { class: `panel ${style}` }, html("h3", {}, title), ...children);
  const share = siblings.length > 1 ? `one of ${siblings.length} versions` : "";
  return [
    html("div", { class: "bar" },
      html("h2", {}, version.model, " ", html("span", { class: "soft" }, `version ${version.version}`)),
      html("span", { class: "soft" }, share)),
    version.reason ? html("p", {}, version.reason) : null,
    html("div", { class: "panels" }, plots(page, version, siblings, width),
      panel("Where the last minute's requests spent their time", "all",
        phases(version, document, room(total, 200, 20))),
      panel("Batches of the last minute", "", batches(version, document, width)),
      panel("Requests of the last minute without a result", "", failures(version))),
  ].filter((each) => each !== null);
}
