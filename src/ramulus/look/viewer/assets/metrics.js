// What there is to draw of metrics: their groups, their points, and the look of each run.
import {category} from "./colour.js";

const DASHES = ["", "6 3", "2 2", "8 3 2 3"];

const MAIN = [
  "reward",
  "pass_rate",
  "mean",
  "length",
  "truncated",
  "entropy",
  "loss",
  "grad_norm",
  "kl_sampler",
  "clip_high",
  "clip_low",
  "reuse_ratio",
  "lr",
];

const TOKENS_AND_TREES = new Set([
  "trees",
  "dropped",
  "draws",
  "wanted",
  "paths",
  "graded",
  "correct",
  "sampled",
  "reused",
  "trajectory",
  "pruned",
  "expert",
  "prefilled",
  "prefix_reused",
  "prefilled_again",
  "rows",
  "trained",
  "updates",
  "packed",
  "flattened",
  "zero_credit",
  "thrown_away",
  "excluded",
  "repeated",
  "engine_sampled",
  "sampled_before",
  "sampled_ahead",
  "trained_policy",
  "trained_expert",
  "idle_tokens",
  "dropped_tokens",
  "eval_sampled",
]);

export function runColour(at) {
  const order = [0, 5, 2, 3, 1, 4, 6, 7];
  return category(order[at % order.length]);
}

export function runDash(at) {
  return DASHES[Math.floor(at / 8) % DASHES.length];
}

// Metric names by group, in the order in which they are drawn: [[group, [name, ...]], ...]
export function metricGroups(series) {
  const names = new Set();
  for (const {rows} of series)
    for (const row of rows) for (const name in row) if (typeof row[name] === "number" && name !== "step") names.add(name);
  const groups = new Map([
    ["Learning", []],
    ["Evaluation", []],
    ["Tokens and trees", []],
    ["Seconds", []],
  ]);
  for (const name of names) {
    const prefix = name.includes("/") ? name.split("/")[0] : "";
    const group =
      prefix === "eval"
        ? "Evaluation"
        : prefix === "seconds"
          ? "Seconds"
          : prefix || (TOKENS_AND_TREES.has(name) ? "Tokens and trees" : "Learning");
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(name);
  }
  const rank = (name) => (MAIN.includes(name) ? MAIN.indexOf(name) : MAIN.length);
  for (const list of groups.values()) list.sort((a, b) => rank(a) - rank(b) || d3.ascending(a, b));
  return [...groups].filter(([, list]) => list.length);
}

// Exponential smoothing that starts without a bias towards 0; gaps stay gaps.
export function smoothed(points, strength) {
  if (!strength) return points;
  let [sum, weight] = [0, 0];
  return points.map(([x, y]) => {
    sum = sum * strength + y * (1 - strength);
    weight = weight * strength + (1 - strength);
    return [x, sum / weight];
  });
}

// What the x axis counts: a number a row, or null.
export function across(rows, axis) {
  if (axis === "step") return rows.map((row) => row.step);
  let sum = 0;
  return rows.map((row) => {
    sum += (axis === "seconds" ? row["seconds/step"] : row.sampled) ?? 0;
    return sum;
  });
}

export function constant(rows, name) {
  const values = rows.map((row) => row[name]).filter((value) => typeof value === "number");
  return values.every((value) => value === values[0]);
}

export function firstOf(series, name) {
  for (const {rows} of series) for (const row of rows) if (typeof row[name] === "number") return row[name];
  return null;
}

export function nearest(line, x) {
  return line?.points.length ? line.points[d3.bisector((point) => point[0]).center(line.points, x)] : null;
}

// The extremes of each pixel column: what a line over more points than pixels shows anyway.
export function thinned(points, width) {
  if (points.length <= 3 * width) return points;
  const size = Math.ceil(points.length / width);
  const kept = [];
  for (let at = 0; at < points.length; at += size) {
    const part = points.slice(at, at + size);
    const [least, most] = [d3.minIndex(part, (point) => point[1]), d3.maxIndex(part, (point) => point[1])];
    kept.push(part[Math.min(least, most)], part[Math.max(least, most)]);
  }
  return kept;
}
