// What is chosen in a tree: a node with its tokens and siblings, or a whole path with its verdict.
import {h, fill, figure, oneLine, plural, say} from "./dom.js";
import {get} from "./data.js";
import {outcome, saidOf} from "./layout.js";
import {drawHeat, marked} from "./heat.js";
import {siblings, children, answersBelow} from "./relatives.js";

const REASONS = {
  first: "The first segments, all from the prompt.",
  star: "One of the independent paths from the prompt.",
  root: "One of the first paths, from the prompt.",
  branch: "The branching rule grew it from its parent.",
  continues: "The lower part of a text that a later branch divided.",
  fallback: "Its path went back to an earlier place to use a share that ended paths left over.",
  restart: "A new path from the prompt, for a share that ended paths left over.",
  hint: "It goes on from the beginning of a demonstration.",
  demonstration: "A demonstration: written by an expert, not sampled.",
  entropy: "A fork at a token of high entropy.",
  influence: "A fork at a step of high influence.",
  early: "A fork early in its path.",
};

const ENDS = {
  eos: "It ended by itself.",
  answer: "It ended with its answer.",
  length: "It was cut off at the length limit.",
  repetition: "It was stopped: it repeats itself.",
  pruned: "It was pruned: no more tokens were spent on it, and it is in no mean and no gradient.",
};

// Fills the panel; returns {colour(key), find(text)} to follow the picture.
export function nodePanel(page, row, open) {
  const node = page.tree.nodes[row];
  const panel = {page, row, node, open, key: page.key, wanted: page.route.options.find ?? "", heat: h("div", {class: "heat-holder"})};
  const leaf = !node.children.length && node.parent >= 0;
  const parts = [header(panel, leaf)];
  if (row === 0) parts.push(overview(panel));
  if (leaf) parts.push(pathSection(panel));
  parts.push(h("section", {}, h("h3", {}, row === 0 ? "Prompt, token by token" : "Text, token by token"), panel.heat));
  if (row !== 0) parts.push(siblings(panel), children(panel));
  const answers = leaf ? null : answersBelow(panel);
  if (answers) parts.splice(row === 0 ? 2 : 1, 0, answers);
  fill(page.panel, parts);
  page.panel.scrollTop = 0;
  drawHeat(panel);
  return {
    colour: (key) => {
      panel.key = key;
      panel.heatKey = undefined;
      drawHeat(panel);
    },
    find: (text) => {
      panel.wanted = text;
      drawHeat(panel);
    },
  };
}

function header(panel, leaf) {
  const {node, page} = panel;
  const became = leaf ? outcome(node) : null;
  const facts = [
    ["tokens", `${figure(node.start)}–${figure(node.start + node.length)}`],
    ["length", figure(node.length)],
    leaf ? null : ["paths below", figure(node.leaves)],
    ["value", figure(node.value)],
    leaf ? ["reward", figure(node.reward)] : null,
    node.author === "prompt" ? null : ["policy version", figure(node.version)],
    ...Object.entries(node.means ?? {}).map(([name, mean]) => [name, figure(mean)]),
  ].filter(Boolean);
  const copy = h("button", {type: "button", class: "quiet", title: "Copy a link to this node", onclick: () => copyLink(copy)}, "Copy link");
  const reason = [
    reasonOf(node),
    node.children.length
      ? branchReason(panel)
      : (ENDS[node.finish] ?? (node.finish ? `It ended: ${oneLine(node.finish, 160)}.` : leaf ? "It is still growing." : null)),
  ];
  return h(
    "section",
    {class: "head"},
    h(
      "h2",
      {},
      panel.row === 0 ? "Problem " : `${leaf ? "Path to node" : "Node"} ${node.id} `,
      node.author === "policy" || node.author === "prompt" ? null : h("span", {class: "flag"}, node.author),
      became ? h("span", {class: "badge " + became}, saidOf(node)) : null,
      h("span", {class: "room"}),
      node.parent >= 0
        ? h("button", {type: "button", class: "quiet", title: "To the node above (←)", onclick: () => panel.open(node.parent)}, "Above")
        : null,
      copy,
    ),
    h(
      "dl",
      {class: "facts"},
      facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
    ),
    panel.row === 0 ? null : h("p", {class: "why"}, reason.filter(Boolean).join(" ")),
  );
}

function reasonOf({why}) {
  if (!why) return null;
  const entropy = why.match(/^([\d.]+) nats$/);
  return entropy ? `A fork at a token of ${entropy[1]} nats of entropy.` : (REASONS[why] ?? `Grown because: ${oneLine(why, 160)}.`);
}

function branchReason({node, page}) {
  const whys = [...new Set(node.children.map((row) => page.tree.nodes[row].why).filter(Boolean))];
  return node.children.length > 1
    ? `It branches into ${node.children.length}${whys.length ? " (" + whys.map((why) => oneLine(why, 60)).join(", ") + ")" : ""}.`
    : null;
}

function copyLink(button) {
  const done = (text) => {
    button.textContent = text;
    say(text);
    setTimeout(() => {
      button.textContent = "Copy link";
    }, 1500);
  };
  if (!navigator.clipboard) {
    done("Copy it from the address bar");
    return;
  }
  navigator.clipboard.writeText(location.href).then(
    () => done("Copied"),
    () => done("Copy it from the address bar"),
  );
}

function overview({page}) {
  const {task, seed, visit, rounds, nodes} = page.tree;
  const facts = [
    ["task", oneLine(task.id, 60)],
    ["nodes", figure(nodes.length)],
    ["paths", figure(page.leaves.length)],
    ["tokens", figure(d3.sum(nodes, (node) => node.length))],
    ["rounds of growth", figure(rounds)],
    ["visit", figure(visit)],
    ["seed", String(seed)],
  ];
  return h(
    "section",
    {},
    h("pre", {class: "text", dir: "auto"}, task.text),
    h("p", {}, h("span", {class: "soft"}, "Reference answer "), h("b", {class: "mono", dir: "auto"}, task.answer || "–")),
    h(
      "dl",
      {class: "facts"},
      facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
    ),
  );
}

function pathSection(panel) {
  const holder = h("section", {class: "path"}, h("p", {class: "soft"}, "Reading the whole path…"));
  get("/api/leaf", {...panel.page.where, node: panel.node.id}).then(
    (leaf) => fill(holder, pathParts(panel, leaf)),
    (error) => fill(holder, h("p", {class: "empty"}, error.message)),
  );
  return holder;
}

function pathParts(panel, leaf) {
  const became = outcome(panel.node);
  const verdict = typeof leaf.verdict === "object" && leaf.verdict ? leaf.verdict : {verdict: leaf.verdict};
  const parts = Object.entries(verdict)
    .filter(([name]) => name !== "answer")
    .map(([name, value]) => h("span", {class: "fact"}, name + " ", h("b", {}, typeof value === "number" ? figure(value) : String(value))));
  const nodes = leaf.nodes.map((at) => panel.page.tree.nodes[at]).filter((node) => node && node.author !== "prompt");
  const whole = nodes
    .map((node) => node.text)
    .join("")
    .startsWith(leaf.text); // the nodes hold the end sign too
  const text = h(
    "pre",
    {class: "text whole", dir: "auto"},
    whole
      ? leaf.nodes
          .filter((at) => panel.page.tree.nodes[at]?.author !== "prompt")
          .map((at, place) =>
            h(
              "span",
              {
                class: (place % 2 ? "segment odd" : "segment") + (at === panel.row ? " chosen" : ""),
                title: `node ${panel.page.tree.nodes[at].id}`,
                onclick: () => panel.open(at),
              },
              marked(panel.page.tree.nodes[at].text, panel.wanted),
            ),
          )
      : marked(leaf.text, panel.wanted),
  );
  return [
    h(
      "table",
      {class: "verdict"},
      h(
        "tbody",
        {},
        h("tr", {}, h("th", {scope: "row"}, "Reference answer"), h("td", {class: "mono", dir: "auto"}, leaf.answer || "–")),
        h(
          "tr",
          {},
          h("th", {scope: "row"}, "Answer read by the verifier"),
          h(
            "td",
            {class: "mono " + became + "-ink", dir: "auto"},
            leaf.extracted === null || leaf.extracted === undefined ? "none" : String(leaf.extracted),
          ),
        ),
        h(
          "tr",
          {},
          h("th", {scope: "row"}, "Verdict"),
          h(
            "td",
            {},
            h("span", {class: "badge " + became}, saidOf(panel.node)),
            became === "scored" ? null : h("span", {class: "soft"}, ` reward ${figure(leaf.reward)}`),
          ),
        ),
      ),
    ),
    parts.length ? h("p", {class: "small"}, parts) : null,
    h("h3", {}, "Problem"),
    h("pre", {class: "text short", dir: "auto"}, marked(leaf.problem ?? "", panel.wanted)),
    h(
      "h3",
      {},
      "Full text ",
      h("span", {class: "soft"}, plural(leaf.tokens, "token") + (whole && nodes.length > 1 ? `, ${nodes.length} nodes` : "")),
    ),
    text,
  ];
}
