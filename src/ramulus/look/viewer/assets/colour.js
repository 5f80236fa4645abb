// From numbers to colours, for people who see colours differently too: blue and orange, grey to violet, Okabe and Ito's set.
import {h, figure} from "./dom.js";

const CATEGORIES = {
  light: ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f7f00", "#777777"],
  dark: ["#4aa3e0", "#f0b030", "#2bbf92", "#dd92bd", "#9ad4f7", "#ff8548", "#c2b23c", "#a3a7ae"],
};
const DIVERGING = {
  light: ["#b34700", "#e0935c", "#dad7ce", "#62a3cc", "#00558f"],
  dark: ["#ff9a5c", "#b46a40", "#4a4e57", "#3f7fae", "#7cc4ff"],
};
const SEQUENTIAL = {
  light: ["#dedbd3", "#c9a9c0", "#a8629f", "#6c2a7f", "#35104f"],
  dark: ["#3a3d46", "#6b4a86", "#b05aa0", "#ee8a8a", "#ffd9a0"],
};
const AUTHORS = ["prompt", "policy", "expert", "tool"];
const NAMES = {
  value: "Value (mean reward below)",
  advantage: "Advantage (gain and pain)",
  entropy: "Entropy (nats)",
  temperature: "Temperature",
  influence: "Influence",
  ratio: "Ratio to the sampler",
  version: "Policy version",
  author: "Author",
  logprobs: "Log-probability",
  kept: "Log of the mass kept",
};
const FIRST = ["value", "advantage", "entropy", "temperature", "influence", "ratio", "version", "logprobs", "author"];

function isDark() {
  return document.documentElement.dataset.theme === "dark";
}

// One of eight colours; beyond eight they come again.
export function category(at) {
  return CATEGORIES[isDark() ? "dark" : "light"][at % 8];
}

const ramp = (set) => d3.interpolateRgbBasis(set[isDark() ? "dark" : "light"]);
const clamp01 = (t) => Math.max(0, Math.min(1, t));

// Ink that can be read on a colour.
const inks = new Map();
export function inkOn(colour) {
  if (!inks.has(colour)) inks.set(colour, d3.lab(colour).l > 58 ? "#16181d" : "#ffffff");
  return inks.get(colour);
}

// The colourings a tree offers: [key, name], the best known first.
export function colourings(tree) {
  const columns = tree.columns.filter((name) => name !== "gain" && name !== "pain");
  const keys = ["value", "version", "author", ...columns];
  if (tree.columns.includes("gain")) keys.push("advantage");
  const rank = (key) => (FIRST.includes(key) ? FIRST.indexOf(key) : FIRST.length);
  return [...new Set(keys)].sort((a, b) => rank(a) - rank(b) || d3.ascending(a, b)).map((key) => [key, NAMES[key] ?? key]);
}

// How a key colours the nodes of a tree: {key, name, paint(node) -> colour, split(node) -> [upper, lower, share] | null, of(node), token(value), legend()}
export function colouring(tree, key) {
  const name = NAMES[key] ?? key;
  if (key === "version" || key === "author") return byCategory(tree, key, name);
  if (key === "advantage") return byAdvantage(tree, name);
  const of = key === "value" ? (node) => node.value : (node) => node.means?.[key];
  return {key, name, ...byNumber(key, tree.nodes.map(of).filter(Number.isFinite), name), of};
}

const NONE = () => (isDark() ? "#2b2e35" : "#dfdcd4");

function byCategory(tree, key, name) {
  const of = (node) => (key === "version" && node.author === "prompt" ? null : node[key]);
  const groups = key === "author" ? AUTHORS : [...new Set(tree.nodes.map(of))].filter((one) => one != null).sort(d3.ascending);
  const colour = new Map(groups.map((group, at) => [group, category(at)]));
  const present = groups.filter((group) => tree.nodes.some((node) => of(node) === group));
  const paint = (node) => colour.get(of(node)) ?? NONE();
  return {
    key,
    name,
    of,
    paint,
    split: () => null,
    token: null,
    legend: () => swatches(present.map((group) => [String(group), colour.get(group)])),
  };
}

// Gain is what the leaves below would raise the node by, pain what they would lower it by: both, one above the other.
function byAdvantage(tree, name) {
  const gains = tree.nodes.map((node) => node.means?.gain ?? 0);
  const pains = tree.nodes.map((node) => Math.abs(node.means?.pain ?? 0));
  const most = Math.max(1e-12, d3.max(gains), d3.max(pains));
  const scale = (value) => ramp(DIVERGING)(0.5 + 0.5 * clamp01(Math.abs(value) / most) * Math.sign(value));
  const of = (node) => (node.means?.gain === undefined ? null : node.means.gain + (node.means.pain ?? 0));
  const split = (node) => {
    const gain = node.means?.gain ?? 0;
    const pain = -Math.abs(node.means?.pain ?? 0);
    return gain > 0 && pain < 0 ? [scale(gain), scale(pain), gain / (gain - pain)] : null;
  };
  const paint = (node) => (of(node) === null ? NONE() : scale(of(node)));
  return {
    key: "advantage",
    name,
    of,
    paint,
    split,
    token: null,
    legend: () => gradient(ramp(DIVERGING), [figure(-most), "0", "+" + figure(most)], "pain", "gain"),
  };
}

// A scale for the numbers of one column, of nodes or of tokens: {paint, split, token, legend}.
export function byNumber(key, values, name) {
  const scale = numberScale(key, values);
  const token = (value) => (Number.isFinite(value) ? scale.colour(value) : NONE());
  const of = key === "value" ? (node) => node.value : (node) => node.means?.[key];
  const marks = [...scale.marks];
  if (scale.open) marks[2] = "≥\u2009" + marks[2];
  return {paint: (node) => token(of(node)), split: () => null, token, legend: () => gradient(scale.ramp, marks), name};
}

function numberScale(key, values) {
  const sorted = [...values].sort(d3.ascending);
  const low = sorted.length ? d3.quantileSorted(sorted, 0.01) : 0;
  const high = sorted.length ? d3.quantileSorted(sorted, 0.99) : 1;
  if (key === "value") return linear(Math.min(0, sorted[0] ?? 0), Math.max(1, sorted.at(-1) ?? 1), ramp(DIVERGING));
  if (key === "ratio") {
    const reach = Math.max(0.01, ...sorted.filter((ratio) => ratio > 0).map((ratio) => Math.abs(Math.log(ratio))));
    const colours = ramp(DIVERGING);
    const marks = [figure(Math.exp(-reach)), "1", figure(Math.exp(reach))];
    return {colour: (ratio) => colours(clamp01(0.5 + Math.log(ratio) / reach / 2)), ramp: colours, marks};
  }
  if (key.startsWith("credit/") || key === "gain" || key === "pain" || (sorted[0] < 0 && sorted.at(-1) > 0)) {
    const reach = Math.max(1e-9, Math.abs(sorted[0] ?? 0), Math.abs(sorted.at(-1) ?? 0));
    return linear(-reach, reach, ramp(DIVERGING));
  }
  if (high <= 0 && low < 0) return linear(0, low, ramp(SEQUENTIAL)); // a log-probability: the rarer, the stronger
  const from = key === "entropy" || key === "influence" || (low > 0 && low < high / 3) ? 0 : low;
  if (high <= from) return {...linear(from, from + 1, ramp(SEQUENTIAL)), marks: [figure(from)]}; // all alike
  return {...linear(from, high, ramp(SEQUENTIAL)), open: true};
}

function linear(from, to, colours) {
  const colour = (value) => colours(clamp01((value - from) / (to - from)));
  return {colour, ramp: colours, marks: [figure(from), figure((from + to) / 2), figure(to)]};
}

function gradient(colours, marks, left, right) {
  const strip = h("span", {class: "strip", "aria-hidden": "true"});
  strip.style.background =
    "linear-gradient(to right," +
    d3
      .range(0, 1.01, 0.1)
      .map((t) => colours(t))
      .join(",") +
    ")";
  const texts = marks.map((mark) => h("span", {}, mark));
  const words = [left, right].map((word) => word && h("span", {class: "soft"}, word));
  return h(
    "span",
    {class: "legend", role: "img", "aria-label": "Colours from " + marks[0] + " to " + marks.at(-1)},
    words[0],
    h("span", {class: "scale"}, strip, h("span", {class: "marks"}, texts)),
    words[1],
  );
}

export function swatches(pairs) {
  return h(
    "span",
    {class: "legend"},
    pairs.map(([name, colour]) => {
      const square = h("span", {class: "swatch", "aria-hidden": "true"});
      square.style.background = colour;
      return h("span", {class: "key"}, square, name);
    }),
  );
}
