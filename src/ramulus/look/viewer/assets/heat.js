// Texts with what matters in them marked: a heat of any column over the tokens, and the words that were searched for.
import {h, fill, figure, oneLine, say, shown} from "./dom.js";
import {get} from "./data.js";
import {byNumber, inkOn} from "./colour.js";

const TOKENS_AT_ONCE = 1200;

// Text with the words that were searched for marked.
export function marked(text, wanted) {
  const lower = text.toLowerCase();
  const word = (wanted ?? "").toLowerCase();
  if (!word || lower.length !== text.length) return [text];
  const parts = [];
  let from = 0;
  for (let at = lower.indexOf(word); at >= 0 && parts.length < 2000; at = lower.indexOf(word, from)) {
    parts.push(text.slice(from, at), h("mark", {class: "found"}, text.slice(at, at + word.length)));
    from = at + word.length;
  }
  return [...parts, text.slice(from)];
}

export async function drawHeat(panel) {
  const {page, row, node} = panel;
  if (!node.length) {
    fill(panel.heat, h("p", {class: "soft"}, "No tokens: a path ended here, and others went on from the same place."));
    return;
  }
  let detail;
  try {
    detail = await get("/api/node", {...page.where, node: node.id});
  } catch (error) {
    fill(panel.heat, h("pre", {class: "text", dir: "auto"}, marked(node.text, panel.wanted)), h("p", {class: "soft small"}, error.message));
    return;
  }
  if (page.chosen !== row) return;
  page.details.set(row, detail);
  const names = Object.keys(detail.columns).filter((name) => detail.columns[name].length);
  const key =
    panel.heatKey === ""
      ? ""
      : names.includes(panel.key)
        ? panel.key
        : names.includes(panel.heatKey)
          ? panel.heatKey
          : node.author === "prompt"
            ? ""
            : (names.find((name) => name === "entropy") ?? names[0]);
  const select = h(
    "select",
    {
      "aria-label": "Heat of the tokens",
      onchange: () => {
        panel.heatKey = panel.key = select.value;
        drawHeat(panel);
      },
    },
    ["", ...names].map((name) => h("option", {value: name}, name || "none")),
  );
  select.value = key;
  const scale = key
    ? byNumber(key, [...detail.columns[key], ...page.tree.nodes.map((one) => one.means?.[key])].filter(Number.isFinite), key)
    : null;
  const readout = h(
    "p",
    {class: "readout small", "aria-live": "off"},
    "Point at a token, or move over it with the arrow keys, for its numbers.",
  );
  const text = h("div", {
    class: "heat mono",
    tabindex: "0",
    role: "group",
    dir: "auto",
    "aria-label": `${node.length} tokens; left and right arrow read them`,
  });
  const state = {most: TOKENS_AT_ONCE, at: -1};
  const add = (from, to) =>
    text.append(
      ...detail.pieces
        .slice(from, to)
        .map((piece, at) => tokenSpan(piece, key ? detail.columns[key][from + at] : null, scale, panel.wanted, from + at)),
    );
  const readToken = (at) => {
    text.querySelector(".at")?.classList.remove("at");
    text.children[at]?.classList.add("at");
    state.at = at;
    fill(
      readout,
      h("b", {class: "mono"}, oneLine(JSON.stringify(detail.pieces[at]), 40)),
      ` token ${node.start + at}`,
      names.map((name) => [" · ", name + " ", h("b", {}, figure(detail.columns[name][at]))]).flat(),
    );
    return readout.textContent;
  };
  text.addEventListener("pointerover", (event) => {
    const at = event.target.dataset?.at;
    if (at !== undefined) readToken(Number(at));
  });
  text.addEventListener("keydown", (event) => {
    const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!way) return;
    event.preventDefault();
    say(readToken(Math.max(0, Math.min(text.children.length - 1, state.at + way))));
    text.children[state.at].scrollIntoView({block: "nearest"});
  });
  add(0, state.most);
  const more =
    detail.pieces.length > state.most
      ? h(
          "button",
          {
            type: "button",
            onclick: () => {
              add(state.most, state.most + 4 * TOKENS_AT_ONCE);
              state.most += 4 * TOKENS_AT_ONCE;
              if (state.most >= detail.pieces.length) more.remove();
            },
          },
          `Show more of ${figure(detail.pieces.length)} tokens`,
        )
      : null;
  const above = h("details", {class: "above"}, h("summary", {}, "Text above this node"), h("pre", {class: "text", dir: "auto"}));
  above.addEventListener(
    "toggle",
    () => {
      above.lastChild.textContent = shown(detail.prefix);
    },
    {once: true},
  );
  fill(
    panel.heat,
    names.length
      ? h("div", {class: "tools tight"}, [h("label", {class: "field"}, h("span", {}, "Heat"), select), scale?.legend()].filter(Boolean))
      : null,
    text,
    more,
    readout,
    detail.prefix ? above : null,
  );
}

function tokenSpan(piece, value, scale, wanted, at) {
  const span = h("span", {"data-at": at}, piece.replaceAll("\n", "⏎\n"));
  if (scale && Number.isFinite(value)) {
    const colour = scale.token(value);
    span.style.backgroundColor = colour;
    span.style.color = inkOn(colour);
  }
  if (wanted && piece.trim() && wanted.toLowerCase().includes(piece.trim().toLowerCase())) span.classList.add("found");
  return span;
}
