// The entry: which page the address asks for, the bar above it, keys, dark and light, and looking for news.
import {h, fill, choice, empty, trouble, remember, figure, shown, say} from "./dom.js";
import {get, embedded} from "./data.js";
import {readRoute, hashOf, go, amend, named} from "./route.js";
import {runPage} from "./runpage.js";
import {runsPage} from "./runtable.js";
import {loadGlossary} from "./metrics.js";
import {stepPage, neighbour} from "./steppage.js";
import {treePage, nextTree} from "./treepage.js";
import {evalPage} from "./evalpage.js";
import {showHelp, showSearch} from "./overlays.js";

const LIVE_EVERY = 2500; // ms between looks while a run trains
const IDLE_EVERY = 12000; // ms between looks while none does
const shownNow = {runs: [], route: null, page: null, turn: 0};
const mainElement = document.getElementById("main");

async function render() {
  const route = readRoute();
  const before = shownNow.route;
  const mine = ++shownNow.turn;
  if (!shownNow.runs.length) shownNow.runs = await get("/api/runs", {}, true);
  await loadGlossary();
  const meant = route.run === null ? undefined : named(shownNow.runs, route.run);
  if (meant && meant.id !== route.run) {
    route.run = meant.id; // a link that was made when this run stood elsewhere
    amend(route);
  }
  if (route.page === "runs" && shownNow.runs.length === 1 && !before) {
    location.replace(hashOf({page: "run", run: shownNow.runs[0].id}));
    return;
  }
  const same =
    before &&
    before.page === "tree" &&
    route.page === "tree" &&
    before.run === route.run &&
    before.step === route.step &&
    before.index === route.index;
  if (same && shownNow.page?.goTo) {
    shownNow.route = route;
    shownNow.page.goTo(route);
    return;
  }
  shownNow.page?.close?.();
  shownNow.page = null;
  shownNow.route = route;
  mainElement.inert = Boolean(before); // the page that leaves must not write its address over the new one
  crumbs();
  try {
    const holder = h("div", {class: "holder"}); // built aside: a page that comes too late must not cover the newer one
    const page = await open(route, holder);
    if (mine !== shownNow.turn) {
      page?.close?.();
      return;
    }
    fill(mainElement, holder);
    mainElement.inert = false;
    shownNow.page = page;
    if (before) mainElement.focus({preventScroll: true});
    if (before && route.page === "tree") page.keys.m();
  } catch (error) {
    if (mine !== shownNow.turn) return;
    fill(mainElement, h("div", {class: "page narrow"}, empty(error.message, h("p", {}, h("a", {href: "#/"}, "All runs")))));
    mainElement.inert = false;
  }
  crumbs();
}

async function open(route, holder) {
  const run = shownNow.runs.find((one) => one.id === route.run);
  if (route.page === "runs") return runsPage(holder, route, shownNow.runs);
  if (!run) throw new Error(`There is no run “${route.run}” here.`);
  if (route.page === "evals") return evalPage(holder, route, run);
  if (route.page === "run") return runPage(holder, route, shownNow.runs);
  if (route.step === null) throw new Error("The address names no step.");
  if (route.page === "step") return stepPage(holder, route, shownNow.runs);
  if (route.index === null) throw new Error("The address names no tree.");
  return treePage(holder, route, shownNow.runs);
}

// The path in the bar: run, step and tree, each to choose another.
function crumbs() {
  const {route, runs} = shownNow;
  const run = runs.find((one) => one.id === route.run);
  const parts = [];
  if (run) {
    parts.push(h("a", {href: hashOf({page: "run", run: run.id})}, run.title));
    if (route.page === "evals") parts.push(h("span", {}, "Evaluations"));
    else if (run.trees.length) parts.push(stepper(route, run));
  }
  if (route.page === "tree") parts.push(treeStepper(route));
  fill(document.getElementById("crumbs"), parts);
  document.getElementById("pulse").hidden = !runs.some((one) => one.live);
  document.title = shown(
    [route.page === "tree" ? `tree ${route.index}` : null, route.step == null ? null : `step ${route.step}`, run?.title, "ramulus"]
      .filter(Boolean)
      .join(" · "),
  );
}

function arrow(text, title, act) {
  return h("button", {type: "button", title, "aria-label": title, onclick: act}, text);
}

function stepper(route, run) {
  const on = route.page === "step" || route.page === "tree";
  const steps = on && !run.trees.includes(route.step) ? [...run.trees, route.step] : run.trees;
  const select = choice(
    "",
    [...(on ? [] : [["", "trees of step…"]]), ...steps.map((step) => [String(step), `step ${figure(step)}`])],
    on ? String(route.step) : "",
    (value) => {
      if (value) go({page: "step", run: run.id, step: Number(value), options: stepOptions()});
    },
    "step",
  );
  select.querySelector("select").setAttribute("aria-label", "Step");
  return h(
    "span",
    {class: "joined"},
    arrow("‹", "Previous step with trees (S)", () => nextStep(-1)),
    select,
    arrow("›", "Next step with trees (s)", () => nextStep(1)),
  );
}

function treeStepper(route) {
  return h(
    "span",
    {class: "joined"},
    arrow("‹", "Previous tree (T)", () => nextTree({where: route, route}, -1)),
    h("a", {href: hashOf({...route, page: "step", options: stepOptions()}), title: "All trees of this step (u)"}, `tree ${route.index}`),
    arrow("›", "Next tree (t)", () => nextTree({where: route, route}, 1)),
  );
}

function stepOptions() {
  const {sort, down, filter, text} = shownNow.route?.options ?? {};
  return {sort, down, filter, text};
}

// The same page of another step; on a tree, the same problem's tree where the step has one, else the first.
async function nextStep(way) {
  const route = readRoute();
  const {runs} = shownNow;
  const steps = runs.find((one) => one.id === route.run)?.trees ?? [];
  const now = route.step ?? (way > 0 ? -Infinity : Infinity);
  const next = way > 0 ? steps.find((step) => step > now) : steps.findLast((step) => step < now);
  if (next === undefined) {
    say(way > 0 ? "This is the last step with trees." : "This is the first step with trees.");
    return;
  }
  if (route.page !== "tree") {
    go({page: "step", run: route.run, step: next, options: stepOptions()});
    return;
  }
  const [mine, theirs] = await Promise.all([route.step, next].map((step) => get("/api/steps", {run: route.run, step})));
  const task = mine.find((tree) => tree.index === route.index)?.task;
  const tree = theirs.find((one) => one.task === task) ?? neighbour(theirs, route.options, -1, 1) ?? theirs[0];
  if (tree) go({page: "tree", run: route.run, step: next, index: tree.index, options: {...stepOptions(), colour: route.options.colour}});
}

function up() {
  const route = readRoute();
  const {runs} = shownNow;
  if (route.page === "tree") go({...route, page: "step", options: stepOptions()});
  else if (route.page === "step" || route.page === "evals") go({page: "run", run: route.run});
  else if (route.page === "run" && runs.length > 1) go({page: "runs"});
}

function theme(next) {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = next ?? remember("theme") ?? system;
  if (next) remember("theme", next);
  document.getElementById("theme").textContent = document.documentElement.dataset.theme === "dark" ? "Light" : "Dark";
  shownNow.page?.colours?.();
}

const turnTheme = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

function search() {
  const run = shownNow.runs.find((one) => one.id === shownNow.route?.run) ?? shownNow.runs[0];
  if (run) showSearch(run.id, run.title);
}

document.addEventListener("keydown", (event) => {
  const field = event.target.closest?.("input:not([type=checkbox]):not([type=range]), textarea, select");
  if (event.key === "Escape" && field && !field.closest("dialog")) {
    field.blur();
    return;
  }
  if (field || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog")) return;
  const route = readRoute(); // the address is ahead of the page while that loads
  const turn = (way) => () => nextTree({where: route, route}, way);
  const treeKeys = route.page === "tree" ? {t: turn(1), T: turn(-1)} : {};
  const act =
    {"/": search, "?": showHelp, d: turnTheme, u: up, s: () => nextStep(1), S: () => nextStep(-1)}[event.key] ??
    treeKeys[event.key] ??
    shownNow.page?.keys?.[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

// Look for news for as long as the page is open: often while a run trains, seldom otherwise.
async function watch() {
  let wait = IDLE_EVERY;
  try {
    if (!document.hidden) {
      const runs = await get("/api/runs", {}, true);
      const changed = JSON.stringify(runs) !== JSON.stringify(shownNow.runs);
      shownNow.runs = runs;
      trouble("");
      await shownNow.page?.tick?.(runs);
      if (changed && shownNow.route && !document.getElementById("crumbs").contains(document.activeElement)) crumbs();
    }
    if (shownNow.runs.some((run) => run.live)) wait = LIVE_EVERY;
  } catch (error) {
    trouble(error.message);
  }
  setTimeout(watch, wait);
}

document.getElementById("open-search").addEventListener("click", search);
document.getElementById("open-help").addEventListener("click", showHelp);
document.getElementById("theme").addEventListener("click", turnTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme());
window.addEventListener("hashchange", render);
theme();
render().catch((error) => fill(mainElement, h("div", {class: "page narrow"}, empty(error.message))));
if (!embedded) setTimeout(watch, LIVE_EVERY);
