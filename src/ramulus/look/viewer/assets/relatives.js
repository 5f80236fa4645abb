// What lies around a node: its siblings side by side, its children, and the answers that the paths below it reached.
import {h, fill, figure, oneLine, plural} from "./dom.js";
import {outcome, signOf, verdictOf} from "./layout.js";
import {differences} from "./diff.js";

const SIBLINGS_AT_ONCE = 8;

// Which answers the paths below reached, the most frequent first.
export function answersBelow(panel) {
  const {page, row} = panel;
  const {nodes} = page.tree;
  const below = (from) => {
    const stack = [from];
    const found = [];
    while (stack.length) {
      const at = stack.pop();
      if (nodes[at].children.length) stack.push(...nodes[at].children);
      else found.push(at);
    }
    return found;
  };
  const leaves = below(row).filter((at) => at !== 0);
  if (!leaves.length) return null;
  const groups = d3
    .rollups(
      leaves,
      (rows) => rows,
      (at) => `${outcome(nodes[at])}\u0000${signOf(nodes[at])}\u0000${verdictOf(nodes[at]).answer ?? ""}`,
    )
    .sort((a, b) => b[1].length - a[1].length);
  const lines = groups.slice(0, 8).map(([key, rows]) => {
    const [became, sign, answer] = key.split("\u0000");
    const bar = h("span", {class: "bar " + became, "aria-hidden": "true"});
    bar.style.width = Math.max(2, (rows.length / leaves.length) * 100) + "%";
    return h(
      "li",
      {},
      h(
        "button",
        {type: "button", class: "line", title: "To the first of these paths", onclick: () => panel.open(Math.min(...rows))},
        h("span", {class: became + "-ink"}, sign),
        h("span", {class: "mono grow", dir: "auto"}, answer ? oneLine(answer, 40) : became === "pruned" ? "pruned" : "no answer read"),
        h("span", {class: "track"}, bar),
        h("span", {class: "number"}, `${rows.length}`),
      ),
    );
  });
  return h(
    "section",
    {},
    h("h3", {}, "Answers of the paths below"),
    h("ul", {class: "lines"}, lines),
    groups.length > 8 ? h("p", {class: "soft small"}, `and ${groups.length - 8} other answers`) : null,
  );
}

export function siblings(panel) {
  const {page, node, row} = panel;
  const family = page.tree.nodes[node.parent].children;
  if (family.length < 2) return null;
  const holder = h("section", {});
  const draw = (most) => {
    const others = family.filter((at) => at !== row);
    const columns = [row, ...others.slice(0, most)].map((at) => siblingColumn(panel, at));
    fill(
      holder,
      h("h3", {}, "Siblings side by side ", h("span", {class: "soft"}, `${family.length}; what differs from this node is marked`)),
      h("div", {class: "siblings", tabindex: "0", role: "group", "aria-label": "Siblings side by side"}, columns),
      others.length > most ? h("button", {type: "button", onclick: () => draw(others.length)}, `Show all ${family.length}`) : null,
    );
  };
  draw(SIBLINGS_AT_ONCE);
  return holder;
}

function siblingColumn(panel, at) {
  const {page, node, row} = panel;
  const other = page.tree.nodes[at];
  const runs = at === row ? [[other.text, true]] : differences(other.text, node.text);
  const became = other.children.length ? null : outcome(other);
  const title = h(
    "button",
    {type: "button", class: "line", disabled: at === row, onclick: () => panel.open(at)},
    at === row ? "this node" : `node ${other.id}`,
    h(
      "span",
      {class: "soft"},
      became ? h("span", {class: became + "-ink"}, signOf(other)) : plural(other.leaves, "path"),
      ` value ${figure(other.value)}`,
    ),
  );
  return h(
    "div",
    {class: at === row ? "sibling mine" : "sibling"},
    title,
    h(
      "pre",
      {class: "text", dir: "auto"},
      runs.map(([text, same]) => (same ? text : h("mark", {}, text))),
    ),
    other.text ? null : h("p", {class: "soft"}, "(no text)"),
  );
}

export function children({page, node, open}) {
  if (!node.children.length) return null;
  const lines = node.children.slice(0, 40).map((row) => {
    const child = page.tree.nodes[row];
    const became = child.children.length ? null : outcome(child);
    return h(
      "li",
      {},
      h(
        "button",
        {type: "button", class: "line", onclick: () => open(row)},
        h("span", {class: became ? became + "-ink" : "soft"}, became ? signOf(child) : "→"),
        h("span", {class: "mono grow", dir: "auto"}, oneLine(child.text, 70) || "(no text)"),
        h("span", {class: "soft"}, `${child.children.length ? plural(child.leaves, "path") : ""} ${figure(child.value)}`),
      ),
    );
  });
  return h(
    "section",
    {},
    h("h3", {}, "Goes on with"),
    h("ul", {class: "lines"}, lines),
    node.children.length > 40 ? h("p", {class: "soft small"}, `and ${node.children.length - 40} more`) : null,
  );
}
