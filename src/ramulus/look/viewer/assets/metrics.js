// What there is to draw of metrics: their groups and meanings, their points, and the look of each run.
import {category} from "./colour.js";
import {get} from "./data.js";

const DASHES = [undefined, [6, 3], [2, 2], [8, 3, 2, 3]];
const table = new Map(); // name -> {group, text, good, grain, rank}

// To be awaited once before anything is drawn.
export async function loadGlossary() {
  if (!table.size) (await get("/api/glossary")).forEach((one, rank) => table.set(one.name, {...one, rank}));
}

function entry(name) {
  const family = name.includes("@") ? name.split("@")[0] + "@*" : null;
  return table.get(name) ?? table.get(family);
}

// What a metric means, in a sentence or two; "" of one that nobody has explained.
export function meaning(name) {
  return entry(name)?.text ?? "";
}

function rank(name) {
  return entry(name)?.rank ?? table.size;
}

// In a table of evaluations the shares of right answers come first, then lengths and the like.
export function evalRank(name) {
  return rank(name) + (entry(name)?.group === "Evaluation" ? 0 : table.size);
}

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
  const groups = new Map([...table.values()].map((one) => [one.group, []]));
  for (const name of names) {
    const group = entry(name)?.group ?? (name.includes("/") ? name.split("/")[0] : "Learning");
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(name);
  }
  for (const list of groups.values()) list.sort((a, b) => rank(a) - rank(b) || d3.ascending(a, b));
  return [...groups].filter(([, list]) => list.length);
}

// The series that are drawn: runs as they are, or the seeds of a group as one, `rows` of means with `seeds` behind them.
export function withSeeds(series, together) {
  const made = series.map((one, at) => ({...one, at}));
  if (!together) return made;
  const groups = d3.group(made, (one) => one.group ?? one);
  return [...groups.values()].map((seeds, at) => {
    if (seeds.length === 1) return {...seeds[0], at};
    const steps = d3.group(
      seeds.flatMap((one) => one.rows),
      (row) => row.step,
    );
    const whole = [...steps.keys()].filter((step) => steps.get(step).length === seeds.length); // a mean of some seeds is of another thing
    const rows = whole.sort(d3.ascending).map((step) => ({step, ...meanRow(steps.get(step))}));
    const title = `${seeds[0].group}, ${seeds.length} seeds`;
    return {id: seeds[0].id, group: seeds[0].group, title, at, rows, seeds: seeds.map((one) => new Map(one.rows.map((row) => [row.step, row])))};
  });
}

function meanRow(rows) {
  const names = new Set(rows.flatMap((row) => Object.keys(row)));
  const found = {};
  for (const name of names) {
    const values = rows.map((row) => row[name]).filter((value) => typeof value === "number");
    if (values.length && name !== "step") found[name] = d3.mean(values);
  }
  return found;
}

// The points of a metric in a series: {xs, ys, steps}, `smooth` where that is asked for, `low` and `high` of its seeds.
export function lineOf(one, x, name, smooth) {
  const places = one.rows.map((row, at) => at).filter((at) => typeof one.rows[at][name] === "number" && Number.isFinite(one.rows[at][name]));
  const line = {id: one.id, title: one.title, colour: runColour(one.at), dash: runDash(one.at)};
  line.xs = places.map((at) => x[at]);
  line.ys = places.map((at) => one.rows[at][name]);
  line.steps = places.map((at) => one.rows[at].step);
  if (smooth > 0) line.smooth = smoothed(line.ys, smooth);
  if (one.seeds) {
    const values = line.steps.map((step) => one.seeds.map((rows) => rows.get(step)?.[name]).filter((value) => typeof value === "number"));
    const edge = (of) => (smooth > 0 ? smoothed(values.map((some) => of(some)), smooth) : values.map((some) => of(some)));
    Object.assign(line, {low: edge(d3.min), high: edge(d3.max)});
  }
  return line;
}

// Exponential smoothing that starts without a bias towards 0.
function smoothed(values, strength) {
  let [sum, weight] = [0, 0];
  return values.map((value) => {
    sum = sum * strength + value * (1 - strength);
    weight = weight * strength + (1 - strength);
    return sum / weight;
  });
}

// What the x axis counts: a number a row, never less than the row before.
export function across(rows, axis) {
  if (axis === "step") return rows.map((row) => row.step);
  let sum = 0;
  return rows.map((row) => {
    sum += (axis === "seconds" ? row["seconds/step"] : row.sampled) ?? 0;
    return sum;
  });
}

// Whether nothing is to be seen: one value, or values that differ by floating-point noise alone.
export function constant(rows, name) {
  const values = rows.map((row) => row[name]).filter((value) => typeof value === "number");
  return values.length === 0 || d3.max(values) - d3.min(values) <= (entry(name)?.grain ?? 0);
}

export function firstOf(series, name) {
  for (const {rows} of series) for (const row of rows) if (typeof row[name] === "number") return row[name];
  return null;
}
