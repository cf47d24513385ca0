"""Style and script of the map in ``scatter_page``. The script touches its own <div> only, which stands before it."""

from __future__ import annotations

STYLE = """
.passl-map { position: relative; display: flex; height: 640px; overflow: hidden; border: 1px solid #d7dbe0;
  font: 14px/1.4 system-ui, sans-serif; color: #24292f; background: #fff; box-sizing: border-box; }
.passl-map * { box-sizing: border-box; }
.passl-map .plot { position: relative; flex: 1; min-width: 0; }
.passl-map canvas { position: absolute; left: 0; top: 0; width: 100%; height: 100%; cursor: grab; touch-action: none; }
.passl-map canvas.dragging { cursor: grabbing; }
.passl-map .side { width: 220px; padding: 12px; overflow: auto; border-left: 1px solid #e6e8eb; background: #fafbfc; }
.passl-map .side > button { margin: 4px 0; padding: 3px 8px; font: inherit; cursor: pointer; }
.passl-map input[type=search] { width: 100%; padding: 5px 8px; font: inherit; border: 1px solid #c9ced4;
  border-radius: 6px; }
.passl-map .note { margin: 6px 0 10px; color: #656d76; font-size: 12px; }
.passl-map label { display: flex; gap: 6px; align-items: center; margin: 4px 0; cursor: pointer; }
.passl-map .legend { margin-top: 8px; }
.passl-map .legend button { display: flex; width: 100%; gap: 8px; align-items: center; padding: 3px 4px; border: 0;
  border-radius: 4px; background: none; font: inherit; color: inherit; text-align: left; cursor: pointer; }
.passl-map .legend button:hover { background: #eceff2; }
.passl-map .legend button[aria-pressed=false] { opacity: .35; text-decoration: line-through; }
.passl-map .legend canvas { position: static; flex: none; width: 16px; height: 16px; cursor: pointer; }
.passl-map .legend .name { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.passl-map .legend .count { color: #656d76; font-size: 12px; }
.passl-map .tip { position: absolute; display: none; max-width: 280px; padding: 6px; border-radius: 6px;
  background: #fff; box-shadow: 0 2px 12px rgba(0, 0, 0, .28); pointer-events: none; font-size: 12px;
  overflow-wrap: anywhere; z-index: 2; }
.passl-map .tip canvas { position: static; display: block; width: 128px; height: 128px; margin-bottom: 4px; }
@media (max-width: 560px) { .passl-map .side { width: 130px; padding: 6px; } }
"""

# Points are drawn in pixels = place * zoom + offset. Everything is redrawn at most once a frame.
SCRIPT = """
(function () {
"use strict";
const root = document.currentScript.previousElementSibling;
const data = JSON.parse(root.querySelector("script").textContent);
const count = data.points.length;
const X = Float64Array.from(data.points, p => p[0]), Y = Float64Array.from(data.points, p => -p[1]);
const kinds = new Map([[-1, data.none]]);
data.classes.forEach(kind => kinds.set(kind.label, kind));
const hidden = new Set();
const haystack = data.names.map((name, i) =>
  (name + "\\n" + (data.labels[i] < 0 ? "" : kinds.get(data.labels[i]).name)).toLowerCase());
// In a mixed order: the last class would cover the others.
const order = Array.from(X.keys());
for (let i = count - 1, seed = 1; i > 0; i--) {
  seed = seed * 16807 % 2147483647;
  const j = seed % (i + 1);
  [order[i], order[j]] = [order[j], order[i]];
}
const CELL = 44;
let tiles = new Map();
let found = null, hover = -1, zoom = 1, left = 0, top = 0, fitted = 1, waiting = false, moved = false;

// --- elements ---
function add(parent, tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  parent.appendChild(element);
  return element;
}
const plot = add(root, "div", "plot"), canvas = add(plot, "canvas"), tip = add(plot, "div", "tip");
const side = add(root, "div", "side"), search = add(side, "input"), note = add(side, "div", "note");
const pen = canvas.getContext("2d");
search.type = "search";
search.placeholder = "search path or class";
let showImages = null;
if (data.sheets.length) {
  const label = add(side, "label");
  showImages = add(label, "input");
  showImages.type = "checkbox";
  label.appendChild(document.createTextNode("thumbnails"));
  showImages.addEventListener("change", draw);
}
const reset = add(side, "button", "", "whole map");
reset.addEventListener("click", () => { fit(); draw(); });
const sheets = data.sheets.map(uri => {
  const image = new Image();
  image.onload = draw;
  image.src = uri;
  return image;
});

function sprite(target, i, x, y, size) {
  const place = data.thumbnails[i], sheet = sheets[Math.floor(place / data.perSheet)];
  if (place < 0 || !sheet.complete) return false;
  const spot = place % data.perSheet;
  target.drawImage(sheet, spot % data.perRow * data.side, Math.floor(spot / data.perRow) * data.side,
    data.side, data.side, x, y, size, size);
  return true;
}

function marker(target, kind, x, y, r) {
  target.beginPath();
  if (kind === "circle") target.arc(x, y, r, 0, 7);
  else if (kind === "square") target.rect(x - r * .89, y - r * .89, r * 1.78, r * 1.78);
  else if (kind === "cross") {
    target.rect(x - r * .4, y - r * 1.2, r * .8, r * 2.4);
    target.rect(x - r * 1.2, y - r * .4, r * 2.4, r * .8);
  } else {
    const corners = kind === "triangle" ? [[0, -1.35], [1.17, .68], [-1.17, .68]]
      : [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]];
    corners.forEach(c => target.lineTo(x + c[0] * r, y + c[1] * r));
    target.closePath();
  }
  target.fill();
}

// --- legend ---
const counts = new Map();
data.labels.forEach(label => counts.set(label, (counts.get(label) || 0) + 1));
const legend = add(side, "div", "legend");
const listed = data.classes.length ? data.classes.concat(counts.has(-1) ? [data.none] : []) : [];
listed.forEach(kind => {
  const button = add(legend, "button"), swatch = add(button, "canvas");
  button.type = "button";
  button.title = kind.name + ": click hides it, double click hides all others";
  button.setAttribute("aria-pressed", "true");
  button.dataset.label = kind.label;
  swatch.width = swatch.height = 32;
  const paint = swatch.getContext("2d");
  paint.fillStyle = kind.colour;
  marker(paint, kind.marker, 16, 16, 11);
  add(button, "span", "name", kind.name);
  add(button, "span", "count", counts.get(kind.label) || 0);
  button.addEventListener("click", () => {
    if (!hidden.delete(kind.label)) hidden.add(kind.label);
    shown();
  });
  button.addEventListener("dblclick", () => {
    const alone = listed.every(other => other === kind || hidden.has(other.label));
    hidden.clear();
    if (!alone) listed.forEach(other => { if (other !== kind) hidden.add(other.label); });
    shown();
  });
});
function shown() {
  legend.querySelectorAll("button").forEach(button =>
    button.setAttribute("aria-pressed", String(!hidden.has(Number(button.dataset.label)))));
  draw();
}

// --- drawing ---
function fit() {
  const width = plot.clientWidth, height = plot.clientHeight;
  let right = -Infinity, low = -Infinity, first = Infinity, high = Infinity;
  for (let i = 0; i < count; i++) {
    first = Math.min(first, X[i]); right = Math.max(right, X[i]);
    high = Math.min(high, Y[i]); low = Math.max(low, Y[i]);
  }
  if (!count) first = right = high = low = 0;
  const room = 0.9;
  zoom = fitted = Math.min(width * room / Math.max(right - first, 1), height * room / Math.max(low - high, 1));
  left = width / 2 - (first + right) / 2 * zoom;
  top = height / 2 - (high + low) / 2 * zoom;
  moved = false;
}
function draw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(paint);
}
function paint() {
  waiting = false;
  const width = plot.clientWidth, height = plot.clientHeight, ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    if (!moved) fit();
  }
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  const images = showImages && showImages.checked;
  const base = Math.min(Math.max(90 / Math.sqrt(count || 1), 2.2), 7);
  const radius = base * Math.min(Math.max(Math.pow(zoom / fitted, .35), .7), 2.5);
  const visible = [], faint = [];
  for (const i of order) {
    if (hidden.has(data.labels[i])) continue;
    (found && !found[i] ? faint : visible).push(i);
  }
  pen.globalAlpha = .12;
  faint.forEach(i => dot(i, radius, width, height));
  pen.globalAlpha = images ? .35 : .85;
  visible.forEach(i => dot(i, radius, width, height));
  pen.globalAlpha = 1;
  tiles = new Map();
  if (images) thumbnails(visible, width, height);
  if (found && !images && visible.length < 200) {
    pen.strokeStyle = "#24292f";
    visible.forEach(i => ring(i, radius + 3));
  }
  if (hover >= 0) { pen.strokeStyle = "#24292f"; pen.lineWidth = 2; ring(hover, radius + 3); pen.lineWidth = 1; }
  canvas.dataset.drawn = visible.length;
  root.dataset.drawn = visible.length;
  note.textContent = (found ? visible.length + " found of " : visible.length === count ? "" : visible.length + " of ")
    + count + (count === 1 ? " image" : " images");
}
function dot(i, radius, width, height) {
  const x = X[i] * zoom + left, y = Y[i] * zoom + top;
  if (x < -20 || y < -20 || x > width + 20 || y > height + 20) return;
  const kind = kinds.get(data.labels[i]);
  pen.fillStyle = kind.colour;
  marker(pen, kind.marker, x, y, radius);
}
function ring(i, radius) {
  pen.beginPath();
  pen.arc(X[i] * zoom + left, Y[i] * zoom + top, radius, 0, 7);
  pen.stroke();
}
// One for each cell of a grid that goes along with the map, so that nothing jumps while it is dragged.
function thumbnails(visible, width, height) {
  const size = CELL - 4;
  visible.forEach(i => {
    if (data.thumbnails[i] < 0) return;
    const x = X[i] * zoom + left, y = Y[i] * zoom + top;
    if (x < -size || y < -size || x > width + size || y > height + size) return;
    const column = Math.floor(X[i] * zoom / CELL), row = Math.floor(Y[i] * zoom / CELL);
    const key = column + "," + row;
    if (tiles.has(key)) return;
    tiles.set(key, i);
    const cellX = column * CELL + left + 2, cellY = row * CELL + top + 2;
    if (data.labels[i] >= 0) {
      pen.fillStyle = kinds.get(data.labels[i]).colour;
      pen.fillRect(cellX - 2, cellY - 2, CELL, CELL);
    }
    sprite(pen, i, cellX, cellY, size);
  });
}

// --- mouse, fingers, keys ---
function nearest(x, y) {
  const tile = tiles.get(Math.floor((x - left) / CELL) + "," + Math.floor((y - top) / CELL));
  if (tile !== undefined) return tile;
  let best = -1, distance = 14 * 14;
  for (let i = 0; i < count; i++) {
    if (hidden.has(data.labels[i]) || (found && !found[i])) continue;
    const dx = X[i] * zoom + left - x, dy = Y[i] * zoom + top - y, d = dx * dx + dy * dy;
    if (d < distance) { distance = d; best = i; }
  }
  return best;
}
function point(x, y) {
  hover = nearest(x, y);
  tip.style.display = hover < 0 ? "none" : "block";
  if (hover >= 0) {
    tip.textContent = "";
    if (data.thumbnails[hover] >= 0) {
      const small = add(tip, "canvas");
      small.width = small.height = 128;
      sprite(small.getContext("2d"), hover, 0, 0, 128);
    }
    add(tip, "div", "path", data.names[hover]);
    if (data.labels[hover] >= 0) add(tip, "b", "class", kinds.get(data.labels[hover]).name);
    const width = plot.clientWidth, height = plot.clientHeight;
    tip.style.left = Math.max(0, x + 16 + tip.offsetWidth > width ? x - 16 - tip.offsetWidth : x + 16) + "px";
    tip.style.top = Math.max(0, Math.min(y + 12, height - tip.offsetHeight - 4)) + "px";
  }
  draw();
}
function scale(factor, x, y) {
  factor = Math.min(Math.max(zoom * factor, fitted / 4), fitted * 2000) / zoom;
  left = x - (x - left) * factor;
  top = y - (y - top) * factor;
  zoom *= factor;
  moved = true;
}
const fingers = new Map();
const place = event => {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};
canvas.addEventListener("pointerdown", event => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, place(event));
  canvas.classList.add("dragging");
});
canvas.addEventListener("pointermove", event => {
  const now = place(event), before = fingers.get(event.pointerId);
  if (!before) return point(now[0], now[1]);
  const others = [...fingers.entries()].filter(entry => entry[0] !== event.pointerId).map(entry => entry[1]);
  if (others.length) {
    const other = others[0], apart = p => Math.max(Math.hypot(p[0] - other[0], p[1] - other[1]), 1);
    scale(apart(now) / apart(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
  } else {
    left += now[0] - before[0];
    top += now[1] - before[1];
    moved = true;
  }
  fingers.set(event.pointerId, now);
  tip.style.display = "none";
  hover = -1;
  draw();
});
["pointerup", "pointercancel"].forEach(kind => canvas.addEventListener(kind, event => {
  const spot = fingers.get(event.pointerId);
  fingers.delete(event.pointerId);
  if (!fingers.size) canvas.classList.remove("dragging");
  if (spot) point(spot[0], spot[1]);
}));
canvas.addEventListener("pointerleave", () => { hover = -1; tip.style.display = "none"; draw(); });
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  scale(Math.exp(-event.deltaY * (event.deltaMode ? .05 : .0015)), ...place(event));
  draw();
}, {passive: false});
canvas.addEventListener("dblclick", () => { fit(); draw(); });
search.addEventListener("input", () => {
  const wanted = search.value.trim().toLowerCase();
  found = wanted ? haystack.map(text => text.includes(wanted)) : null;
  draw();
});

// At once: a frame later the old picture would be seen stretched.
if (window.ResizeObserver) new ResizeObserver(paint).observe(plot);
fit();
paint();
})();
"""
