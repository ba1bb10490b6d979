// Asks for the document every two seconds and shows it.

import { detail } from "./detail.js";
import { html, setText } from "./dom.js";
import { bytes, count, duration } from "./format.js";
import { ModelTable } from "./table.js";

const EVERY_MS = 2000;
const FILTER_FROM = 9;
const TOKEN = "twofour-token";
const byId = (id) => document.getElementById(id);
const state = { document: null, histories: new Map(), chosen: null, at: null, answeredAt: 0 };
const table = new ModelTable(byId("models"), choose);
table.changed = render;

function keyOf(model, version) {
  return `${encodeURIComponent(model)}/${encodeURIComponent(version)}`;
}

// Adds new points to those that are there; a server that was started anew begins anew.
function merge(next) {
  if (state.document?.server.began_ms !== next.server.began_ms) state.histories.clear();
  const known = new Map();
  for (const model of next.models) {
    for (const version of model.versions) {
      version.model = model.model;
      version.key = keyOf(model.model, version.version);
      const old = state.histories.get(version.key);
      const { first, ...columns } = version.history;
      if (old && first === old.next) {
        for (const name of Object.keys(columns)) {
          columns[name] = [...old.columns[name], ...columns[name]].slice(-next.points);
        }
      }
      known.set(version.key, { columns, next: next.point + 1 });
      version.history = columns;
    }
  }
  state.histories = known;
  state.document = next;
}

function choose(key) {
  state.chosen = key;
  history.replaceState(null, "", `#${key}`);
  render();
}

// Of versions that nobody wants loaded only the newest of a model that has no other.
function versions() {
  return state.document.models.flatMap(({ versions: all }) => {
    const wanted = all.filter((each) => !each.idle);
    return wanted.length ? wanted : all.slice(-1);
  });
}

// The one that was chosen, or the one with the most requests.
function chosenOf(all) {
  const wanted = state.chosen ?? location.hash.slice(1);
  const found = all.find((each) => each.key === wanted);
  if (found) return found;
  return all.reduce((best, each) =>
    (!best || each.requests_per_s > best.requests_per_s ? each : best), null);
}

function renderSums(server, all) {
  const sum = (name) => all.reduce((total, each) => total + each[name], 0);
  const wanted = all.filter((each) => !each.idle);
  const ready = wanted.filter((each) => each.state === "READY").length;
  const errors = sum("errors_per_s");
  const refused = Object.values(server.refused).reduce((total, each) => total + each, 0);
  const items = [
    ["Requests/s", count(sum("requests_per_s")), ""],
    ["Errors/s", count(errors), errors > 0 ? "bad" : ""],
    ["Waiting", count(sum("queue_length")), ""],
    ["Versions ready", `${ready} of ${wanted.length}`, ready < wanted.length ? "bad" : ""],
    ["Memory of models", bytes(sum("memory_bytes")), ""],
  ];
  if (refused) items.push(["Refused before a model", count(refused), ""]);
  byId("sums").replaceChildren(...items.map(([name, text, style]) =>
    html("div", {}, html("dt", {}, name), html("dd", { class: style }, text))));
}

function renderServer(server) {
  setText(byId("name"), server.name);
  document.title = server.name;
  const [word, style] = server.draining ? ["draining", "wait"]
    : server.ready ? ["ready", "good"] : ["not ready", "bad"];
  setText(byId("state"), word);
  byId("state").className = `state ${style}`;
  const lost = server.dropped_log_lines ? `, ${server.dropped_log_lines} log lines dropped` : "";
  setText(byId("about"), `twofour ${server.version}, up ${duration(server.uptime_s)}${lost}`);
}

function render() {
  if (!state.document) return;
  const all = versions();
  const chosen = chosenOf(all);
  renderServer(state.document.server);
  renderSums(state.document.server, all);
  byId("main").hidden = false;
  byId("empty").hidden = all.length > 0;
  byId("models").hidden = all.length === 0;
  byId("filter").hidden = all.length < FILTER_FROM;
  table.show(all, chosen?.key);
  renderDetail(chosen);
}

function renderDetail(chosen) {
  const place = byId("detail");
  place.hidden = !chosen;
  if (!chosen) return;
  const siblings = versions().filter((each) => each.model === chosen.model && each.instances > 0);
  const page = {
    document: state.document, points: state.document.points, seconds: state.document.step_s,
    at: state.at, now: state.answeredAt, hover,
  };
  place.replaceChildren(...detail(page, chosen, siblings, place.clientWidth));
}

let planned = false;

function hover(at) {
  if (at === state.at || planned) return;
  planned = true;
  requestAnimationFrame(() => {
    planned = false;
    state.at = at;
    renderDetail(chosenOf(versions()));
  });
}

function tell(text) {
  setText(byId("notice"), text);
  byId("notice").hidden = !text;
  document.body.classList.toggle("stale", Boolean(text));
}

async function ask() {
  const since = state.document?.point ?? 0;
  const token = sessionStorage.getItem(TOKEN);
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const signal = AbortSignal.timeout(5000);
  const answer = await fetch(`../v2/status?since=${since}`, { headers, signal, cache: "no-store" });
  byId("access").hidden = answer.status !== 401 && answer.status !== 403;
  if (!byId("access").hidden) return;
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  merge(await answer.json());
  state.answeredAt = Date.now();
  tell("");
  render();
}

async function poll() {
  if (!document.hidden) {
    try {
      await ask();
    } catch (error) {
      const since = state.answeredAt ? new Date(state.answeredAt).toLocaleTimeString() : "";
      tell(`No answer from the server${since && ` since ${since}`} (${error.message}); asking again.`);
    }
  }
  setTimeout(poll, EVERY_MS);
}

byId("filter").addEventListener("input", (event) => {
  table.filter = event.target.value;
  render();
});
byId("access").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, byId("token").value.trim());
  byId("token").value = "";
  ask().catch((error) => tell(error.message));
});
addEventListener("resize", render);
poll();
