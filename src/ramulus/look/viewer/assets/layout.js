// Where a tree's nodes lie: across in tokens, down in lanes, one lane a leaf. Ribbons are as thick as the leaves below.
import {figure} from "./dom.js";

const THICK = 0.74; // of a lane; the rest is the gap between leaves

// Rows in preorder with {parent, start, length, leaves} -> {items, lanes, depth}; an item adds its place and its children.
export function layOut(rows) {
  const items = rows.map((node, row) => ({node, row, parent: null, children: [], from: node.start, to: node.start + node.length}));
  items.forEach((item) => {
    if (item.node.parent < 0) return;
    item.parent = items[item.node.parent];
    item.parent.children.push(item);
  });
  let lanes = 0;
  for (const item of items) {
    if (item.children.length) continue;
    item.weight = Math.max(1, item.node.leavesBelow ?? 1);
    item.top = lanes;
    lanes += item.weight;
    item.bottom = lanes;
  }
  for (let at = items.length - 1; at >= 0; at--) {
    const item = items[at];
    if (!item.children.length) continue;
    item.top = item.children[0].top;
    item.bottom = item.children.at(-1).bottom;
    item.weight = item.bottom - item.top;
  }
  for (const item of items) {
    item.middle = (item.top + item.bottom) / 2;
    item.thick = item.weight * THICK;
    item.enter = item.middle;
    if (item.parent) item.enter = item.parent.middle + (item.middle - item.parent.middle) * THICK;
  }
  return {items, lanes, depth: items.reduce((most, item) => Math.max(most, item.to), 1)};
}

// How far, in px, a ribbon takes to come from its parent's edge to its own lane.
function bendOf(length, shift) {
  return Math.min(length, 10 + Math.min(30, Math.abs(shift) * 0.7));
}

// The middle of a ribbon at x px, on its way into its lane too.
export function middleAt(item, view, x) {
  const [left, right] = [view.x(item.from), view.x(item.to)];
  const [enter, run] = [view.y(item.enter), view.y(item.middle)];
  const t = Math.max(0, Math.min(1, (x - left) / Math.max(1, bendOf(right - left, run - enter))));
  return enter + (run - enter) * t * t * (3 - 2 * t);
}

// The token that a picture begins with: of a long prompt only the end, so that the answers have room.
export function firstToken({items, depth}) {
  const prompt = items[0]?.to ?? 0;
  const whole = prompt <= 60 || prompt <= 0.3 * depth || prompt >= depth;
  return whole ? 0 : Math.max(0, Math.round(prompt - 0.3 * (depth - prompt)));
}

// Trace the part of a ribbon between two shares of its thickness (0 is its upper edge, 1 its lower one).
export function traceRibbon(context, item, view, above = 0, below = 1) {
  const thick = Math.max(item.thick * view.ky, 0.9);
  const left = Math.round(view.x(item.from)); // whole pixels: no seams between a node and the next
  const right = Math.max(Math.round(view.x(item.to)), left + (item.node.length ? 1 : 5));
  const enter = view.y(item.enter) - thick / 2;
  const run = view.y(item.middle) - thick / 2;
  const bend = bendOf(right - left, run - enter);
  const [a, b] = [thick * above, thick * below];
  context.beginPath();
  context.moveTo(left, enter + a);
  if (Math.abs(run - enter) > 0.3) context.bezierCurveTo(left + bend / 2, enter + a, left + bend / 2, run + a, left + bend, run + a);
  context.lineTo(right, run + a);
  context.lineTo(right, run + b);
  context.lineTo(left + bend, run + b);
  if (Math.abs(run - enter) > 0.3) context.bezierCurveTo(left + bend / 2, run + b, left + bend / 2, enter + b, left, enter + b);
  else context.lineTo(left, enter + b);
  context.closePath();
}

// The item at a token and a lane, or null: down from the root, as the lanes of children do not overlap.
export function itemAt(layout, token, lane) {
  let item = layout.items[0];
  if (!item || token < item.from || lane < 0 || lane > layout.lanes) return null;
  while (item) {
    if (token < item.to || !item.children.length) return token <= item.to + 1e-9 || !item.children.length ? item : null;
    item = item.children.find((child) => lane >= child.top && lane < child.bottom) ?? null;
  }
  return null;
}

// What became of a path: right or wrong where a reward called it so, scored where rewards gave a number alone.
export function outcome(node) {
  if (node.finish === "pruned") return "pruned";
  if (node.reward === null || node.reward === undefined) return node.finish ? "ungraded" : "alive";
  const told = verdictOf(node).correct;
  if (told === undefined || told === null) return "scored";
  return Number(told) > 0 ? "right" : "wrong";
}

// Its sign; the reward of a path that is scored.
export function signOf(node) {
  const became = outcome(node);
  return became === "scored" ? figure(node.reward) : MARKS[became];
}

// The sign with a word for it.
export function saidOf(node) {
  const became = outcome(node);
  return became === "scored" ? `reward ${figure(node.reward)}` : `${MARKS[became]} ${became}`;
}

export function verdictOf(node) {
  return node.verdict && typeof node.verdict === "object" ? node.verdict : {};
}

const MARKS = {right: "✓", wrong: "✗", pruned: "✂", ungraded: "○", alive: "…"};

// The small picture of a tree, from a skeleton of [parent row, start, length, leaves, value].
export function drawSmall(canvas, skeleton, colourOf) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  const layout = layOut(skeleton.map(([parent, start, length, leaves, value]) => ({parent, start, length, leavesBelow: leaves, value})));
  const ky = Math.min(9, (height - 8) / Math.max(1, layout.lanes));
  const first = firstToken(layout);
  const kx = (width - 8) / (layout.depth - first);
  const shift = (height - ky * layout.lanes) / 2;
  const view = {ky, x: (token) => Math.max(0, 4 + (token - first) * kx), y: (lane) => shift + lane * ky};
  for (const item of layout.items) {
    traceRibbon(context, item, view);
    context.fillStyle = colourOf(item.node.value);
    context.fill();
  }
}
