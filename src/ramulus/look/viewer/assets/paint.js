// One frame of the tree picture: grid, ribbons, and the closer one looks, texts and tokens.
import {oneLine} from "./dom.js";
import {inkOn} from "./colour.js";
import {traceRibbon, middleAt, outcome, signOf, verdictOf} from "./layout.js";

export const MARGIN = {top: 26, right: 96, bottom: 10, left: 10};
const MONO = "ui-monospace, 'SF Mono', 'Cascadia Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace";
const TOKEN_WIDTH = 5; // px a token needs before its own colour is worth drawing
const TOKENS_DRAWN_IN = 60; // nodes at once at most

export function view(state) {
  return {ky: state.ky, x: (token) => token * state.kx + state.tx, y: (lane) => lane * state.ky + state.ty};
}

export function paint(state) {
  if (!state.layout || !state.width) return;
  const {context} = state;
  const ratio = window.devicePixelRatio || 1;
  const style = getComputedStyle(document.documentElement);
  const ink = Object.fromEntries(
    ["soft", "line", "accent", "right", "wrong", "panel", "find", "bg"].map((name) => [name, style.getPropertyValue("--" + name).trim()]),
  );
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, state.width, state.height);
  const here = view(state);
  const ticks = ticksOf(state);
  paintGrid(state, here, ticks, ink);
  const seen = inSight(state, here);
  const path = new Set();
  for (let item = state.layout.items[state.chosen]; item; item = item.parent) path.add(item);
  const close = state.kx >= TOKEN_WIDTH && seen.length <= TOKENS_DRAWN_IN;
  seen.forEach((item) => paintNode(state, here, item, close));
  if (state.kx > 1.5) seen.forEach((item) => paintSeam(state, here, item, ink));
  seen.forEach((item) => paintOutline(state, here, item, path, ink));
  if (state.ky >= 9 || seen.length < 150)
    seen.forEach((item) => {
      if (!item.children.length) paintEnd(state, here, item, ink);
    });
  paintAxis(state, here, ticks, ink);
}

function inSight(state, here) {
  return state.layout.items.filter((item) => {
    const left = here.x(item.from);
    const above = Math.min(here.y(item.top), here.y(item.enter - item.thick / 2));
    const below = Math.max(here.y(item.bottom), here.y(item.enter + item.thick / 2));
    return left < state.width && here.x(item.to) > -8 && below > 0 && above < state.height;
  });
}

function ticksOf(state) {
  const from = Math.max(0, -state.tx / state.kx);
  const to = Math.min(state.layout.depth, (state.width - state.tx) / state.kx);
  return d3.ticks(from, to, Math.max(2, state.width / 110)).filter(Number.isInteger);
}

function paintGrid(state, here, ticks, ink) {
  state.context.fillStyle = ink.line;
  for (const tick of ticks) state.context.fillRect(Math.round(here.x(tick)), 20, 1, state.height);
}

function paintAxis(state, here, ticks, ink) {
  const {context} = state;
  context.fillStyle = ink.bg;
  context.globalAlpha = 0.85;
  context.fillRect(0, 0, state.width, 19);
  context.globalAlpha = 1;
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "alphabetic";
  context.textAlign = "center";
  context.fillStyle = ink.soft;
  for (const tick of ticks)
    context.fillText(tick === 0 ? "token 0" : d3.format(",d")(tick).replace(",", "\u2009"), Math.max(here.x(tick), 26), 13);
  context.textAlign = "left";
}

function paintNode(state, here, item, close) {
  const {context, colours} = state;
  context.globalAlpha = item.node.finish === "pruned" ? 0.7 : 1;
  const halves = colours.split(item.node);
  const detail = close && item.node.length > 0 && item.thick * state.ky >= 5 ? state.heard.detail(item.row) : null;
  if (halves) {
    for (const [colour, above, below] of [
      [halves[0], 0, halves[2]],
      [halves[1], halves[2], 1],
    ]) {
      traceRibbon(context, item, here, above, below);
      context.fillStyle = colour;
      context.fill();
    }
  } else {
    traceRibbon(context, item, here);
    context.fillStyle = colours.paint(item.node);
    context.fill();
    if (detail && colours.token && detail.columns[colours.key]) paintTokens(state, here, item, detail);
  }
  context.globalAlpha = 1;
  if (item.thick * state.ky >= 11) paintText(state, here, item, detail, halves);
}

// One stripe a token, inside the ribbon that is still the current path.
function paintTokens(state, here, item, detail) {
  const {context, colours} = state;
  const values = detail.columns[colours.key];
  context.save();
  context.clip();
  const first = Math.max(0, Math.floor(-state.tx / state.kx - item.from));
  const last = Math.min(values.length, Math.ceil((state.width - state.tx) / state.kx - item.from));
  const [top, bottom] = [
    Math.min(here.y(item.top), here.y(item.enter - item.thick)),
    Math.max(here.y(item.bottom), here.y(item.enter + item.thick)),
  ];
  for (let token = first; token < last; token++) {
    context.fillStyle = colours.token(values[token]);
    context.fillRect(here.x(item.from + token), top, state.kx + 0.5, bottom - top);
  }
  context.restore();
}

function paintText(state, here, item, detail, halves) {
  const {context, colours} = state;
  const left = Math.max(here.x(item.from), 0);
  const right = Math.min(here.x(item.to), state.width);
  const offset = Math.abs(item.middle - item.enter) * state.ky;
  const start = Math.max(left, here.x(item.from) + (offset > 2 ? 12 + Math.min(26, offset * 0.5) : 4));
  if (right - start < 16) return;
  const y = here.y(item.middle);
  const fill = halves ? halves[halves[2] > 0.5 ? 0 : 1] : colours.paint(item.node);
  context.font = "11px " + MONO;
  context.textBaseline = "middle";
  context.fillStyle = inkOn(fill);
  const wide = 6.65; // px of a character of this font
  const each = detail ? item.node.text.length / Math.max(1, item.node.length) : Infinity;
  if (detail && state.kx >= wide * Math.max(1, each) * 1.15) {
    paintPieces(state, here, item, detail, halves, wide);
    return;
  }
  const hidden =
    left - here.x(item.from) > 0
      ? Math.floor(((left - here.x(item.from)) / state.kx) * (item.node.text.length / Math.max(1, item.node.length)))
      : 0;
  const room = Math.floor((right - start - 4) / wide);
  if (room < 2) return;
  const text = oneLine(item.node.text.slice(hidden, hidden + room * 2), room);
  if (detail && colours.token && detail.columns[colours.key]) {
    // stripes of any colour lie below
    context.strokeStyle = fill;
    context.lineWidth = 3;
    context.lineJoin = "round";
    context.strokeText(text, start, y);
  }
  context.fillText(text, start, y);
}

// Each token's text at its own place.
function paintPieces(state, here, item, detail, halves, wide) {
  const {context, colours} = state;
  const values = colours.token && !halves ? detail.columns[colours.key] : null;
  const most = Math.max(1, Math.floor(state.kx / wide));
  detail.pieces.forEach((piece, at) => {
    const x = here.x(item.from + at);
    if (x < -state.kx || x > state.width) return;
    if (values) context.fillStyle = inkOn(colours.token(values[at]));
    context.fillText(oneLine(piece, most), x + 2, middleAt(item, here, x + 2));
  });
}

// Where one segment ends and its only continuation starts.
function paintSeam(state, here, item, ink) {
  if (!item.parent || item.parent.children.length > 1 || item.thick * state.ky < 5) return;
  const {context} = state;
  const half = (item.thick * state.ky) / 2;
  context.fillStyle = ink.panel;
  context.globalAlpha = 0.55;
  context.fillRect(Math.round(here.x(item.from)), here.y(item.middle) - half, 1, half * 2);
  context.globalAlpha = 1;
}

function paintOutline(state, here, item, path, ink) {
  const {context} = state;
  const hit = state.hits.has(item.row);
  if (!hit && !path.has(item) && item.row !== state.hovered) return;
  traceRibbon(context, item, here);
  context.strokeStyle = hit ? ink.find : ink.accent;
  context.lineWidth = item.row === state.chosen ? 3 : hit ? 2 : 1.25;
  context.stroke();
  if (item.row !== state.chosen) return;
  context.strokeStyle = ink.panel;
  context.lineWidth = 1;
  context.stroke();
}

// What became of a path, where it ends: a sign and, with room, the answer that was read from it.
function paintEnd(state, here, item, ink) {
  const {context} = state;
  const x = Math.max(here.x(item.to), here.x(item.from) + 5) + 5;
  const y = here.y(item.middle);
  const became = outcome(item.node);
  context.fillStyle = became === "right" ? ink.right : became === "wrong" ? ink.wrong : ink.soft;
  if (state.ky < 9) {
    context.fillRect(x - 4, y - Math.max(0.5, (item.thick * state.ky) / 2), 3, Math.max(1, item.thick * state.ky));
    return;
  }
  context.font = "600 12px system-ui, sans-serif";
  context.textBaseline = "middle";
  const sign = signOf(item.node);
  context.fillText(sign, x, y);
  const answer = verdictOf(item.node).answer;
  const word = answer === undefined || answer === null ? (became === "pruned" ? "pruned" : "") : String(answer);
  const room = Math.max(14, context.measureText(sign).width + 6);
  context.fillStyle = ink.soft;
  context.font = "11px system-ui, sans-serif";
  if (word) context.fillText(oneLine(word, 14), x + room, y);
}
