// A run: its curves beside those of other runs, what it cost, its configuration, its steps with trees.
import {h, fill, choice, toggle, empty, figure, debounce, remember, plural} from "./dom.js";
import {get} from "./data.js";
import {amend, go, hashOf} from "./route.js";
import {curveBoard} from "./curves.js";
import {runColour, runDash} from "./metrics.js";
import {drawConfig} from "./configs.js";
import {costView} from "./cost.js";

const PARTS = [
  ["curves", "Curves"],
  ["cost", "Time and tokens"],
  ["config", "Configuration"],
  ["trees", "Trees"],
];

export function runsPage(main, runs) {
  const rows = runs.map((run) =>
    h(
      "tr",
      {},
      h("td", {}, h("a", {href: hashOf({page: "run", run: run.id})}, run.title), run.live ? h("span", {class: "pulse"}, "live") : null),
      h("td", {class: "right"}, figure(run.step)),
      h("td", {class: "right"}, figure(run.trees.length)),
      h("td", {class: "soft path"}, run.folder),
    ),
  );
  fill(
    main,
    h(
      "div",
      {class: "page narrow"},
      h("h1", {}, "Runs"),
      runs.length
        ? h(
            "table",
            {class: "list"},
            h(
              "thead",
              {},
              h(
                "tr",
                {},
                ["Run", "Step", "Steps with trees", "Folder"].map((name, at) =>
                  h("th", {scope: "col", class: at === 1 || at === 2 ? "right" : null}, name),
                ),
              ),
            ),
            h("tbody", {}, rows),
          )
        : empty("No run here yet. Train one (`ramulus train quickstart`), then open its folder: `ramulus view FOLDER`."),
    ),
  );
  return {};
}

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
  page.chosen = [
    route.run,
    ...(route.options.with ?? "").split(",").filter((id) => id && id !== route.run && runs.some((run) => run.id === id)),
  ];
  page.settings = {
    smooth: Number(route.options.smooth ?? remember("smooth") ?? 0),
    log: route.options.log === "1",
    axis: route.options.axis ?? "step",
    constants: route.options.constants === "1",
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
  const fresh = await get("/api/metrics", {run: id, after: known.length ? known.at(-1).step : -1}, true);
  const last = known.length ? known.at(-1).step : -Infinity;
  const added = fresh.filter((row) => row.step > last);
  page.rows.set(id, [...known, ...added]);
  return added.length > 0 || !known.length;
}

function keep(page) {
  const {smooth, log, axis, constants, wanted} = page.settings;
  page.route.options = {
    part: page.part === "curves" ? null : page.part,
    with: page.chosen.slice(1).join(","),
    smooth: smooth || null,
    log: log ? "1" : null,
    axis: axis === "step" ? null : axis,
    constants: constants ? "1" : null,
    metric: wanted,
  };
  amend(page.route);
}

function drawSide(page) {
  const focused = page.side.contains(document.activeElement) ? document.activeElement.value : null;
  const boxes = page.runs.map((run) => {
    const at = page.chosen.indexOf(run.id);
    const box = h("input", {
      type: "checkbox",
      value: run.id,
      checked: at >= 0,
      disabled: run.id === page.route.run,
      onchange: () => choose(page, run.id, box.checked),
    });
    const sign = h("span", {class: "sign", "aria-hidden": "true"});
    if (at >= 0) sign.style.borderTop = (runDash(at) ? "3px dashed " : "3px solid ") + runColour(at);
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
          h("span", {class: "soft"}, " step " + figure(run.step) + (run.steps > run.step ? " of " + figure(run.steps) : "")),
        ),
        sign,
      ),
      run.id === page.route.run ? null : h("a", {href: hashOf({page: "run", run: run.id}), "aria-label": "Open " + run.title}, "open"),
    );
  });
  fill(
    page.side,
    h("h2", {}, "Runs"),
    h("ul", {class: "runs"}, boxes),
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
    if (part === "config") await drawConfig(page.body, seriesOf(page));
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

function seriesOf(page) {
  return page.chosen.map((id) => ({id, title: page.runs.find((run) => run.id === id)?.title ?? id, rows: page.rows.get(id) ?? []}));
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
    ),
    page.host,
  );
  page.board = curveBoard(page.host, {pick: (step, id) => openNearest(page, step, id)});
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
