// Where the seconds and the tokens of a run went: bars to see, tables to read.
import {h, fill, figure, duration, percent, empty, plural} from "./dom.js";
import {get} from "./data.js";
import {category, swatches} from "./colour.js";

const PHASE_NAMES = {
  grow: "sampling",
  grade: "grading",
  score: "scoring",
  credit: "credit",
  pack: "packing",
  update: "update",
  gauges: "gauges",
  write: "writing trees",
  load: "sync",
  ledger: "ledger",
  log: "log",
  save: "checkpoint",
  idle: "idle",
  eval: "evaluation",
};
const TOKEN_NAMES = {
  engine_sampled: "sampled by the engine",
  sampled_before: "of these trees, sampled a step before",
  sampled_ahead: "of the next step's trees, sampled ahead",
  thrown_away: "sampled, in no tree",
  sampled: "sampled, in trees",
  reused: "not sampled again: shared prefixes",
  trajectory: "in all paths, shared ones once a path",
  eval_sampled: "sampled by evaluations",
  trained_policy: "trained",
  idle_tokens: "no credit on any path",
  excluded: "excluded",
  pruned: "pruned",
  dropped_tokens: "in dropped trees",
  expert: "in demonstrations",
  trained_expert: "of those, trained",
  repeated: "trained again, tree cut into rows",
  trained: "trained, all authors",
  zero_credit: "of those, zero credit",
  packed: "in the update's rows",
  flattened: "in those rows, every path alone",
  prefilled: "of prefixes, computed",
  prefilled_again: "of those, computed before and dropped",
  prefix_reused: "of prefixes, reused from memory",
  seconds: "seconds",
  cpu_seconds: "processor seconds",
};
const BARS = [
  ["What became of the sampled tokens", ["trained_policy", "idle_tokens", "excluded", "pruned", "dropped_tokens", "thrown_away"]],
  ["What the paths hold", ["sampled", "reused"]],
  ["Prefixes that the sampler needed", ["prefix_reused", "prefilled"]],
];

export async function costView(host, series) {
  const accounts = await Promise.all(series.map((one) => get("/api/ledger", {run: one.id}, true)));
  const blocks = series.map((one, at) => {
    const told = accounts[at]?.tokens ? accounts[at] : fromRows(one.rows);
    if (!told)
      return h("section", {class: "cost"}, h("h2", {}, one.title), empty("Nothing is known of what this run cost: it has no metrics yet."));
    return h(
      "section",
      {class: "cost"},
      h("h2", {}, one.title, h("span", {class: "soft"}, " " + plural(told.steps, "step") + totals(told))),
      secondsBar(told.seconds),
      BARS.map(([title, names]) => tokenBar(title, names, told.tokens)),
      tables(told),
    );
  });
  fill(host, blocks);
}

function totals(told) {
  const parts = [];
  if (told.seconds?.total) parts.push(duration(told.seconds.total));
  if (told.answers?.correct != null) parts.push(plural(told.answers.correct, "correct path"));
  if (told.per_correct?.sampled != null) parts.push(figure(Math.round(told.per_correct.sampled * 10) / 10) + " tokens sampled for each");
  if (told.machine?.gpu_busy != null) parts.push("GPU busy " + percent(told.machine.gpu_busy));
  return parts.map((part) => " · " + part).join("");
}

// Where no ledger is known, the sums of what the metrics say.
function fromRows(rows) {
  if (!rows.length) return null;
  const sum = (name) => (rows.some((row) => typeof row[name] === "number") ? d3.sum(rows, (row) => row[name]) : null);
  const phases = [...new Set(rows.flatMap((row) => Object.keys(row)))].filter(
    (name) => name.startsWith("seconds/") && name !== "seconds/mean",
  );
  const seconds = Object.fromEntries(phases.map((name) => [name.slice(8), sum(name)]));
  return {steps: rows.length, seconds, tokens: Object.fromEntries(Object.keys(TOKEN_NAMES).map((name) => [name, sum(name)]))};
}

function secondsBar(spent = {}) {
  const parts = Object.entries(spent)
    .filter(([name, value]) => value > 0 && !["step", "total", "mean"].includes(name))
    .sort((a, b) => b[1] - a[1]);
  const [large, small] = [parts.slice(0, 7), parts.slice(7)];
  if (small.length) large.push(["all others", d3.sum(small, (part) => part[1])]);
  return stacked(
    "Seconds",
    large.map(([name, value]) => [PHASE_NAMES[name] ?? name, value]),
    duration,
  );
}

function tokenBar(title, names, tokens = {}) {
  return stacked(
    title,
    names.map((name) => [TOKEN_NAMES[name], tokens[name]]).filter(([, value]) => value > 0),
    figure,
  );
}

function stacked(title, parts, say) {
  const total = d3.sum(parts, (part) => part[1]);
  if (!total) return null;
  const bar = h("div", {
    class: "stack",
    role: "img",
    "aria-label": title + ": " + parts.map(([name, value]) => `${name} ${say(value)}, ${percent(value / total)}`).join("; "),
  });
  parts.forEach(([name, value], at) => {
    const piece = h(
      "span",
      {title: `${name}: ${say(value)}, ${percent(value / total)}`},
      value / total > 0.09 ? percent(value / total) : "",
    );
    piece.style.width = (value / total) * 100 + "%";
    piece.style.background = category(at);
    bar.append(piece);
  });
  return h(
    "div",
    {class: "stacked"},
    h("h3", {}, title, h("span", {class: "soft"}, " " + say(total))),
    bar,
    swatches(parts.map(([name, value], at) => [`${name} ${say(value)}`, category(at)])),
  );
}

function tables(told) {
  const table = (title, record, names, say) => {
    const rows = Object.entries(record ?? {}).filter(([, value]) => value !== null && value !== undefined);
    return rows.length
      ? h(
          "div",
          {},
          h("h3", {}, title),
          h(
            "table",
            {class: "sums"},
            h(
              "tbody",
              {},
              rows.map(([name, value]) =>
                h("tr", {}, h("th", {scope: "row"}, names[name] ?? name.replaceAll("_", " ")), h("td", {class: "right"}, say(value))),
              ),
            ),
          ),
        )
      : null;
  };
  const mean = (value) => figure(Math.round(value * 100) / 100);
  return h(
    "details",
    {class: "group"},
    h("summary", {}, "All sums"),
    h(
      "div",
      {class: "columns"},
      table("Tokens", told.tokens, TOKEN_NAMES, figure),
      table("Seconds", told.seconds, PHASE_NAMES, duration),
      table("Answers", told.answers, {}, figure),
      table("For each correct path", told.per_correct, TOKEN_NAMES, mean),
      table("Ratios", told.ratios, {}, mean),
      table("Machine", told.machine, {}, figure),
    ),
  );
}
