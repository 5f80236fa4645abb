// Curves of metrics: one small chart a metric, all runs in it, one crosshair through all charts.
import {h, fill, figure, duration, plural, say} from "./dom.js";
import {runColour, runDash, metricGroups, smoothed, across, constant, firstOf, nearest, thinned} from "./metrics.js";
const CHART_HEIGHT = 116;
const PAD = {right: 8, top: 6, bottom: 18};

// `settings`: {smooth, log, axis, constants, wanted}; `act.pick(step, run)` hears a click. Returns {update(series, settings), close()}.
export function curveBoard(host, act) {
  const board = {host, act, series: [], settings: {}, charts: [], width: 0};
  const observer = new ResizeObserver(() => {
    if (Math.abs(host.clientWidth - board.width) > 12) rebuild(board);
  });
  observer.observe(host);
  return {
    update: (series, settings) => {
      Object.assign(board, {series, settings});
      rebuild(board);
    },
    close: () => observer.disconnect(),
  };
}

function rebuild(board) {
  const {host, series, settings} = board;
  board.width = host.clientWidth;
  board.charts = [];
  if (!board.width) return;
  const folded = new Set([...host.querySelectorAll("details:not([open])")].map((one) => one.dataset.group));
  const focused = document.activeElement?.dataset?.metric;
  const xs = new Map(series.map((one) => [one.id, across(one.rows, settings.axis)]));
  const wanted = (settings.wanted ?? "").toLowerCase();
  const sections = metricGroups(series).map(([group, names]) => {
    const chosen = names.filter((name) => name.toLowerCase().includes(wanted) || group.toLowerCase().includes(wanted));
    const flat = settings.constants
      ? []
      : chosen.filter((name) => series.every((one) => constant(one.rows, name)) && series.some((one) => one.rows.length > 1));
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
            flat.map((name) => h("span", {class: "constant"}, name + " ", h("b", {}, figure(firstOf(series, name))))),
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
  board.charts.forEach((chart) => drawChart(board, chart));
  if (board.at !== null && board.at !== undefined) hoverAt(board, board.at);
  if (focused) host.querySelector(`[data-metric="${CSS.escape(focused)}"]`)?.focus();
}

function chartOf(board, name, xs) {
  const lines = board.series
    .map((one, at) => {
      const x = xs.get(one.id);
      const points = one.rows
        .map((row, row_at) => [x[row_at], row[name], row.step])
        .filter(([, y]) => typeof y === "number" && Number.isFinite(y));
      return {at, id: one.id, title: one.title, points, smooth: smoothed(points, board.settings.smooth)};
    })
    .filter((line) => line.points.length);
  const readout = h("span", {class: "readout"});
  const plot = h("div", {class: "plot", tabindex: "0", role: "img", "data-metric": name, "aria-label": describe(name, lines)});
  const chart = {name, lines, readout, plot, at: null};
  board.charts.push(chart);
  plot.addEventListener("pointermove", (event) => hoverAt(board, chart.x?.invert(event.offsetX)));
  plot.addEventListener("pointerleave", () => hoverAt(board, null));
  plot.addEventListener("focus", () => {
    if (plot.matches(":focus-visible")) hoverAt(board, chart.lines[0]?.points.at(-1)?.[0]);
  });
  plot.addEventListener("blur", () => hoverAt(board, null));
  plot.addEventListener("keydown", (event) => moveAlong(board, chart, event));
  plot.addEventListener("click", () => pick(board, chart));
  return h("figure", {class: "chart"}, h("figcaption", {}, h("span", {class: "metric", title: name}, name), readout), plot);
}

function describe(name, lines) {
  const ends = lines.map((line) => `${line.title}: from ${figure(line.points[0][1])} to ${figure(line.points.at(-1)[1])}`);
  return `${name}. ${ends.join("; ")}. Left and right arrow read values.`;
}

function moveAlong(board, chart, event) {
  if (event.key === "Enter") pick(board, chart);
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  event.preventDefault();
  const points = chart.lines[0]?.points ?? [];
  const now = board.at === null || board.at === undefined ? points.length - 1 : d3.bisector((point) => point[0]).center(points, board.at);
  const next = points[Math.max(0, Math.min(points.length - 1, now + (event.key === "ArrowLeft" ? -1 : 1)))];
  if (!next) return;
  hoverAt(board, next[0]);
  say(`step ${next[2]}: ${chart.name} ${chart.readout.textContent}`);
}

function pick(board, chart) {
  const found = board.at == null ? null : nearest(chart.lines[0], board.at);
  if (found) board.act.pick(found[2], chart.lines[0].id);
}

function drawChart(board, chart) {
  const width = Math.max(120, chart.plot.clientWidth);
  const xEnd = d3.extent(chart.lines.flatMap((line) => [line.points[0][0], line.points.at(-1)[0]]));
  const bare = board.settings.smooth > 0 ? "smooth" : "points";
  const values = chart.lines.flatMap((line) => line[bare].map((point) => point[1]));
  const faint = chart.lines.flatMap((line) => line.points.map((point) => point[1])).sort(d3.ascending);
  const low = Math.min(d3.min(values), d3.quantileSorted(faint, 0.02));
  const high = Math.max(d3.max(values), d3.quantileSorted(faint, 0.98));
  chart.x = d3.scaleLinear(xEnd[0] === xEnd[1] ? [xEnd[0] - 1, xEnd[1] + 1] : xEnd, [0, 1]);
  chart.y = yScale(board.settings.log, low, high, faint);
  const labels = yTicks(chart.y, board.settings.log);
  chart.left = 12 + 5.9 * d3.max(labels, (label) => label[1].length);
  chart.x.range([chart.left, width - PAD.right]);
  const svg = d3.create("svg").attr("width", width).attr("height", CHART_HEIGHT).attr("aria-hidden", "true");
  axes(svg, chart, labels, width, board.settings);
  const clip = svg.append("g").attr("class", "lines");
  const path = d3
    .line(
      (point) => chart.x(point[0]),
      (point) => Math.max(-20, Math.min(CHART_HEIGHT + 20, chart.y(point[1]))),
    )
    .defined((point) => Number.isFinite(chart.y(point[1])));
  for (const line of chart.lines) {
    const colour = runColour(line.at);
    const stroke = (points, name) =>
      clip
        .append("path")
        .attr("class", name)
        .attr("d", path(thinned(points, width)))
        .attr("stroke", colour)
        .attr("stroke-dasharray", runDash(line.at) || null);
    if (board.settings.smooth > 0) stroke(line.points, "raw");
    stroke(line.smooth, "line");
    if (line.points.length < 30)
      clip
        .append("g")
        .selectAll("circle")
        .data(line[bare])
        .join("circle")
        .attr("r", line.points.length === 1 ? 3 : 1.6)
        .attr("cx", (point) => chart.x(point[0]))
        .attr("cy", (point) => chart.y(point[1]))
        .attr("fill", colour);
  }
  chart.cross = svg
    .append("line")
    .attr("class", "cross")
    .attr("y1", PAD.top)
    .attr("y2", CHART_HEIGHT - PAD.bottom)
    .attr("visibility", "hidden");
  chart.place = svg
    .append("text")
    .attr("class", "place")
    .attr("text-anchor", "middle")
    .attr("y", CHART_HEIGHT - 4)
    .attr("visibility", "hidden");
  chart.dots = chart.lines.map((line) =>
    svg.append("circle").attr("class", "dot").attr("r", 3).attr("fill", runColour(line.at)).attr("visibility", "hidden"),
  );
  fill(chart.plot, svg.node());
  readAt(board, chart, null);
}

function yScale(log, low, high, values) {
  const range = [CHART_HEIGHT - PAD.bottom, PAD.top];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  if (!log) return d3.scaleLinear([low, high], range).nice(4);
  const least = values.find((value) => value > 0);
  if (values[0] > 0)
    return d3.scaleLog([Math.max(low, least) / (high / Math.max(low, least)) ** 0.04, high * (high / Math.max(low, least)) ** 0.04], range);
  const size = d3.quantileSorted(values.map(Math.abs).filter(Boolean).sort(d3.ascending), 0.25) || 1;
  return d3.scaleSymlog([low, high], range).constant(size);
}

// At most five ticks and their labels: [[value, text], ...]
function yTicks(scale, log) {
  let ticks = scale.ticks(4);
  if (log) {
    const [low, high] = scale.domain();
    const led = (heads) =>
      ticks.filter(
        (tick) => tick === 0 || heads.includes(Math.round(Math.abs(tick) / 10 ** Math.floor(Math.log10(Math.abs(tick)) + 1e-9))),
      );
    const fuller = [led([1]), led([1, 3]), led([1, 2, 5]), ticks, d3.ticks(low, high, 3)].find(
      (some) => some.length >= 2 && some.length <= 6,
    );
    ticks = fuller ?? led([1]);
  }
  const every = Math.ceil(ticks.length / 5);
  const apart = (tick, at, all) => at === 0 || all.slice(0, at).every((other) => Math.abs(scale(tick) - scale(other)) >= 12);
  const written = tickText(ticks, log);
  return ticks
    .filter((tick, at) => at % every === 0)
    .sort((a, b) => Math.abs(a) - Math.abs(b))
    .filter(apart)
    .map((tick) => [tick, written(tick)]);
}

function axes(svg, chart, ticks, width, settings) {
  const labels = svg.append("g").attr("class", "axis");
  for (const [tick, text] of ticks) {
    const y = Math.round(chart.y(tick)) + 0.5;
    labels
      .append("line")
      .attr("x1", chart.left)
      .attr("x2", width - PAD.right)
      .attr("y1", y)
      .attr("y2", y);
    labels
      .append("text")
      .attr("x", chart.left - 5)
      .attr("y", y + 3.5)
      .attr("text-anchor", "end")
      .text(text);
  }
  for (const tick of chart.x.ticks(Math.max(2, Math.floor(width / 80)))) {
    if (settings.axis === "step" && !Number.isInteger(tick)) continue;
    labels
      .append("text")
      .attr("x", chart.x(tick))
      .attr("y", CHART_HEIGHT - 4)
      .attr("text-anchor", "middle")
      .text(settings.axis === "seconds" ? duration(tick) : shortFigure(tick));
  }
}

// Tick labels with as many digits as tell neighbours apart.
function tickText(ticks, log) {
  const size = Math.max(...ticks.map(Math.abs));
  if ((log && d3.max(ticks) > 3 * d3.min(ticks)) || size >= 1e4 || size < 1e-2) return shortFigure;
  const format = d3.format("." + Math.min(6, d3.precisionFixed(d3.min(d3.pairs(ticks, (a, b) => Math.abs(b - a))) || 1)) + "f");
  return (tick) => format(tick).replace("-", "−");
}

function shortFigure(value) {
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

function hoverAt(board, x) {
  board.at = x;
  board.charts.forEach((chart) => readAt(board, chart, x));
}

function readAt(board, chart, x) {
  const off = x === null || x === undefined || !chart.lines.length;
  chart.cross?.attr("visibility", off ? "hidden" : "visible");
  const parts = chart.lines.map((line, at) => {
    const place = off ? line.points.length - 1 : d3.bisector((point) => point[0]).center(line.points, x);
    const [px, raw] = line.points[place];
    chart.dots[at]
      .attr("visibility", off ? "hidden" : "visible")
      .attr("cx", chart.x(px))
      .attr("cy", chart.y(raw));
    if (!off && at === 0) chart.cross.attr("x1", chart.x(px)).attr("x2", chart.x(px));
    const number = h("span", {class: "number", title: `${line.title}, step ${line.points[place][2]}: ${raw}`}, exact(raw));
    number.style.color = chart.lines.length > 1 ? runColour(line.at) : "";
    return number;
  });
  if (!off) {
    const [px, , step] = nearest(chart.lines[0], x);
    chart.place.text("step " + step).attr("x", Math.max(chart.left + 16, Math.min(chart.plot.clientWidth - 30, chart.x(px))));
  }
  chart.place.attr("visibility", off ? "hidden" : "visible");
  fill(chart.readout, parts);
}
