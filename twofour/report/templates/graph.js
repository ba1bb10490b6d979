
// The fused graph: moved by dragging, zoomed by wheel, buttons and two fingers, walked by arrows.
(() => {
  const svg = document.getElementById("graph");
  if (!svg) return;
  const figure = svg.parentElement, hint = document.getElementById("hint");
  const whole = {w: svg.viewBox.baseVal.width, h: svg.viewBox.baseVal.height};
  const nodes = [...svg.querySelectorAll(".node")];
  const numberOf = new Map(nodes.map((node, k) => [node, k]));
  const places = nodes.map(node => {
    const at = node.transform.baseVal.getItem(0).matrix, box = node.firstElementChild;
    return {x: at.e, y: at.f, w: box.width.baseVal.value, h: box.height.baseVal.value};
  });
  const rowOf = node => node.dataset.row === undefined ? null : document.getElementById(`layer-${node.dataset.row}`);
  const edges = nodes.map(() => []), before = nodes.map(() => []), after = nodes.map(() => []);
  for (const path of svg.querySelectorAll(".edges path")) {
    const [source, target] = path.dataset.ends.split(" ").map(Number);
    edges[source].push(path);
    edges[target].push(path);
    after[source].push(target);
    before[target].push(source);
  }
  figure.querySelector(".tools").hidden = false;

  // What is seen: a part of the drawing, as wide to high as the window on it.
  let view = {x: 0, y: 0, w: whole.w, h: whole.h};
  const MARGIN = 24, CLOSEST = 2;
  const aspect = () => (svg.clientWidth || 1) / (svg.clientHeight || 1);
  const widest = () => Math.max(whole.w + 2 * MARGIN, (whole.h + 2 * MARGIN) * aspect());
  const scale = () => svg.clientWidth / view.w;
  function show() {
    view.h = view.w / aspect();
    svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.w} ${view.h}`);
    svg.classList.toggle("far", scale() < 0.5);
    svg.classList.toggle("farther", scale() < 0.22);
  }
  function fit() {
    view.w = widest();
    view.h = view.w / aspect();
    view.x = (whole.w - view.w) / 2;
    view.y = (whole.h - view.h) / 2;
    show();
  }
  function zoom(factor, x, y) { // x, y: what stays in place, 0 to 1 of the window
    const width = Math.min(Math.max(view.w / factor, svg.clientWidth / CLOSEST), 1.5 * widest());
    const height = width / aspect();
    view.x += x * (view.w - width);
    view.y += y * (view.h - height);
    view.w = width;
    show();
  }
  function inside(event) {
    const box = svg.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }
  function look(k) { // moves a node into sight
    const at = places[k], edge = 30 / scale();
    const hidden = at.x < view.x + edge || at.y < view.y + edge
      || at.x + at.w > view.x + view.w - edge || at.y + at.h > view.y + view.h - edge;
    if (!hidden) return;
    view.x = at.x + at.w / 2 - view.w / 2;
    view.y = at.y + at.h / 2 - view.h / 2;
    show();
  }

  // What is known of a node stands in its row of the table.
  function tell(node) {
    hint.replaceChildren();
    const title = document.createElement("b"), row = rowOf(node);
    title.textContent = row ? row.querySelector("a").title : node.getAttribute("aria-label");
    hint.append(title);
    if (row) {
      const heads = row.closest("table").tHead.rows[0].cells;
      const small = row.querySelector("small").textContent;
      const facts = [...row.cells].slice(2).map((cell, k) => [heads[k + 2].textContent, cell.textContent.trim()]);
      const lines = [small, ...facts.filter(([, text]) => text && text !== "\u2013").map(([name, text]) =>
        `${name}: ${text.length > 240 ? `${text.slice(0, 240)}\u2026` : text}`)];
      for (const text of lines) {
        const line = document.createElement("div");
        line.textContent = text;
        hint.append(line);
      }
    }
    hint.hidden = false;
    const box = node.firstElementChild.getBoundingClientRect(), frame = figure.getBoundingClientRect();
    const left = Math.min(Math.max(box.left - frame.left, 0), frame.width - hint.offsetWidth);
    const below = box.bottom - frame.top + 6, above = box.top - frame.top - hint.offsetHeight - 6;
    hint.style.left = `${Math.max(left, 0)}px`;
    hint.style.top = `${below + hint.offsetHeight > frame.height && above > 0 ? above : below}px`;
  }
  let near = [];
  function mark(node) {
    near.forEach(each => each.classList.remove("near"));
    near = [];
    hint.hidden = true;
    if (!node) return;
    const k = numberOf.get(node);
    near = [...edges[k], ...[...before[k], ...after[k]].map(other => nodes[other])];
    near.forEach(each => each.classList.add("near"));
    tell(node);
  }
  function toRow(node) {
    const row = rowOf(node), field = document.getElementById("filter");
    if (!row) return;
    leave();
    if (row.hidden) {
      field.value = "";
      field.dispatchEvent(new Event("input"));
    }
    row.scrollIntoView({block: "center"});
    row.querySelector("a").focus({preventScroll: true});
    flash(row);
  }
  function flash(row) {
    document.querySelectorAll("tr.flash").forEach(each => each.classList.remove("flash"));
    row.classList.add("flash");
  }
  for (const link of document.querySelectorAll("[data-node]")) {
    const node = svg.querySelector(`[data-row="${link.dataset.node}"]`);
    if (node) link.addEventListener("click", event => {
      event.preventDefault();
      const k = numberOf.get(node);
      figure.scrollIntoView({block: "center"});
      view.w = Math.min(view.w, svg.clientWidth / 0.9);
      view.x = -1e9;
      view.h = view.w / aspect();
      look(k);
      focus(k);
    });
  }

  // The wheel belongs to the page until somebody has clicked into the drawing.
  const activate = () => figure.classList.add("active");
  function leave() {
    figure.classList.remove("active", "whole");
    document.body.style.overflow = "";
    figure.querySelector("[data-do=whole]").setAttribute("aria-pressed", "false");
    fit();
  }
  svg.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.metaKey && !figure.classList.contains("active") && !figure.classList.contains("whole")) return;
    event.preventDefault();
    mark(null);
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), ...inside(event));
  }, {passive: false});
  const fingers = new Map();
  let moved = 0;
  svg.addEventListener("pointerdown", event => {
    fingers.set(event.pointerId, {x: event.clientX, y: event.clientY});
    moved = 0;
    if (event.pointerType === "mouse") activate();
  });
  svg.addEventListener("pointermove", event => {
    const old = fingers.get(event.pointerId);
    if (!old) return;
    const dx = event.clientX - old.x, dy = event.clientY - old.y;
    moved += Math.abs(dx) + Math.abs(dy);
    if (moved < 5) return;
    if (!svg.hasPointerCapture(event.pointerId)) {
      svg.setPointerCapture(event.pointerId);
      figure.classList.add("moving");
      mark(null);
    }
    const other = [...fingers].find(([id]) => id !== event.pointerId);
    if (other) {
      const apart = (x, y) => Math.hypot(x - other[1].x, y - other[1].y);
      const [x, y] = inside({clientX: (event.clientX + other[1].x) / 2, clientY: (event.clientY + other[1].y) / 2});
      zoom(apart(event.clientX, event.clientY) / Math.max(apart(old.x, old.y), 1), x, y);
      view.x -= dx / 2 / scale();
      view.y -= dy / 2 / scale();
    } else {
      view.x -= dx / scale();
      view.y -= dy / scale();
    }
    show();
    fingers.set(event.pointerId, {x: event.clientX, y: event.clientY});
  });
  const up = event => {
    fingers.delete(event.pointerId);
    figure.classList.remove("moving");
  };
  svg.addEventListener("pointerup", up);
  svg.addEventListener("pointercancel", up);
  document.addEventListener("pointerdown", event => {
    if (!figure.contains(event.target)) figure.classList.remove("active");
  });

  let current = 0;
  function focus(k) {
    nodes[current].tabIndex = -1;
    current = k;
    nodes[k].tabIndex = 0;
    look(k);
    nodes[k].focus({preventScroll: true});
  }
  const nodeOf = target => target.closest ? target.closest(".node") : null;
  svg.addEventListener("pointerover", event => {
    if (event.pointerType === "mouse" && !fingers.size) mark(nodeOf(event.target));
  });
  svg.addEventListener("pointerleave", () => mark(nodeOf(document.activeElement)));
  svg.addEventListener("focusin", event => {
    const node = nodeOf(event.target);
    if (!node || !node.matches(":focus-visible")) return;
    look(numberOf.get(node));
    mark(node);
  });
  svg.addEventListener("focusout", () => mark(null));
  svg.addEventListener("click", event => {
    const node = nodeOf(event.target), quick = moved < 5;
    if (!quick) return;
    const touch = event.pointerType === "touch";
    activate();
    if (node && touch && !node.classList.contains("told")) { // the first tap tells, the second goes
      nodes.forEach(each => each.classList.remove("told"));
      node.classList.add("told");
      mark(node);
    } else if (node) toRow(node);
    else mark(null);
  });
  const nearest = (some, k) => some.toSorted((a, b) =>
    Math.hypot(places[a].x - places[k].x, places[a].y - places[k].y)
    - Math.hypot(places[b].x - places[k].x, places[b].y - places[k].y))[0];
  const beside = (k, sign) => nearest(nodes.map((_, n) => n).filter(n =>
    places[n].y === places[k].y && sign * (places[n].x - places[k].x) > 0), k);
  const KEYS = {
    ArrowDown: k => nearest(after[k], k), ArrowUp: k => nearest(before[k], k),
    ArrowLeft: k => beside(k, -1), ArrowRight: k => beside(k, 1),
    Home: () => 0, End: () => nodes.length - 1,
  };
  figure.addEventListener("keydown", event => {
    const node = nodeOf(event.target);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") leave();
    else if (event.key === "+" || event.key === "=") zoom(1.3, 0.5, 0.5);
    else if (event.key === "-") zoom(1 / 1.3, 0.5, 0.5);
    else if (event.key === "0") fit();
    else if (node && (event.key === "Enter" || event.key === " ")) toRow(node);
    else if (node && KEYS[event.key]) {
      const next = KEYS[event.key](numberOf.get(node));
      if (next !== undefined) focus(next);
    } else return;
    event.preventDefault();
  });
  figure.querySelector(".tools").addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.colour) {
      figure.dataset.colour = button.dataset.colour;
      for (const each of figure.querySelectorAll("[data-colour]")) if (each !== figure)
        each.setAttribute("aria-pressed", String(each === button));
    } else if (button.dataset.do === "fit") fit();
    else if (button.dataset.do === "whole") {
      const on = figure.classList.toggle("whole");
      document.body.style.overflow = on ? "hidden" : "";
      button.setAttribute("aria-pressed", String(on));
      fit();
    } else zoom(button.dataset.do === "in" ? 1.4 : 1 / 1.4, 0.5, 0.5);
  });
  let width = svg.clientWidth;
  fit();
  new ResizeObserver(() => {
    if (svg.clientWidth === width) return;
    const all = view.w >= whole.w;
    width = svg.clientWidth;
    if (all) fit(); else show(); // its height follows; what is seen stays
  }).observe(svg);
  addEventListener("beforeprint", fit);
})();
