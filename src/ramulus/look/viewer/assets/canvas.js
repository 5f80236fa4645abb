// The tree on a canvas: pan, zoom, hover, and more detail the closer one looks.
import {h} from "./dom.js";
import {layOut, firstToken, itemAt} from "./layout.js";
import {MARGIN, view, paint} from "./paint.js";

// `heard`: {choose(row), hover(row, event), detail(row) -> {pieces, columns} | null}
export function treeCanvas(host, heard) {
  const canvas = h("canvas", {tabindex: "0", role: "application", "aria-roledescription": "tree picture"});
  host.append(canvas);
  const state = {
    canvas,
    context: canvas.getContext("2d"),
    heard,
    layout: null,
    colours: null,
    chosen: -1,
    hovered: -1,
    hits: new Set(),
    kx: 1,
    ky: 1,
    tx: 0,
    ty: 0,
    width: 0,
    height: 0,
    waiting: false,
    fitted: true,
  };
  const observer = new ResizeObserver(() => resize(state));
  observer.observe(host);
  listen(state);
  return {
    canvas,
    state,
    show: (tree, colours) => {
      state.tree = tree;
      state.layout = layOut(tree.nodes);
      state.colours = colours;
      fit(state);
    },
    colour: (colours) => {
      state.colours = colours;
      draw(state);
    },
    choose: (row, reveal = true) => {
      state.chosen = row;
      if (reveal) bringIn(state, row);
      draw(state);
    },
    mark: (rows) => {
      state.hits = new Set(rows);
      draw(state);
    },
    fit: () => fit(state),
    zoom: (factor) => zoom(state, factor, state.width / 2, state.height / 2),
    pan: (x, y) => {
      moveBy(state, x, y);
    },
    zoomTo: (row) => zoomTo(state, row),
    redraw: () => draw(state),
    close: () => observer.disconnect(),
  };
}

function resize(state) {
  const box = state.canvas.parentElement.getBoundingClientRect();
  if (!box.width || !box.height) return;
  const ratio = window.devicePixelRatio || 1;
  [state.width, state.height] = [box.width, box.height];
  state.canvas.width = Math.round(box.width * ratio);
  state.canvas.height = Math.round(box.height * ratio);
  if (state.layout && state.fitted) fit(state);
  else paint(state);
}

function scales(state) {
  const across = Math.max(50, state.width - MARGIN.left - MARGIN.right);
  const down = Math.max(50, state.height - MARGIN.top - MARGIN.bottom);
  return [across / (state.layout.depth - firstToken(state.layout)), Math.min(44, down / state.layout.lanes)];
}

function fit(state) {
  if (!state.layout || !state.width) return;
  [state.kx, state.ky] = scales(state);
  state.tx = MARGIN.left - firstToken(state.layout) * state.kx;
  state.ty = MARGIN.top + Math.max(0, (state.height - MARGIN.top - MARGIN.bottom - state.ky * state.layout.lanes) / 2);
  state.fitted = true;
  draw(state);
}

function zoom(state, factor, atX, atY, way = "both") {
  const [kx, ky] = scales(state);
  const oldX = state.kx;
  const oldY = state.ky;
  if (way !== "down")
    state.kx = Math.max(Math.min(kx, state.width / state.layout.depth) * 0.6, Math.min(Math.max(60, kx), state.kx * factor));
  if (way !== "across") state.ky = Math.max(ky * 0.6, Math.min(Math.max(64, ky), state.ky * factor));
  state.tx = atX - (atX - state.tx) * (state.kx / oldX);
  state.ty = atY - (atY - state.ty) * (state.ky / oldY);
  state.fitted = false;
  keepInside(state);
  draw(state);
}

function moveBy(state, x, y) {
  state.tx += x;
  state.ty += y;
  state.fitted = false;
  keepInside(state);
  draw(state);
}

// At least a corner of the tree stays in sight.
function keepInside(state) {
  const [right, bottom] = [state.layout.depth * state.kx, state.layout.lanes * state.ky];
  state.tx = Math.min(state.width - 80, Math.max(80 - right, state.tx));
  state.ty = Math.min(state.height - 60, Math.max(60 - bottom, state.ty));
}

// Zoom so that a node and all below it fill the picture.
function zoomTo(state, row) {
  const item = state.layout.items[row];
  if (!item) return;
  let last = item.to;
  for (let at = row; at < state.layout.items.length && state.layout.items[at].top < item.bottom; at++)
    last = Math.max(last, state.layout.items[at].to);
  const [kx, ky] = scales(state);
  state.kx = Math.min(Math.max(60, kx), (kx * (state.layout.depth - firstToken(state.layout))) / Math.max(4, last - item.from));
  state.ky = Math.min(Math.max(44, ky), (ky * state.layout.lanes) / (item.bottom - item.top));
  state.tx = MARGIN.left - item.from * state.kx;
  state.ty = MARGIN.top + (state.height - MARGIN.top - MARGIN.bottom) / 2 - item.middle * state.ky;
  state.fitted = false;
  draw(state);
}

function bringIn(state, row) {
  const item = state.layout?.items[row];
  if (!item || !state.width) return;
  const {x, y} = view(state);
  const [left, right, middle] = [x(item.from), x(item.to), y(item.middle)];
  if (right < 40 || left > state.width - 60) state.tx += state.width / 3 - left;
  if (middle < MARGIN.top - 6 || middle > state.height - 4) state.ty += state.height / 2 - middle;
}

function listen(state) {
  const {canvas, heard} = state;
  let held = null;
  const at = (event) => {
    const row = itemAt(state.layout, (event.offsetX - state.tx) / state.kx, (event.offsetY - state.ty) / state.ky)?.row ?? -1;
    return state.layout ? row : -1;
  };
  canvas.addEventListener("pointerdown", (event) => {
    held = {x: event.clientX, y: event.clientY, moved: false};
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!state.layout) return;
    if (held) {
      const [x, y] = [event.clientX - held.x, event.clientY - held.y];
      if (!held.moved && Math.hypot(x, y) < 4) return;
      heard.hover(-1, event);
      moveBy(state, held.moved ? x : 0, held.moved ? y : 0);
      held = {x: event.clientX, y: event.clientY, moved: true};
      return;
    }
    const row = at(event);
    if (row !== state.hovered) {
      state.hovered = row;
      draw(state);
    }
    heard.hover(row, event);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (held && !held.moved && state.layout && at(event) >= 0) heard.choose(at(event));
    held = null;
  });
  canvas.addEventListener("pointercancel", () => {
    held = null;
  });
  canvas.addEventListener("pointerleave", (event) => {
    state.hovered = -1;
    heard.hover(-1, event);
    draw(state);
  });
  canvas.addEventListener("dblclick", (event) => {
    if (state.layout && at(event) >= 0) zoomTo(state, at(event));
  });
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      if (!state.layout) return;
      const turned = event.deltaY || event.deltaX;
      const factor = Math.exp(-turned * (event.deltaMode === 1 ? 0.05 : 0.0018) * (event.ctrlKey ? 3 : 1));
      zoom(state, factor, event.offsetX, event.offsetY, event.shiftKey ? "down" : event.altKey ? "across" : "both");
    },
    {passive: false},
  );
}

function draw(state) {
  if (state.waiting) return;
  state.waiting = true;
  requestAnimationFrame(() => {
    state.waiting = false;
    paint(state);
  });
}
