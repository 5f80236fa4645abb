// Curves of metrics, drawn by uPlot: one small chart a metric, all runs in it, one crosshair through all charts.
import {h, fill, figure, duration, plural, say} from "./dom.js";
import {metricGroups, lineOf, constant, firstOf, across, meaning} from "./metrics.js";
const HEIGHT = 134;
const TALLEST = 3000; // charts above it are drawn at once, the others when they come into sight

// `settings`: {smooth, log, axis, constants, wanted}; `act.pick(step, run)` hears a click. Returns {update(series, settings), close()}.
export function curveBoard(host, act) {
  const board = {host, act, series: [], settings: {}, charts: [], width: 0, key: "curves" + Math.random()};
  const observer = new ResizeObserver(() => {
    if (Math.abs(host.clientWidth - board.width) > 12) rebuild(board);
  });
  observer.observe(host);
  board.sight = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => entry.target.drawNow?.()),
    {rootMargin: TALLEST / 4 + "px"},
  );
  return {
    update: (series, settings) => {
      Object.assign(board, {series, settings});
      rebuild(board);
    },
    close: () => {
      observer.disconnect();
      board.sight.disconnect();
      board.charts.forEach((chart) => chart.plot?.destroy());
    },
  };
}

// Whether a metric has one value in all rows of all series: where runs differ in it, that is drawn.
function sameAll(series, name) {
  return series.every((one) => constant(one.rows, name)) && new Set(series.map((one) => one.rows.find((row) => name in row)?.[name]).filter((value) => value !== undefined)).size <= 1;
}

function rebuild(board) {
  const {host, series, settings} = board;
  board.width = host.clientWidth;
  board.charts.forEach((chart) => chart.plot?.destroy());
  board.sight.disconnect();
  board.charts = [];
  if (!board.width) return;
  const folded = new Set([...host.querySelectorAll("details:not([open])")].map((one) => one.dataset.group));
  const focused = document.activeElement?.dataset?.metric;
  const xs = new Map(series.map((one) => [one, across(one.rows, settings.axis)]));
  const wanted = (settings.wanted ?? "").toLowerCase();
  const sections = metricGroups(series).map(([group, names]) => {
    const chosen = names.filter((name) => name.toLowerCase().includes(wanted) || group.toLowerCase().includes(wanted));
    const flat = settings.constants
      ? []
      : chosen.filter((name) => sameAll(series, name) && series.some((one) => one.rows.length > 1));
    const drawn = chosen.filter((name) => !flat.includes(name));
    if (!chosen.length) return null;
    return h(
      "details",
      {open: !folded.has(group), class: "group", "data-group": group},
      h("summary", {}, group, h("span", {class: "soft"}, " " + plural(drawn.length, "curve"))),
      h(
        "div",
        {class: "charts"},
        drawn.map((name) => chartOf(board, name, xs)),
      ),
      flat.length
        ? h(
            "p",
            {class: "constants"},
            h("span", {class: "soft"}, "Constant: "),
            flat.map((name) => h("span", {class: "constant", title: meaning(name)}, name + " ", h("b", {}, figure(firstOf(series, name))))),
          )
        : null,
    );
  });
  if (sections.some(Boolean)) fill(host, sections);
  else
    fill(
      host,
      h(
        "p",
        {class: "empty"},
        series.every((one) => !one.rows.length)
          ? "No metrics yet. A run writes its first line after its first step; this page shows it by itself."
          : "No metric has this in its name.",
      ),
    );
  const top = host.getBoundingClientRect().top;
  for (const chart of board.charts) {
    if (chart.host.getBoundingClientRect().top - top < TALLEST) draw(board, chart);
    else {
      chart.host.drawNow = () => chart.plot ?? draw(board, chart);
      board.sight.observe(chart.host);
    }
  }
  if (focused) host.querySelector(`[data-metric="${CSS.escape(focused)}"]`)?.focus();
}

function chartOf(board, name, xs) {
  const lines = board.series.map((one) => lineOf(one, xs.get(one), name, board.settings.smooth)).filter((line) => line.xs.length);
  const readout = h("span", {class: "readout"});
  const host = h("div", {
    class: "plot",
    tabindex: "0",
    role: "img",
    "data-metric": name,
    "data-lines": lines.length,
    "data-points": lines.reduce((sum, line) => sum + line.xs.length, 0),
    "data-bands": lines.filter((line) => line.low).length,
    "aria-label": describe(name, lines),
  });
  const chart = {name, lines, readout, host, plot: null};
  board.charts.push(chart);
  host.addEventListener("focus", () => {
    if (host.matches(":focus-visible")) moveTo(board, chart, chart.lines[0]?.xs.at(-1));
  });
  host.addEventListener("blur", () => moveTo(board, chart, null));
  host.addEventListener("keydown", (event) => moveAlong(board, chart, event));
  host.addEventListener("click", () => pick(board, chart));
  read(chart, null);
  return h("figure", {class: "chart"}, h("figcaption", {}, h("span", {class: "metric", title: name + ": " + meaning(name)}, name), readout), host);
}

function describe(name, lines) {
  const ends = lines.map((line) => `${line.title}: from ${figure(line.ys[0])} to ${figure(line.ys.at(-1))}`);
  return `${name}. ${meaning(name)} ${ends.join("; ")}. Left and right arrow read values.`;
}

function draw(board, chart) {
  const {settings} = board;
  const ink = getComputedStyle(document.documentElement);
  const soft = ink.getPropertyValue("--soft").trim();
  const grid = {stroke: ink.getPropertyValue("--line").trim(), width: 1};
  const [series, bands, tables] = [[{}], [], []];
  const add = (line, ys, options) => {
    tables.push([line.xs, ys]);
    series.push({spanGaps: false, points: {show: line.xs.length < 30, size: line.xs.length === 1 ? 6 : 4}, ...options});
  };
  const styled = {points: {show: false}, width: 0};
  for (const line of chart.lines) {
    if (line.low) {
      add(line, line.high, styled);
      add(line, line.low, styled);
      bands.push({series: [series.length - 2, series.length - 1], fill: line.colour + "38"});
    }
    if (line.smooth) add(line, line.ys, {stroke: line.colour + "50", width: 1, points: {show: false}});
    line.at = series.length;
    add(line, line.smooth ?? line.ys, {stroke: line.colour, width: 1.6, dash: line.dash});
  }
  const size = (plot, values) => Math.ceil(10 + 6 * Math.max(3, ...(values ?? [""]).map((text) => String(text ?? "").length)));
  const axis = {font: "10.5px system-ui, sans-serif", stroke: soft, ticks: {show: false}, grid};
  const values = (format) => (plot, ticks) => ticks.map((tick) => (tick === null ? "" : format(tick)));
  const along = settings.axis === "seconds" ? duration : short;
  chart.plot = new uPlot(
    {
      width: Math.max(120, chart.host.clientWidth),
      height: HEIGHT,
      padding: [8, 18, 0, 0],
      legend: {show: false},
      cursor: {y: false, drag: {x: false, y: false}, points: {size: 6}, sync: {key: board.key, setSeries: false, scales: ["x", null]}},
      scales: {x: {time: false, range: (plot, low, high) => (low === high ? [low - 1, high + 1] : [low, high])}, y: yScale(settings.log, chart.lines)},
      axes: [
        {...axis, size: 22, gap: 3, grid: {show: false}, space: 42, values: values(along), ...(settings.axis === "step" ? {incrs: WHOLE} : {})},
        {...axis, size, gap: 4, space: 20, values: (plot, ticks) => labels(ticks.filter((tick) => tick !== null)).concat(ticks.filter((tick) => tick === null))},
      ],
      series,
      bands,
      hooks: {setCursor: [(plot) => read(chart, plot.cursor.idx === null || plot.cursor.left < 0 ? null : plot.data[0][plot.cursor.idx])]},
    },
    uPlot.join(tables),
    chart.host,
  );
  return chart.plot;
}

const WHOLE = [0, 1, 2, 3, 4, 5, 6, 7].flatMap((power) => [1, 2, 5].map((head) => head * 10 ** power));

// The range of y: all of the line, nearly all of what smoothing leaves faint; logarithmic where all values are above 0, else symmetric about 0.
function yScale(log, lines) {
  const seen = lines.flatMap((line) => (line.smooth ? line.smooth : line.ys)).concat(lines.flatMap((line) => (line.low ? [...line.low, ...line.high] : [])));
  const faint = lines.flatMap((line) => line.ys).sort(d3.ascending);
  let low = Math.min(d3.min(seen), d3.quantileSorted(faint, 0.02));
  let high = Math.max(d3.max(seen), d3.quantileSorted(faint, 0.98));
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const pad = (high - low) * 0.06;
  if (!log) return {range: [low - pad, high + pad]};
  if (low > 0) return {distr: 3, range: [low / (high / low) ** 0.05, high * (high / low) ** 0.05]};
  const size = d3.quantileSorted(faint.map(Math.abs).filter(Boolean).sort(d3.ascending), 0.25) || 1;
  return {distr: 4, asinh: size, range: [low - pad, high + pad]};
}

// Tick labels with as many digits as tell neighbours apart.
function labels(ticks) {
  const size = Math.max(...ticks.map(Math.abs));
  const gap = d3.min(d3.pairs(ticks, (a, b) => Math.abs(b - a))) || 1;
  if (size >= 1e4 || size < 1e-2 || ticks.some((tick) => tick > 0 && tick < 1e-2)) return ticks.map(short);
  const format = d3.format("." + Math.min(6, d3.precisionFixed(gap)) + "f");
  return ticks.map((tick) => format(tick).replace("-", "−"));
}

function short(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e4) return d3.format(".3~s")(value).replace("-", "−");
  return size < 1e-2 ? d3.format(".2~e")(value).replace("-", "−") : figure(value);
}

// A value to read: five digits, more beside 1, where ratios live.
function exact(value) {
  const size = Math.abs(value);
  if (Number.isInteger(value) || size < 1e-3 || size >= 1e6) return figure(value);
  return d3
    .format(Math.abs(size - 1) < 0.01 ? ".7~r" : ".4~r")(value)
    .replace("-", "−");
}

function moveTo(board, chart, x) {
  if (!chart.plot) draw(board, chart);
  const left = x === null || x === undefined ? -10 : chart.plot.valToPos(x, "x");
  chart.plot.setCursor({left, top: left < 0 ? -10 : 10});
}

function moveAlong(board, chart, event) {
  if (event.key === "Enter") pick(board, chart);
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  event.preventDefault();
  const {xs, steps} = chart.lines[0];
  const now = chart.x === null ? xs.length - 1 : d3.bisectCenter(xs, chart.x);
  const next = Math.max(0, Math.min(xs.length - 1, now + (event.key === "ArrowLeft" ? -1 : 1)));
  moveTo(board, chart, xs[next]);
  say(`step ${steps[next]}: ${chart.name} ${chart.readout.textContent}`);
}

function pick(board, chart) {
  const line = chart.lines[0];
  if (chart.x !== null && line) board.act.pick(line.steps[d3.bisectCenter(line.xs, chart.x)], line.id);
}

// The values at x, or the last ones, and the step that they are of.
function read(chart, x) {
  chart.x = x;
  const numbers = chart.lines.map((line) => {
    const at = x === null ? line.xs.length - 1 : d3.bisectCenter(line.xs, x);
    const spread = line.low ? ` (${exact(line.low[at])} to ${exact(line.high[at])})` : "";
    const number = h("span", {class: "number", title: `${line.title}, step ${line.steps[at]}: ${line.ys[at]}${spread}`}, exact(line.ys[at]));
    number.style.color = chart.lines.length > 1 ? line.colour : "";
    return number;
  });
  const line = chart.lines[0];
  const step = x === null || !line ? null : h("span", {class: "place"}, "step " + line.steps[d3.bisectCenter(line.xs, x)]);
  fill(chart.readout, step, numbers);
}
