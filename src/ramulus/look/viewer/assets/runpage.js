// A run: its curves beside those of other runs, what it cost, its configuration, its steps with trees.
import {h, fill, choice, toggle, empty, figure, debounce, remember, plural} from "./dom.js";
import {get} from "./data.js";
import {amend, go, hashOf} from "./route.js";
import {curveBoard} from "./curves.js";
import {runColour, runDash, withSeeds} from "./metrics.js";
import {named} from "./route.js";
import {drawConfig} from "./configs.js";
import {costView} from "./cost.js";

const MOST_BESIDE = 40; // runs that the list beside the curves holds besides the ticked ones
const PARTS = [
  ["curves", "Curves"],
  ["cost", "Time and tokens"],
  ["config", "Configuration"],
  ["trees", "Trees"],
];

// Returns {tick(runs)}: called with fresh runs while the page is open; asks for new lines of metrics only.
export function runPage(main, route, runs) {
  const page = {
    main,
    route,
    runs,
    rows: new Map(),
    board: null,
    part: route.options.part ?? "curves",
  };
  const others = (route.options.with ?? "").split(",").map((id) => named(runs, id)?.id);
  page.chosen = [...new Set([route.run, ...others.filter(Boolean)])];
  page.settings = {
    smooth: Number(route.options.smooth ?? remember("smooth") ?? 0),
    log: route.options.log === "1",
    axis: route.options.axis ?? "step",
    constants: route.options.constants === "1",
    seeds: route.options.seeds !== "0",
    wanted: route.options.metric ?? "",
  };
  page.side = h("aside", {class: "side", "aria-label": "Runs shown"});
  page.body = h("section", {class: "body"});
  page.tabs = h("nav", {class: "tabs", "aria-label": "Parts of this run"});
  fill(main, h("div", {class: "page split"}, page.side, h("div", {class: "content"}, page.tabs, page.body)));
  drawSide(page);
  drawPart(page);
  return {
    tick: (fresh) => tick(page, fresh),
    close: () => page.board?.close(),
    keys: {},
    colours: () => {
      drawSide(page);
      drawPart(page);
    },
  };
}

async function tick(page, runs) {
  const before = JSON.stringify(page.runs);
  page.runs = runs;
  if (before !== JSON.stringify(runs)) drawSide(page);
  const grew = await Promise.all(page.chosen.map((id) => more(page, id)));
  if (page.part === "curves" && grew.some(Boolean)) drawCurves(page);
  if (page.part === "trees" && before !== JSON.stringify(runs)) drawTrees(page);
}

// New lines of metrics of a run; whether there were any.
async function more(page, id) {
  const known = page.rows.get(id) ?? [];
  let fresh = [];
  try {
    if (!page.runs.find((run) => run.id === id)?.trouble) fresh = await get("/api/metrics", {run: id, after: known.length ? known.at(-1).step : -1}, true);
  } catch (error) {
    if (id === page.route.run || error.silent) throw error; // the others are shown without it
  }
  const last = known.length ? known.at(-1).step : -Infinity;
  const added = fresh.filter((row) => row.step > last);
  page.rows.set(id, [...known, ...added]);
  return added.length > 0 || !known.length;
}

function keep(page) {
  const {smooth, log, axis, constants, seeds, wanted} = page.settings;
  page.route.options = {
    part: page.part === "curves" ? null : page.part,
    with: page.chosen.slice(1).join(","),
    smooth: smooth || null,
    log: log ? "1" : null,
    axis: axis === "step" ? null : axis,
    constants: constants ? "1" : null,
    seeds: seeds ? null : "0",
    metric: wanted,
  };
  amend(page.route);
}

function drawSide(page) {
  const focused = page.side.contains(document.activeElement) ? document.activeElement.value : null;
  const wanted = (page.sideText ?? "").toLowerCase();
  const fitting = page.runs.filter((run) => !page.chosen.includes(run.id) && run.title.toLowerCase().includes(wanted));
  const listed = [...page.chosen.map((id) => page.runs.find((run) => run.id === id)), ...fitting.slice(0, MOST_BESIDE)].filter(Boolean);
  const drawn = seriesOf(page);
  const boxes = listed.map((run) => {
    const line = drawn.find((one) => one.seeds && one.group === run.group) ?? drawn.find((one) => one.id === run.id);
    const at = line?.at ?? -1;
    const box = h("input", {
      type: "checkbox",
      value: run.id,
      checked: page.chosen.includes(run.id),
      disabled: run.id === page.route.run,
      onchange: () => choose(page, run.id, box.checked),
    });
    const sign = h("span", {class: "sign", "aria-hidden": "true"});
    if (page.chosen.includes(run.id)) sign.style.borderTop = (runDash(at) ? "3px dashed " : "3px solid ") + runColour(at);
    return h(
      "li",
      {},
      h(
        "label",
        {title: run.folder},
        box,
        h(
          "span",
          {class: "title"},
          run.title,
          run.live ? h("span", {class: "pulse"}, "live") : null,
          run.trouble ? h("span", {class: "wrong-ink small"}, " cannot be read") : null,
          h("span", {class: "soft"}, " step " + figure(run.step) + (run.steps > run.step ? " of " + figure(run.steps) : "")),
        ),
        sign,
      ),
      run.id === page.route.run ? null : h("a", {href: hashOf({page: "run", run: run.id}), "aria-label": "Open " + run.title}, "open"),
    );
  });
  fill(
    page.side,
    h("h2", {}, h("a", {href: hashOf({page: "runs"})}, "Runs")),
    page.runs.length > MOST_BESIDE
      ? h("input", {type: "search", class: "wide", id: "side-filter", placeholder: `find among ${page.runs.length}`, value: page.sideText ?? "", oninput: debounce((event) => {
          page.sideText = event.target.value;
          drawSide(page);
          page.side.querySelector("#side-filter").focus();
        }, 150)})
      : null,
    h("ul", {class: "runs"}, boxes),
    fitting.length > MOST_BESIDE ? h("p", {class: "soft small"}, `and ${figure(fitting.length - MOST_BESIDE)} more`) : null,
    page.runs.length > 1
      ? h("p", {class: "soft small"}, "Tick runs to lay their curves over each other and to compare their configurations.")
      : null,
  );
  if (focused) page.side.querySelector(`input[value="${CSS.escape(focused)}"]`)?.focus();
}

function choose(page, id, on) {
  page.chosen = on ? [...page.chosen, id] : page.chosen.filter((one) => one !== id);
  keep(page);
  drawSide(page);
  drawPart(page);
}

async function drawPart(page) {
  page.board?.close();
  page.board = null;
  fill(
    page.tabs,
    PARTS.map(([key, name]) =>
      h(
        "button",
        {
          type: "button",
          "aria-current": page.part === key ? "page" : null,
          class: "tab",
          onclick: () => {
            page.part = key;
            keep(page);
            drawPart(page).then(() => page.tabs.querySelector("[aria-current]").focus());
          },
        },
        name,
      ),
    ),
    h("a", {class: "tab", href: hashOf({page: "evals", run: page.route.run})}, "Evaluations"),
  );
  const part = page.part;
  try {
    const trouble = runOf(page)?.trouble;
    if (trouble && page.chosen.length === 1) fill(page.body, empty(trouble));
    else if (part === "config") await drawConfig(page.body, seriesOf(page));
    else {
      await Promise.all(page.chosen.filter((id) => !page.rows.has(id)).map((id) => more(page, id)));
      if (page.part !== part) return;
      if (part === "curves" && !page.looked && !page.rows.get(page.route.run).length && runOf(page).trees.length) {
        page.part = "trees"; // a folder of trees alone has no curves
      }
      page.looked = true;
      if (page.part !== part) return drawPart(page);
      if (part === "trees") drawTrees(page);
      else if (part === "cost") await costView(page.body, seriesOf(page));
      else {
        controls(page);
        drawCurves(page);
      }
    }
  } catch (error) {
    fill(page.body, empty(error.message));
  }
}

function runOf(page) {
  return page.runs.find((run) => run.id === page.route.run);
}

// The runs whose curves are drawn; the seeds of a group as one where that is asked for.
function seriesOf(page, together = page.settings.seeds && page.part === "curves") {
  const series = page.chosen.map((id) => {
    const run = page.runs.find((one) => one.id === id);
    return {id, title: run?.title ?? id, group: run?.group ?? null, rows: page.rows.get(id) ?? []};
  });
  return withSeeds(series, together);
}

function controls(page) {
  const {settings} = page;
  const change = (name) => (value) => {
    settings[name] = value;
    keep(page);
    drawCurves(page);
  };
  const shownSmooth = h("output", {}, settings.smooth.toFixed(2));
  const slider = h("input", {
    type: "range",
    id: "smoothing",
    min: 0,
    max: 0.98,
    step: 0.02,
    oninput: () => {
      shownSmooth.textContent = Number(slider.value).toFixed(2);
      remember("smooth", slider.value);
      change("smooth")(Number(slider.value));
    },
  });
  slider.value = settings.smooth;
  page.host = h("div", {class: "board"});
  fill(
    page.body,
    h(
      "div",
      {class: "tools"},
      h(
        "label",
        {class: "field"},
        h("span", {}, "Metric"),
        h("input", {
          type: "search",
          id: "metric",
          placeholder: "all",
          value: settings.wanted,
          oninput: debounce((event) => change("wanted")(event.target.value), 120),
        }),
      ),
      h("label", {class: "field"}, h("span", {}, "Smoothing"), slider, shownSmooth),
      choice(
        "Across",
        [
          ["step", "steps"],
          ["sampled", "sampled tokens"],
          ["seconds", "seconds"],
        ],
        settings.axis,
        change("axis"),
      ),
      toggle("Log scale", settings.log, change("log"), "Logarithmic where all values are above 0, else symmetric about 0"),
      toggle("Constant ones too", settings.constants, change("constants")),
      seedsToggle(page),
    ),
    page.host,
  );
  page.board = curveBoard(page.host, {pick: (step, id) => openNearest(page, step, id)});
}

// Offered where a sweep has made several seeds of the same thing.
function seedsToggle(page) {
  const group = runOf(page)?.group;
  const all = page.runs.filter((run) => group && run.group === group).map((run) => run.id);
  if (all.length < 2) return null;
  const whole = all.every((id) => page.chosen.includes(id));
  return toggle(
    `Mean and band of ${all.length} seeds`,
    whole && page.settings.seeds,
    async (on) => {
      page.settings.seeds = on;
      if (on) page.chosen = [...new Set([...page.chosen, ...all])];
      keep(page);
      await drawPart(page);
      drawSide(page);
    },
    "The mean over the seeds at each step, in a band from the least to the greatest of them",
  );
}

function drawCurves(page) {
  page.board?.update(seriesOf(page), page.settings);
}

// The trees nearest to a place on a curve.
function openNearest(page, step, id) {
  const steps = page.runs.find((run) => run.id === id)?.trees ?? [];
  if (steps.length) go({page: "step", run: id, step: steps[d3.minIndex(steps, (one) => Math.abs(one - step))]});
}

function drawTrees(page) {
  const run = runOf(page);
  const rates = new Map((page.rows.get(run.id) ?? []).map((row) => [row.step, row]));
  fill(
    page.body,
    run.trees.length
      ? [
          h("p", {class: "soft"}, "Steps whose trees were kept: " + plural(run.trees.length, "step") + "."),
          h(
            "ol",
            {class: "steps"},
            run.trees.map((step) =>
              h(
                "li",
                {},
                h(
                  "a",
                  {href: hashOf({page: "step", run: run.id, step})},
                  "Step " + figure(step),
                  rates.has(step) && typeof rates.get(step).reward === "number"
                    ? h("span", {class: "soft"}, "reward " + figure(rates.get(step).reward))
                    : null,
                ),
              ),
            ),
          ),
        ]
      : empty("No trees were kept. Train with `trees_every=1` (or 10, ...) and they appear here."),
  );
}
