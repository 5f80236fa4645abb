// A tree: the picture with its colours on the left, what is chosen in it on the right.
import {h, fill, choice, figure, oneLine, plural, say, debounce, remember} from "./dom.js";
import {get} from "./data.js";
import {amend, go} from "./route.js";
import {colourings, colouring} from "./colour.js";
import {treeCanvas} from "./canvas.js";
import {outcome} from "./layout.js";
import {nodePanel} from "./nodepanel.js";
import {neighbour} from "./steppage.js";

const KEPT_OPTIONS = ["colour", "sort", "down", "filter", "text"];

export async function treePage(main, route, runs) {
  const where = {run: route.run, step: route.step, index: route.index};
  const tree = await get("/api/tree", where, false);
  const page = {main, route, runs, where, tree, details: new Map(), asked: new Set(), hits: [], chosen: 0};
  page.rows = new Map(tree.nodes.map((node, row) => [node.id, row]));
  tree.nodes.forEach((node) => {
    node.children = [];
  });
  tree.nodes.forEach((node, row) => {
    if (node.parent >= 0) tree.nodes[node.parent].children.push(row);
  });
  page.leaves = tree.nodes.map((node, row) => row).filter((row) => !tree.nodes[row].children.length && tree.nodes[row].parent >= 0);
  const offered = colourings(tree);
  const wanted = route.options.colour ?? remember("colour");
  page.key = offered.some(([key]) => key === wanted) ? wanted : "value";
  build(page, offered);
  const row = route.node === null ? 0 : page.rows.get(route.node);
  if (row === undefined) say("This tree has no node " + route.node + ".");
  pickRow(page, row ?? 0, false, false);
  if (route.options.find) find(page, route.options.find, false);
  return {
    keys: keysOf(page, offered),
    close: () => page.picture.close(),
    colours: () => recolour(page, page.key),
    goTo: (next) => {
      page.route = next;
      pickRow(page, page.rows.get(next.node) ?? 0, true, false);
      if (next.options.find) find(page, next.options.find, false);
    },
  };
}

function build(page, offered) {
  page.legend = h("span", {id: "legend"});
  page.tip = h("div", {class: "tip", role: "presentation", hidden: true});
  page.stage = h("div", {class: "stage"}, page.tip);
  page.panel = h("aside", {class: "panel", "aria-label": "What is chosen", tabindex: "-1"});
  page.found = h("output", {class: "soft", role: "status"});
  const button = (text, title, act) => h("button", {type: "button", title, "aria-label": title, onclick: act}, text);
  page.finder = h("input", {
    type: "search",
    id: "find",
    placeholder: "text in this tree",
    value: page.route.options.find ?? "",
    oninput: debounce((event) => find(page, event.target.value), 150),
    onkeydown: (event) => {
      if (event.key === "Enter") nextHit(page, event.shiftKey ? -1 : 1);
    },
  });
  page.select = choice("Colour", offered, page.key, (key) => recolour(page, key), "colour");
  const splitter = h("div", {
    class: "splitter",
    role: "separator",
    "aria-orientation": "vertical",
    tabindex: "0",
    "aria-valuemin": 300,
    "aria-valuemax": 2000,
    "aria-label": "Width of the panel: left and right arrow",
  });
  page.holder = h(
    "div",
    {class: "treepage"},
    h(
      "div",
      {class: "drawing"},
      h(
        "div",
        {class: "tools"},
        page.select,
        page.legend,
        h("span", {class: "room"}),
        h("label", {class: "field"}, h("span", {}, "Find"), page.finder),
        page.found,
        h(
          "span",
          {class: "joined"},
          button("−", "Zoom out (−)", () => page.picture.zoom(1 / 1.5)),
          button("Fit", "The whole tree (0)", () => page.picture.fit()),
          button("+", "Zoom in (+)", () => page.picture.zoom(1.5)),
        ),
      ),
      page.stage,
    ),
    splitter,
    page.panel,
  );
  fill(page.main, page.holder);
  slide(page, splitter);
  page.picture = treeCanvas(page.stage, {
    choose: (row) => pickRow(page, row, false),
    hover: (row, event) => hover(page, row, event),
    detail: (row) => detail(page, row),
  });
  page.picture.canvas.addEventListener("keydown", (event) => walk(page, event));
  page.colours = colouring(page.tree, page.key);
  page.picture.show(page.tree, page.colours);
  fill(page.legend, page.colours.legend());
}

function recolour(page, key) {
  page.key = key;
  page.colours = colouring(page.tree, key);
  remember("colour", key);
  page.route.options.colour = key === "value" ? null : key;
  page.select.querySelector("select").value = key;
  fill(page.legend, page.colours.legend());
  page.picture.colour(page.colours);
  page.shown?.colour(key);
  amend(page.route);
  say("Colour: " + page.colours.name);
}

function pickRow(page, row, reveal = true, written = true) {
  const node = page.tree.nodes[row];
  page.chosen = row;
  page.picture.choose(row, reveal);
  page.route.node = row === 0 ? null : node.id;
  if (written) amend(page.route);
  const inside = page.panel.contains(document.activeElement);
  page.shown = nodePanel(page, row, (next) => pickRow(page, next));
  if (inside) page.panel.focus({preventScroll: true}); // what had the focus is gone
  page.picture.canvas.setAttribute(
    "aria-label",
    `Tree of ${page.tree.nodes.length} nodes and ${page.leaves.length} paths. Arrow keys move in it, Enter zooms to what is chosen.`,
  );
  const end = node.children.length ? plural(node.leaves, "path") + " below" : outcome(node);
  say(`Node ${node.id}, token ${node.start}, ${node.length} tokens, ${end}, value ${figure(node.value)}. ${oneLine(node.text, 100)}`);
}

function hover(page, row, event) {
  if (row < 0) {
    page.tip.hidden = true;
    return;
  }
  const node = page.tree.nodes[row];
  const value = page.colours.of(node);
  const facts = [
    `node ${node.id}`,
    `tokens ${figure(node.start)}–${figure(node.start + node.length)}`,
    node.children.length ? plural(node.leaves, "path") : outcome(node),
    `value ${figure(node.value)}`,
    page.key === "value" || page.key === "author" ? null : `${page.key} ${figure(value)}`,
  ];
  if (page.tipRow !== row || page.tip.hidden)
    fill(
      page.tip,
      h("p", {class: "soft"}, facts.filter(Boolean).join(" · ")),
      h("p", {class: "mono", dir: "auto"}, oneLine(node.text, 220) || "(no text)"),
    );
  page.tipRow = row;
  page.tip.hidden = false;
  const wide = page.stage.clientWidth;
  page.tip.style.left = Math.max(4, Math.min(wide - page.tip.offsetWidth - 8, event.offsetX + 14)) + "px";
  const below = event.offsetY + 18;
  page.tip.style.top =
    (below + page.tip.offsetHeight > page.stage.clientHeight ? event.offsetY - page.tip.offsetHeight - 12 : below) + "px";
}

// The tokens of a node for the picture: asked for once, drawn when they are there.
function detail(page, row) {
  const node = page.tree.nodes[row];
  if (page.details.has(row)) return page.details.get(row);
  if (!page.asked.has(row) && page.asked.size < 4000) {
    page.asked.add(row);
    nodeDetail(page, row).then(
      (answer) => {
        page.details.set(row, answer);
        page.picture.redraw();
      },
      () => page.details.set(row, null),
    );
  }
  return node && null;
}

function nodeDetail(page, row) {
  return get("/api/node", {...page.where, node: page.tree.nodes[row].id});
}

function find(page, text, written = true) {
  const wanted = text.toLowerCase();
  page.hits = wanted
    ? page.tree.nodes.map((node, row) => row).filter((row) => page.tree.nodes[row].text.toLowerCase().includes(wanted))
    : [];
  page.finder.value = text;
  page.found.textContent = wanted
    ? page.hits.length
      ? `${page.hits.length} ${page.hits.length === 1 ? "node" : "nodes"}`
      : "nowhere"
    : "";
  page.picture.mark(page.hits);
  page.route.options.find = text || null;
  if (written) amend(page.route);
  page.shown?.find(text);
}

function nextHit(page, way) {
  if (!page.hits.length) return;
  const later = way > 0 ? page.hits.find((row) => row > page.chosen) : page.hits.findLast((row) => row < page.chosen);
  pickRow(page, later ?? (way > 0 ? page.hits[0] : page.hits.at(-1)));
}

// Arrow keys on the picture: along the tree, with shift across the picture.
function walk(page, event) {
  const {nodes} = page.tree;
  const node = nodes[page.chosen];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.shiftKey && event.key.startsWith("Arrow")) {
    const [x, y] = {ArrowLeft: [80, 0], ArrowRight: [-80, 0], ArrowUp: [0, 80], ArrowDown: [0, -80]}[event.key];
    page.picture.pan(x, y);
    event.preventDefault();
    return;
  }
  const family = node.parent < 0 ? [page.chosen] : nodes[node.parent].children;
  const at = family.indexOf(page.chosen);
  const next = {
    ArrowLeft: () => node.parent,
    ArrowRight: () => node.children[0],
    ArrowUp: () => family[at - 1] ?? beside(page, -1),
    ArrowDown: () => family[at + 1] ?? beside(page, 1),
    Home: () => 0,
    End: () => page.leaves.find((row) => row >= page.chosen),
  }[event.key];
  if (event.key === "Enter") page.picture.zoomTo(page.chosen);
  else if (!next) return;
  else if (next() >= 0) pickRow(page, next());
  event.preventDefault();
}

// Past the last sibling: the nearest node above or below that covers the same tokens.
function beside(page, way) {
  const {items} = page.picture.state.layout;
  const mine = items[page.chosen];
  const fit = (item) => item.from <= mine.from + 0.5 && (item.to > mine.from || item.from === mine.from) && item !== mine && item.parent;
  const list = items.filter((item) => fit(item) && (way > 0 ? item.top >= mine.bottom : item.bottom <= mine.top));
  return list.length ? list[d3.minIndex(list, (item) => Math.abs(item.middle - mine.middle))].row : undefined;
}

function slide(page, splitter) {
  const set = (width) => {
    const size = Math.round(Math.max(300, Math.min(window.innerWidth * 0.7, width)));
    page.holder.style.setProperty("--panel-width", size + "px");
    splitter.setAttribute("aria-valuenow", size);
    remember("panel", size);
  };
  set(Number(remember("panel")) || Math.min(520, Math.max(380, window.innerWidth * 0.33)));
  splitter.addEventListener("pointerdown", (event) => splitter.setPointerCapture(event.pointerId));
  splitter.addEventListener("pointermove", (event) => {
    if (splitter.hasPointerCapture(event.pointerId)) set(window.innerWidth - event.clientX);
  });
  splitter.addEventListener("keydown", (event) => {
    const way = {ArrowLeft: 40, ArrowRight: -40}[event.key];
    if (way) {
      set(page.panel.clientWidth + way);
      event.preventDefault();
    }
  });
}

export async function nextTree(page, way) {
  const trees = await get("/api/steps", {run: page.where.run, step: page.where.step}).catch(() => []);
  const next = neighbour(trees, page.route.options, page.where.index, way);
  if (next)
    go({
      ...page.route,
      index: next.index,
      node: null,
      options: Object.fromEntries(KEPT_OPTIONS.map((name) => [name, page.route.options[name]])),
    });
}

function nextLeaf(page, way) {
  const later = way > 0 ? page.leaves.find((row) => row > page.chosen) : page.leaves.findLast((row) => row < page.chosen);
  if (later === undefined) say(way > 0 ? "This is the last path." : "This is the first path.");
  else pickRow(page, later);
}

function keysOf(page, offered) {
  const turn = (way) => {
    const at = offered.findIndex(([key]) => key === page.key);
    recolour(page, offered[(at + way + offered.length) % offered.length][0]);
  };
  return {
    l: () => nextLeaf(page, 1),
    L: () => nextLeaf(page, -1),
    c: () => turn(1),
    C: () => turn(-1),
    "+": () => page.picture.zoom(1.5),
    "=": () => page.picture.zoom(1.5),
    "-": () => page.picture.zoom(1 / 1.5),
    0: () => page.picture.fit(),
    z: () => page.picture.zoomTo(page.chosen),
    f: () => page.finder.focus(),
    n: () => nextHit(page, 1),
    N: () => nextHit(page, -1),
    p: () => page.panel.focus(),
    m: () => page.picture.canvas.focus(),
  };
}
