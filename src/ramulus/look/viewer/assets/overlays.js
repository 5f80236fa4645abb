// What lies over a page: search in the texts of a run, and the help with all keys.
import {h, fill, debounce, plural, figure} from "./dom.js";
import {get} from "./data.js";
import {go} from "./route.js";

const KEYS = [
  [
    "Everywhere",
    [
      ["/", "search in the texts of the run"],
      ["?", "this help"],
      ["d", "dark or light"],
      ["u", "up: from the tree to its step, to the run, to all runs"],
      ["s  S", "next, previous step with trees"],
      ["Esc", "close, or leave a field"],
    ],
  ],
  [
    "On a tree",
    [
      ["t  T", "next, previous tree, in the step page's order"],
      ["l  L", "next, previous leaf"],
      ["c  C", "next, previous colour"],
      ["f", "find in this tree"],
      ["n  N", "next, previous place found"],
      ["z", "zoom to what is chosen"],
      ["0", "the whole tree"],
      ["+  −", "zoom in, out"],
      ["m  p", "to the picture, to the panel"],
    ],
  ],
  [
    "In the picture",
    [
      ["← → ↑ ↓", "above, first below, siblings"],
      ["Home End", "the prompt, the first leaf below"],
      ["Enter", "zoom to what is chosen"],
      ["⇧ arrows", "move the picture"],
      ["wheel", "zoom; with ⇧ only down, with Alt only across"],
      ["drag", "move the picture"],
    ],
  ],
  [
    "On curves",
    [
      ["← →", "read values step by step"],
      ["Enter  click", "the trees nearest to this step"],
    ],
  ],
];

function overlay(label, ...parts) {
  const close = h("button", {type: "button", class: "quiet", "aria-label": "Close (Esc)", onclick: () => dialog.close()}, "Close");
  const dialog = h(
    "dialog",
    {"aria-label": label},
    h("div", {class: "dialog-head"}, h("h2", {}, label), h("span", {class: "room"}), close),
    ...parts,
  );
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

export function showHelp() {
  if (document.querySelector("dialog")) return;
  overlay(
    "Keys and colours",
    h(
      "div",
      {class: "help"},
      KEYS.map(([title, keys]) =>
        h(
          "section",
          {},
          h("h3", {}, title),
          h(
            "dl",
            {},
            keys.map(([key, text]) =>
              h(
                "div",
                {},
                h(
                  "dt",
                  {},
                  key.split("  ").map((one) => h("kbd", {}, one)),
                ),
                h("dd", {}, text),
              ),
            ),
          ),
        ),
      ),
    ),
    h(
      "p",
      {class: "soft"},
      "In a tree, across is the token position, a ribbon is as thick as there are leaves below it, and its colour is what the legend says. ✓ right, ✗ wrong, ✂ pruned, ○ without a grade, a number is the reward of a path that nothing called right or wrong. Control and invisible characters are shown by their number, as in ⟨U+202E⟩. The address bar always links to what is on screen.",
    ),
  );
}

export function showSearch(run, title) {
  if (document.querySelector("dialog")) return;
  const list = h("ul", {class: "lines results"});
  const status = h("p", {class: "soft", role: "status"}, `Texts of nodes and problems of ${title}. Two letters at least.`);
  let turn = 0;
  const ask = debounce(async () => {
    const wanted = input.value.trim();
    const mine = ++turn;
    if (wanted.length < 2) {
      fill(list);
      return;
    }
    status.textContent = "Searching…";
    try {
      const found = await get("/api/search", {run, q: wanted, limit: 100}, true);
      if (mine !== turn) return;
      status.textContent = found.length
        ? `${found.length === 100 ? "The first 100 places" : plural(found.length, "place")}`
        : "Nowhere in the trees of this run.";
      fill(
        list,
        found.map((place) => result(run, place, wanted, dialog)),
      );
    } catch (error) {
      if (mine === turn) status.textContent = error.message;
    }
  }, 180);
  const input = h("input", {
    type: "search",
    class: "wide",
    placeholder: "Search in texts",
    "aria-label": "Search in texts",
    oninput: ask,
    onkeydown: (event) => {
      if (event.key === "Enter" || event.key === "ArrowDown") {
        event.preventDefault();
        event.key === "Enter" ? list.querySelector("button")?.click() : list.querySelector("button")?.focus();
      }
    },
  });
  list.addEventListener("keydown", (event) => {
    const buttons = [...list.querySelectorAll("button")];
    const next = buttons.indexOf(document.activeElement) + ({ArrowDown: 1, ArrowUp: -1}[event.key] ?? NaN);
    if (Number.isNaN(next)) return;
    event.preventDefault();
    (buttons[next] ?? (next < 0 ? input : buttons.at(-1))).focus();
  });
  const dialog = overlay("Search", input, status, list);
  input.focus();
}

function result(run, place, wanted, dialog) {
  const end = place.at + place.length;
  return h(
    "li",
    {},
    h(
      "button",
      {
        type: "button",
        class: "line",
        onclick: () => {
          dialog.close();
          go({page: "tree", run, step: place.step, index: place.index, node: place.node, options: {find: wanted}});
        },
      },
      h("span", {class: "soft nowrap"}, `step ${figure(place.step)} · tree ${place.index} · node ${place.node}`),
      h(
        "span",
        {class: "mono grow wrap", dir: "auto"},
        place.excerpt.slice(0, place.at),
        h("mark", {class: "found"}, place.excerpt.slice(place.at, end)),
        place.excerpt.slice(end),
      ),
    ),
  );
}
