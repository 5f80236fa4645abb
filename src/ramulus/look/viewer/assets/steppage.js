// A step: all its trees as small pictures, sorted and filtered.
import {h, fill, choice, toggle, empty, figure, percent, oneLine, plural, say, debounce} from "./dom.js";
import {get} from "./data.js";
import {amend, hashOf} from "./route.js";
import {byNumber} from "./colour.js";
import {drawSmall} from "./layout.js";

const SORTS = [
  ["index", "order"],
  ["pass_rate", "pass rate"],
  ["reward", "reward"],
  ["spread", "reward spread"],
  ["reuse", "reuse"],
  ["length", "length"],
  ["paths", "paths"],
];
const FILTERS = [
  ["all_wrong", "All wrong"],
  ["mixed", "Mixed"],
  ["all_right", "All right"],
  ["pruned", "Pruned"],
  ["rebranched", "Re-branched"],
  ["demonstration", "Demonstration"],
];
const OUTCOMES = new Set(["all_wrong", "all_right", "mixed"]);
const DRAWN_AT_ONCE = 240;

// The trees of a step in the order and choice that a link says; `options` is that of a route.
function chosenTrees(trees, options) {
  const flags = (options.filter ?? "").split(",").filter(Boolean);
  const wanted = (options.text ?? "").toLowerCase();
  const ends = flags.filter((flag) => OUTCOMES.has(flag));
  const others = flags.filter((flag) => !OUTCOMES.has(flag));
  const sort = options.sort ?? "index";
  const sign = options.down === "1" ? -1 : 1;
  const fits = (tree) =>
    (!ends.length || ends.some((flag) => tree.flags.includes(flag))) &&
    others.every((flag) => tree.flags.includes(flag)) &&
    (!wanted || (tree.text + " " + tree.task).toLowerCase().includes(wanted));
  const known = (tree) => tree[sort] !== null && tree[sort] !== undefined;
  return trees
    .filter(fits)
    .sort((a, b) => known(b) - known(a) || (known(a) ? sign * d3.ascending(a[sort], b[sort]) : 0) || a.index - b.index);
}

export async function stepPage(main, route, runs) {
  const run = runs.find((one) => one.id === route.run);
  const page = {route, run, trees: [], most: DRAWN_AT_ONCE};
  page.trees = await get("/api/steps", {run: route.run, step: route.step}, run.live);
  page.grid = h("ul", {class: "cards"});
  page.count = h("span", {class: "soft", role: "status"});
  page.more = h("p", {class: "more"});
  const state = page.route.options;
  const set = (name, value) => {
    state[name] = value;
    page.most = DRAWN_AT_ONCE;
    amend(page.route);
    drawCards(page);
  };
  const direction = h("button", {
    type: "button",
    class: "chip",
    id: "direction",
    onclick: () => {
      set("down", state.down === "1" ? null : "1");
      label();
    },
  });
  const label = () => {
    direction.textContent = state.down === "1" ? "↓" : "↑";
    direction.setAttribute("aria-label", state.down === "1" ? "High first; turn round" : "Low first; turn round");
    direction.title = direction.getAttribute("aria-label");
  };
  label();
  const flags = new Set((state.filter ?? "").split(",").filter(Boolean));
  const chips = FILTERS.map(([flag, name]) =>
    toggle(`${name} ${page.trees.filter((tree) => tree.flags.includes(flag)).length}`, flags.has(flag), (on) => {
      if (on) flags.add(flag);
      else flags.delete(flag);
      set("filter", [...flags].join(","));
    }),
  );
  chips.forEach((chip, at) => {
    chip.dataset.flag = FILTERS[at][0];
  });
  const legend = byNumber("value", page.trees.flatMap((tree) => tree.skeleton.map((row) => row[4])).filter(Number.isFinite)).legend();
  fill(
    main,
    h(
      "div",
      {class: "page"},
      h(
        "div",
        {class: "tools"},
        choice("Sort by", SORTS, state.sort ?? "index", (value) => set("sort", value === "index" ? null : value), "sort"),
        direction,
        h("span", {class: "chips", role: "group", "aria-label": "Filters"}, chips),
        h(
          "label",
          {class: "field"},
          h("span", {}, "Problem"),
          h("input", {
            type: "search",
            id: "problem",
            placeholder: "any",
            value: state.text ?? "",
            oninput: debounce((event) => set("text", event.target.value), 120),
          }),
        ),
        page.count,
        h("span", {class: "room"}),
        h("span", {class: "field short"}, h("span", {}, "Value"), legend),
      ),
      page.grid,
      page.more,
    ),
  );
  drawCards(page);
  return {keys: {}, colours: () => drawCards(page)};
}

function drawCards(page) {
  const list = chosenTrees(page.trees, page.route.options);
  const paint = byNumber("value", page.trees.flatMap((tree) => tree.skeleton.map((row) => row[4])).filter(Number.isFinite)).token;
  page.seen?.disconnect();
  page.seen = new IntersectionObserver(
    (entries) =>
      entries.forEach((entry) => {
        if (!entry.isIntersecting) return;
        page.seen.unobserve(entry.target);
        drawSmall(entry.target, page.trees.find((tree) => tree.index === Number(entry.target.dataset.index)).skeleton, paint);
      }),
    {rootMargin: "300px"},
  );
  page.count.textContent =
    list.length === page.trees.length ? plural(list.length, "tree") : `${figure(list.length)} of ${plural(page.trees.length, "tree")}`;
  const drawn = list.slice(0, page.most);
  if (list.length)
    fill(
      page.grid,
      drawn.map((tree) => card(page, tree)),
    );
  else
    fill(
      page.grid,
      h(
        "li",
        {class: "empty"},
        page.trees.length ? "No tree of this step passes these filters. Switch one off." : "This step holds no trees yet.",
      ),
    );
  fill(
    page.more,
    list.length > drawn.length
      ? h(
          "button",
          {
            type: "button",
            onclick: () => {
              page.most += DRAWN_AT_ONCE;
              drawCards(page);
            },
          },
          `Show more: ${figure(list.length - drawn.length)} are left`,
        )
      : null,
  );
}

function card(page, tree) {
  const canvas = h("canvas", {class: "small", "data-index": tree.index, "aria-hidden": "true"});
  page.seen.observe(canvas);
  const {sort, down, filter, text} = page.route.options;
  const href = hashOf({page: "tree", run: page.route.run, step: page.route.step, index: tree.index, options: {sort, down, filter, text}});
  const flags = FILTERS.filter(([flag]) => tree.flags.includes(flag) && !OUTCOMES.has(flag)).map(([, name]) =>
    h("span", {class: "flag"}, name.toLowerCase()),
  );
  const facts = [
    tree.pass_rate === null && Number.isFinite(tree.reward)
      ? ["reward " + figure(tree.reward), "Mean reward: nothing calls a path of this tree correct"]
      : [tree.pass_rate === null ? "no grade" : percent(tree.pass_rate), "Pass rate"],
    [plural(tree.paths, "path"), "Paths"],
    ["×" + figure(Math.round((tree.reuse ?? 0) * 100) / 100), "Reuse: tokens in all paths for each one sampled"],
    [figure(Math.round(tree.length ?? 0)) + " tok", "Mean length in tokens"],
    tree.spread ? ["±" + figure(Math.round(tree.spread * 100) / 100), "Reward spread"] : null,
  ];
  return h(
    "li",
    {class: "card"},
    h(
      "a",
      {href},
      canvas,
      h("span", {class: "problem", dir: "auto"}, oneLine(tree.text || tree.task, 90)),
      h(
        "span",
        {class: "facts"},
        facts.filter(Boolean).map(([fact, title], at) => h("span", {title, class: at === 0 ? rateClass(tree) : null}, fact)),
        flags,
      ),
    ),
  );
}

function rateClass(tree) {
  return tree.pass_rate === null ? "soft" : tree.pass_rate >= 0.5 ? "right-ink" : "wrong-ink";
}

// The tree before or after one, in the order that the step page shows them in.
export function neighbour(trees, options, index, way) {
  const list = chosenTrees(trees, options);
  const at = list.findIndex((tree) => tree.index === index);
  const next = list[at < 0 ? 0 : at + way];
  if (!next) say(way > 0 ? "This is the last tree." : "This is the first tree.");
  return next ?? null;
}
