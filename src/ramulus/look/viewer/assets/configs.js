// The configuration of runs, every setting by its dotted path, and where they differ.
import {h, fill, toggle, empty} from "./dom.js";
import {get} from "./data.js";
import {runColour} from "./metrics.js";

// `series` are the runs, {id, title} each; the first is what the others are compared with.
export async function drawConfig(host, series) {
  const configs = await Promise.all(series.map((one) => get("/api/config", {run: one.id})));
  const several = configs.length > 1;
  const names = [...new Set(configs.flatMap((config) => Object.keys(config)))].sort();
  if (!names.length) {
    fill(host, empty("This run has no saved configuration (run.json)."));
    return;
  }
  const differs = (name) => configs.some((config) => JSON.stringify(config[name]) !== JSON.stringify(configs[0][name]));
  const state = {only: several, wanted: ""};
  const table = h("div", {class: "scroll"});
  const draw = () => {
    const rows = names.filter(
      (name) =>
        (!state.only || differs(name)) &&
        (name + " " + configs.map((config) => JSON.stringify(config[name])).join(" ")).toLowerCase().includes(state.wanted),
    );
    const cell = (value) => (value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));
    fill(
      table,
      rows.length
        ? h(
            "table",
            {class: "config"},
            h(
              "thead",
              {},
              h(
                "tr",
                {},
                h("th", {scope: "col"}, "Setting"),
                series.map((one, at) => {
                  const head = h("th", {scope: "col"}, one.title);
                  if (several) head.style.color = runColour(at);
                  return head;
                }),
              ),
            ),
            h(
              "tbody",
              {},
              rows.map((name) =>
                h(
                  "tr",
                  {},
                  h("th", {scope: "row"}, name),
                  configs.map((config) =>
                    h(
                      "td",
                      {class: JSON.stringify(config[name]) === JSON.stringify(configs[0][name]) ? null : "differs"},
                      cell(config[name]),
                    ),
                  ),
                ),
              ),
            ),
          )
        : empty(state.only ? "The configurations of these runs do not differ." : "No setting has this in its name or value."),
    );
  };
  fill(
    host,
    h(
      "div",
      {class: "tools"},
      h(
        "label",
        {class: "field"},
        h("span", {}, "Setting"),
        h("input", {
          type: "search",
          placeholder: "all",
          oninput: (event) => {
            state.wanted = event.target.value.toLowerCase();
            draw();
          },
        }),
      ),
      several
        ? toggle("Only differences", state.only, (on) => {
            state.only = on;
            draw();
          })
        : h("span", {class: "soft"}, "Tick a second run on the left to see the differences."),
    ),
    table,
  );
  draw();
}
