// The table of all runs: sorted, filtered, some of them hidden, the seeds of a sweep in one row that unfolds.
import {h, fill, toggle, empty, figure, duration, debounce, remember, plural, say} from "./dom.js";
import {amend, go, hashOf} from "./route.js";
import {meaning} from "./metrics.js";

const mean = (of) => (runs) => d3.mean(runs.map(of).filter((value) => typeof value === "number")) ?? null;
const one = (of) => (runs) => (new Set(runs.map(of)).size === 1 ? of(runs[0]) : null);
const STATUS = {live: "live", done: "done", stopped: "stopped", trees: "trees only", trouble: "cannot be read"};

// [key, head, value of some runs, text of that value, class, explanation]
const COLUMNS = [
  ["title", "Run", (runs) => (runs.length > 1 ? runs[0].group : runs[0].title), String, ""],
  ["recipe", "Recipe", one((run) => run.recipe ?? null), (value) => value ?? "–", "wide"],
  ["model", "Model", one((run) => run.model ?? null), (value) => value ?? "–", "wide"],
  ["status", "Status", one((run) => run.status), (value) => STATUS[value] ?? "mixed", "", "Live: a row of metrics came lately. Stopped: none did, and steps are left; go on with --resume."],
  ["step", "Steps", mean((run) => run.step), figure, "right", "Steps done, and how many there are to be."],
  ["reward", "Reward", mean((run) => run.reward), (value) => (value === null ? "–" : value.toFixed(3)), "right", "Of the last step."],
  ["started", "Started", (runs) => d3.min(runs, (run) => run.started) ?? null, (value) => (value === null ? "–" : when(value)), "right wide"],
  ["seconds", "Duration", mean((run) => run.seconds), duration, "right wide", "Seconds of all steps so far with their evaluations; of several seeds, the mean."],
];

function when(seconds) {
  const date = new Date(seconds * 1000);
  const two = (value) => String(value).padStart(2, "0");
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${two(date.getHours())}:${two(date.getMinutes())}`;
}

function hiddenRuns() {
  return new Set(JSON.parse(remember("hidden") ?? "[]"));
}

export function runsPage(main, route, runs) {
  const page = {main, route, runs, ticked: new Set(), open: new Set((route.options.open ?? "").split(",").filter(Boolean)), hidden: hiddenRuns()};
  page.tools = h("div", {class: "tools"});
  page.table = h("div", {class: "scroll"});
  fill(main, h("div", {class: "page runs-page"}, page.tools, page.table));
  drawTools(page);
  drawTable(page);
  return {
    tick: (fresh) => {
      if (JSON.stringify(fresh) === JSON.stringify(page.runs)) return;
      page.runs = fresh;
      drawTable(page);
    },
    keys: {},
  };
}

function drawTools(page) {
  const {options} = page.route;
  page.count = h("span", {class: "soft"});
  page.compare = h("button", {type: "button", onclick: () => compare(page)}, "Compare the ticked");
  page.hide = h("button", {type: "button", onclick: () => hide(page)}, "Hide the ticked");
  page.all = toggle("Hidden ones too", options.hidden === "1", (on) => change(page, {hidden: on ? "1" : null}), "Show the runs that you have hidden");
  const filter = h("input", {
    type: "search",
    id: "runs-filter",
    placeholder: "name, recipe, model, status",
    value: options.text ?? "",
    oninput: debounce((event) => change(page, {text: event.target.value || null}), 120),
  });
  fill(page.tools, h("h1", {}, "Runs"), page.count, h("span", {class: "room"}), h("label", {class: "field"}, h("span", {}, "Filter"), filter), page.all, page.compare, page.hide);
}

function change(page, options) {
  Object.assign(page.route.options, options);
  amend(page.route);
  drawTable(page);
}

// The ticked runs over each other, seeds of one group as mean and band.
function compare(page) {
  const chosen = page.runs.filter((run) => page.ticked.has(run.id)).map((run) => run.id);
  if (chosen.length) go({page: "run", run: chosen[0], options: {with: chosen.slice(1).join(",")}});
}

function hide(page) {
  const back = [...page.ticked].every((id) => page.hidden.has(id));
  page.ticked.forEach((id) => (back ? page.hidden.delete(id) : page.hidden.add(id)));
  remember("hidden", JSON.stringify([...page.hidden]));
  say(plural(page.ticked.size, "run") + (back ? " shown again" : " hidden"));
  page.ticked.clear();
  drawTable(page);
}

function drawTable(page) {
  const {options} = page.route;
  const words = (options.text ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  const text = (run) => [run.title, run.recipe, run.model, STATUS[run.status], run.trouble].join(" ").toLowerCase();
  const there = page.runs.filter((run) => options.hidden === "1" || !page.hidden.has(run.id));
  const found = there.filter((run) => words.every((word) => text(run).includes(word)));
  const groups = [...d3.group(found, (run) => run.group ?? run.id).values()];
  const [, , value] = COLUMNS.find(([key]) => key === options.sort) ?? [];
  if (value) {
    const down = options.down === "1";
    const order = (a, b) => (a === null ? 1 : b === null ? -1 : down ? d3.descending(a, b) : d3.ascending(a, b));
    groups.sort((a, b) => order(value(a), value(b)));
  }
  const rows = groups.flatMap((runs) => (runs.length === 1 ? [rowOf(page, runs)] : groupRows(page, runs)));
  const focused = document.activeElement?.dataset?.sort;
  page.count.textContent = found.length === page.runs.length ? plural(found.length, "run") : `${figure(found.length)} of ${plural(page.runs.length, "run")}`;
  fill(
    page.table,
    !page.runs.length
      ? empty("No run here yet. Train one (`ramulus train quickstart`), then open its folder: `ramulus view FOLDER`.")
      : h("table", {class: "list runs-list"}, h("thead", {}, h("tr", {}, h("th", {scope: "col"}), COLUMNS.map((column) => headOf(page, column)))), h("tbody", {}, rows)),
    page.runs.length && !found.length ? empty(there.length ? "No run has this in its name, recipe, model or status." : "All runs are hidden: switch on “Hidden ones too”.") : null,
  );
  buttons(page);
  if (focused) page.table.querySelector(`[data-sort="${focused}"]`)?.focus();
}

function buttons(page) {
  page.compare.disabled = page.hide.disabled = page.ticked.size === 0;
  page.hide.textContent = page.ticked.size && [...page.ticked].every((id) => page.hidden.has(id)) ? "Show the ticked again" : "Hide the ticked";
}

function headOf(page, [key, name, , , kind, explained]) {
  const {options} = page.route;
  const on = options.sort === key;
  const act = () => change(page, {sort: key, down: on && options.down !== "1" ? "1" : null});
  const button = h("button", {type: "button", class: "quiet", "data-sort": key, onclick: act, title: explained ?? "Sort"}, name + (on ? (options.down === "1" ? " ▾" : " ▴") : ""));
  const sorted = on ? (options.down === "1" ? "descending" : "ascending") : null;
  return h("th", {scope: "col", class: kind, "aria-sort": sorted, title: key === "reward" ? meaning("reward") : explained}, button);
}

function groupRows(page, runs) {
  const open = page.open.has(runs[0].group);
  const unfold = h(
    "button",
    {type: "button", class: "quiet", "aria-expanded": String(open), onclick: () => {
      if (open) page.open.delete(runs[0].group);
      else page.open.add(runs[0].group);
      change(page, {open: [...page.open].join(",") || null});
    }},
    (open ? "▾ " : "▸ ") + plural(runs.length, "seed"),
  );
  return [rowOf(page, runs, unfold), ...(open ? runs.map((run) => rowOf(page, [run], null, "seed")) : [])];
}

function rowOf(page, runs, unfold = null, kind = null) {
  const run = runs[0];
  const box = h("input", {
    type: "checkbox",
    "aria-label": "Tick " + (unfold ? run.group : run.title),
    checked: runs.every((each) => page.ticked.has(each.id)),
    onchange: () => {
      runs.forEach((each) => (box.checked ? page.ticked.add(each.id) : page.ticked.delete(each.id)));
      buttons(page);
    },
  });
  const link = hashOf({page: "run", run: run.id, options: {with: runs.slice(1).map((each) => each.id).join(",")}});
  const cells = COLUMNS.map(([key, , value, written, look]) => {
    const found = value(runs);
    if (key === "title") return h("td", {class: look}, h("a", {href: link, title: run.folder}, found), unfold, run.trouble ? h("p", {class: "wrong-ink small"}, run.trouble) : null);
    if (key === "status") return h("td", {class: look}, found === "live" ? h("span", {class: "pulse"}, "live") : written(found));
    if (key === "step") return h("td", {class: look}, written(found), h("span", {class: "soft"}, run.steps && runs.length === 1 ? " / " + figure(run.steps) : ""));
    if (key === "reward" && runs.length > 1) return h("td", {class: look}, written(found), h("span", {class: "soft interval"}, spread(runs)));
    return h("td", {class: look}, written(found));
  });
  return h("tr", {class: [kind, runs.every((each) => page.hidden.has(each.id)) ? "hidden-run" : null].filter(Boolean).join(" ") || null}, h("td", {}, box), cells);
}

function spread(runs) {
  const values = runs.map((run) => run.reward).filter((value) => typeof value === "number");
  return values.length ? `${d3.min(values).toFixed(3)}–${d3.max(values).toFixed(3)}` : "";
}
