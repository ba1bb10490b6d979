// The table of all versions: rows stay the same elements while their cells change.

import { html, setText } from "./dom.js";
import { bytes, count, milliseconds, NONE, percent } from "./format.js";
import { spark } from "./plot.js";

const STATES = { READY: "good", LOADING: "wait", UNLOADING: "wait", UNAVAILABLE: "bad" };
const SPARK_POINTS = 60;

// Head, class, value to sort by, text.
const COLUMNS = [
  ["Model", "left name", (row) => row.model, null],
  ["Version", "", (row) => Number(row.version) || row.version, (row) => row.version],
  ["State", "left wide", (row) => row.state, null],
  ["Traffic", "medium", (row) => row.share, null],
  ["Req/s", "", (row) => row.requests_per_s, (row) => count(row.requests_per_s)],
  ["2 min", "wide", null, null],
  ["Errors/s", "wide", (row) => row.errors_per_s, (row) => count(row.errors_per_s)],
  ["p50", "wide", (row) => row.latency_ms.total.p50, (row) => milliseconds(row.latency_ms.total.p50)],
  ["p99", "", (row) => row.latency_ms.total.p99, (row) => milliseconds(row.latency_ms.total.p99)],
  ["Waiting", "wide", (row) => row.queue_length, (row) => count(row.queue_length)],
  ["Busy", "medium", (row) => row.busy, (row) => `${row.busy}/${row.instances}`],
  ["Memory", "medium", (row) => row.memory_bytes, (row) => bytes(row.memory_bytes)],
];

export class ModelTable {
  constructor(table, choose) {
    this.head = table.tHead;
    this.body = table.tBodies[0];
    this.choose = choose;
    this.rows = new Map();
    this.order = { column: 0, down: false };
    this.filter = "";
    this.head.append(html("tr", {}, COLUMNS.map((column, index) => this.#head(column, index))));
  }

  show(versions, chosen) {
    const words = this.filter.toLowerCase();
    const shown = versions.filter((row) => row.model.toLowerCase().includes(words));
    shown.sort(this.#compare());
    const elements = shown.map((row) => this.#row(row, row.key === chosen));
    const old = [...this.body.children];
    if (old.length !== elements.length || old.some((each, at) => each !== elements[at])) {
      this.body.replaceChildren(...elements);
    }
    const keys = new Set(versions.map((row) => row.key));
    for (const key of this.rows.keys()) if (!keys.has(key)) this.rows.delete(key);
  }

  #head([name, style, value], index) {
    if (!value) return html("th", { class: style, scope: "col" }, name);
    const order = () => {
      const same = this.order.column === index;
      this.order = { column: index, down: same ? !this.order.down : index > 3 };
      this.changed();
    };
    const head = html("th", { class: style, scope: "col" },
      html("button", { type: "button", onclick: order }, name));
    return head;
  }

  #compare() {
    const { column, down } = this.order;
    [...this.head.rows[0].cells].forEach((cell, index) => {
      if (index === column) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    const value = COLUMNS[column][2];
    const sign = down ? -1 : 1;
    return (one, other) => {
      const a = value(one) ?? -1, b = value(other) ?? -1;
      if (a !== b && column) return a < b ? -sign : sign;
      const name = one.model.localeCompare(other.model) * (column ? 1 : sign);
      return name || Number(other.version) - Number(one.version);
    };
  }

  #row(row, chosen) {
    let known = this.rows.get(row.key);
    if (!known) this.rows.set(row.key, (known = this.#newRow(row)));
    known.element.className = `${chosen ? "chosen" : ""} ${row.state === "READY" ? "" : "down"}`;
    setText(known.name, row.model);
    setText(known.why, row.idle ? "" : row.reason);
    known.why.hidden = row.idle || !row.reason;
    setText(known.state, row.idle ? "not loaded" : row.state.toLowerCase());
    known.state.className = `state ${row.idle ? "" : STATES[row.state] ?? ""}`;
    known.dot.className = `${known.state.className} narrow`;
    known.shareBar.style.width = `${row.share * 100}%`;
    setText(known.share, row.state === "READY" ? percent(row.share) : NONE);
    known.shareBar.parentElement.hidden = row.state !== "READY";
    COLUMNS.forEach(([, , , text], index) => text && setText(known.cells[index], text(row)));
    known.cells[6].classList.toggle("bad", row.errors_per_s > 0);
    const recent = row.history.requests_per_s.slice(-SPARK_POINTS);
    known.cells[5].replaceChildren(spark(recent, SPARK_POINTS, "mark"));
    return known.element;
  }

  #newRow(row) {
    const cells = COLUMNS.map(([, style]) => html("td", { class: style }));
    const name = html("button", { type: "button" });
    const why = html("span", { class: "why" });
    const state = html("span"), share = html("span"), shareBar = html("i");
    const dot = html("span");  // on small screens, which have no column for it
    cells[0].append(dot, name, why);
    cells[2].append(state);
    cells[3].append(html("span", { class: "share" }, shareBar), share);
    const element = html("tr", { onclick: () => this.choose(row.key) }, cells);
    return { element, cells, dot, name, why, state, share, shareBar };
  }
}
