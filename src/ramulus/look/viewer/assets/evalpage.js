// Evaluations of a run: their numbers in a table, their answers problem by problem.
import {h, fill, choice, empty, figure, percent, oneLine, plural, debounce} from "./dom.js";
import {get} from "./data.js";
import {amend, hashOf} from "./route.js";

const PLAIN = new Set(["step", "name", "intervals", "problems", "samples", "temperature"]);
const FAMILIES = ["mean", "avg", "pass", "maj", "greedy", "reward", "length", "truncated"];
const PROBLEMS_AT_ONCE = 100;

export async function evalPage(main, route) {
  const rows = await get("/api/evals", {run: route.run}, true);
  const back = h("a", {href: hashOf({page: "run", run: route.run})}, "Curves");
  if (!rows.length) {
    fill(
      main,
      h(
        "div",
        {class: "page narrow"},
        h("h1", {}, "Evaluations"),
        empty("This run holds no evaluation. Set `eval_every` in the recipe; or `ramulus eval … --out FOLDER`, then `ramulus view FOLDER`."),
        h("p", {}, back),
      ),
    );
    return {};
  }
  const page = {route, rows, holder: h("section", {class: "answers"})};
  const names = [
    ...new Set(rows.flatMap((row) => Object.keys(row).filter((name) => typeof row[name] === "number" && !PLAIN.has(name)))),
  ].sort((a, b) => rankOf(a) - rankOf(b) || d3.ascending(...[a, b].map((name) => Number(name.split("@")[1] ?? 0))));
  const chosen = rows.find((row) => row.step === route.step && (!route.options.name || row.name === route.options.name)) ?? rows.at(-1);
  const head = h(
    "tr",
    {},
    ["Step", "Evaluation", "Problems", ...names].map((name, at) => h("th", {scope: "col", class: at === 1 ? null : "right"}, name)),
  );
  const body = rows.map((row) => {
    const link = hashOf({page: "evals", run: route.run, step: row.step, options: {name: row.name}});
    return h(
      "tr",
      {class: row === chosen ? "chosen" : null},
      h("td", {class: "right"}, figure(row.step)),
      h("td", {}, h("a", {href: link, "aria-current": row === chosen ? "true" : null}, row.name ?? "answers")),
      h("td", {class: "right"}, figure(row.problems)),
      names.map((name) =>
        h("td", {class: "right", title: interval(row, name)}, figure(row[name]), h("span", {class: "soft interval"}, interval(row, name))),
      ),
    );
  });
  fill(
    main,
    h(
      "div",
      {class: "page"},
      h("h1", {}, "Evaluations"),
      h("div", {class: "scroll"}, h("table", {class: "list"}, h("thead", {}, head), h("tbody", {}, body))),
      page.holder,
    ),
  );
  await answers(page, chosen);
  return {};
}

function rankOf(name) {
  const at = FAMILIES.indexOf(name.split("@")[0]);
  return at < 0 ? FAMILIES.length : at;
}

function interval(row, name) {
  const pair = row.intervals?.[name];
  return pair ? `${figure(Math.round(pair[0] * 1000) / 1000)}–${figure(Math.round(pair[1] * 1000) / 1000)}` : "";
}

async function answers(page, row) {
  const same = page.rows.filter((one) => one.step === row.step).length > 1;
  let list;
  try {
    list = await get("/api/answers", {run: page.route.run, step: row.step, ...(same && row.name ? {name: row.name} : {})});
  } catch (error) {
    fill(page.holder, empty(error.message));
    return;
  }
  const problems = list.map((problem, at) => ({...problem, at, given: problem.sampled ?? [], share: share(problem.sampled ?? [])}));
  const state = {sort: page.route.options.sort ?? "at", wanted: "", most: PROBLEMS_AT_ONCE};
  const holder = h("div", {class: "problems"});
  const draw = () => {
    const order = {
      at: (one) => one.at,
      hard: (one) => one.share ?? 2,
      easy: (one) => -(one.share ?? -2),
      spread: (one) => Math.abs((one.share ?? 2) - 0.5),
    }[state.sort];
    const found = problems
      .filter(
        (one) =>
          !state.wanted ||
          [one.problem, one.answer, ...one.given.map((given) => given.text)].join("\n").toLowerCase().includes(state.wanted),
      )
      .sort((a, b) => order(a) - order(b) || a.at - b.at);
    fill(
      holder,
      found.length ? found.slice(0, state.most).map(problemView) : empty("No answer of this evaluation has this in it."),
      found.length > state.most
        ? h(
            "button",
            {
              type: "button",
              onclick: () => {
                state.most += PROBLEMS_AT_ONCE;
                draw();
              },
            },
            `Show more: ${figure(found.length - state.most)} are left`,
          )
        : null,
    );
  };
  fill(
    page.holder,
    h(
      "div",
      {class: "tools"},
      h("h2", {}, `Answers of ${row.name ?? "step " + row.step}`),
      h("span", {class: "soft"}, plural(problems.length, "problem")),
      h("span", {class: "room"}),
      choice(
        "Sort by",
        [
          ["at", "their order"],
          ["hard", "hardest first"],
          ["easy", "easiest first"],
          ["spread", "nearest to half right"],
        ],
        state.sort,
        (value) => {
          state.sort = value;
          page.route.options.sort = value === "at" ? null : value;
          amend(page.route);
          draw();
        },
      ),
      h(
        "label",
        {class: "field"},
        h("span", {}, "Text"),
        h("input", {
          type: "search",
          placeholder: "any",
          oninput: debounce((event) => {
            state.wanted = event.target.value.toLowerCase();
            draw();
          }, 120),
        }),
      ),
    ),
    holder,
  );
  draw();
}

function share(given) {
  const graded = given.filter((one) => typeof one.correct === "number" || typeof one.correct === "boolean");
  return graded.length ? d3.mean(graded, (one) => Number(one.correct) > 0) : null;
}

function problemView(problem) {
  const bar = h("span", {class: "bar right", "aria-hidden": "true"});
  bar.style.width = (problem.share ?? 0) * 100 + "%";
  const details = h(
    "details",
    {class: "problem-row"},
    h(
      "summary",
      {},
      h("span", {class: "track"}, bar),
      h("span", {class: "number"}, percent(problem.share)),
      h("span", {class: "mono grow", dir: "auto"}, oneLine(problem.problem ?? problem.id, 140)),
      h("span", {class: "soft mono", dir: "auto"}, oneLine(problem.answer ?? "", 24)),
    ),
  );
  details.addEventListener("toggle", () => {
    if (details.children.length > 1) return;
    const lists = [
      ["greedy", problem.greedy ?? []],
      ["sampled", problem.given],
    ];
    details.append(
      h("pre", {class: "text short", dir: "auto"}, problem.problem ?? ""),
      h(
        "div",
        {class: "siblings"},
        lists.flatMap(([kind, given]) => given.map((one, at) => givenView(kind, one, at))),
      ),
    );
  });
  return details;
}

function givenView(kind, one, at) {
  const became = one.correct === undefined || one.correct === null ? "ungraded" : Number(one.correct) > 0 ? "right" : "wrong";
  return h(
    "div",
    {class: "sibling"},
    h(
      "p",
      {class: "small"},
      h("span", {class: "badge " + became}, became),
      ` ${kind}${kind === "sampled" ? " " + (at + 1) : ""} · read `,
      h(
        "b",
        {class: "mono", dir: "auto"},
        one.verdict?.answer === undefined || one.verdict?.answer === null ? "none" : oneLine(String(one.verdict.answer), 30),
      ),
      h("span", {class: "soft"}, ` · ${plural(one.tokens ?? 0, "token")}${one.finish ? " · " + one.finish : ""}`),
    ),
    h("pre", {class: "text", dir: "auto"}, one.text ?? ""),
  );
}
