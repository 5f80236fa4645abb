// Evaluations of a run: their numbers in a table, their answers problem by problem.
import {h, fill, choice, empty, figure, percent, oneLine, plural, debounce} from "./dom.js";
import {get} from "./data.js";
import {amend, hashOf} from "./route.js";
import {meaning, evalRank as rank} from "./metrics.js";

const PLAIN = new Set(["step", "name", "file", "intervals", "problems", "samples", "temperature", "answered"]);
const PROBLEMS_AT_ONCE = 100;

export async function evalPage(main, route, run) {
  const [rows, differences] = await Promise.all([get("/api/evals", {run: route.run}, true), get("/api/differences", {run: route.run}, true)]);
  if (!rows.length) {
    const text = "This run holds no evaluation. Train with evals=FILE and eval_every=10 to have some in it, or evaluate it now: ramulus eval RUN --out FOLDER, whose numbers ramulus view FOLDER shows.";
    fill(main, h("div", {class: "page narrow"}, h("h1", {}, "Evaluations"), empty(text), h("p", {}, h("a", {href: hashOf({page: "run", run: route.run})}, "Curves"))));
    return {};
  }
  const page = {route, rows, run, holder: h("section", {class: "answers"})};
  const chosen = rows.find((row) => row.step === route.step && (!route.options.name || row.name === route.options.name)) ?? rows.at(-1);
  fill(
    main,
    h(
      "div",
      {class: "page"},
      h("h1", {}, "Evaluations"),
      rows.some((row) => row.model) ? h("p", {class: "soft"}, `of ${rows.find((row) => row.model).model}`) : null,
      numbersTable(page, chosen),
      differences.length ? differencesTable(differences) : null,
      page.holder,
    ),
  );
  await answers(page, chosen);
  return {};
}

function numbersTable(page, chosen) {
  const numeric = (row) => Object.keys(row).filter((name) => typeof row[name] === "number" && !PLAIN.has(name));
  const names = [...new Set(page.rows.flatMap(numeric))].sort(
    (a, b) => rank(a) - rank(b) || d3.ascending(...[a, b].map((name) => Number(name.split("@")[1] ?? 0))),
  );
  const stepped = page.rows.some((row) => !row.file);
  const body = page.rows.map((row) => {
    const link = hashOf({page: "evals", run: page.route.run, step: row.step, options: {name: row.name}});
    return h(
      "tr",
      {class: row === chosen ? "chosen" : null},
      h("th", {scope: "row", class: "sticky"}, h("a", {href: link, "aria-current": row === chosen ? "true" : null}, row.name ?? "answers")),
      stepped ? h("td", {class: "right"}, row.file ? "–" : figure(row.step)) : null,
      h("td", {class: "right"}, figure(row.problems)),
      names.map((name) =>
        h("td", {class: "right", title: interval(row, name)}, figure(row[name]), h("span", {class: "soft interval"}, interval(row, name))),
      ),
    );
  });
  const head = [
    h("th", {scope: "col", class: "sticky"}, "Evaluation"),
    stepped ? h("th", {scope: "col", class: "right"}, "Step") : null,
    h("th", {scope: "col", class: "right"}, "Problems"),
    ...names.map((name) => h("th", {scope: "col", class: "right", title: meaning(name)}, name)),
  ];
  return h("div", {class: "scroll", tabindex: "0", "aria-label": "Numbers of the evaluations"}, h("table", {class: "list"}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

// Paired differences, as `ramulus eval` has found them.
function differencesTable(rows) {
  const cells = (row) => [
    h("th", {scope: "row", class: "sticky"}, row.measure),
    h("td", {}, row.sampled),
    h("td", {class: "right"}, figure(row.this)),
    h("td", {class: "right"}, figure(row.other)),
    h("td", {class: "right"}, figure(row.difference), h("span", {class: "soft interval"}, interval({intervals: {gap: row.interval}}, "gap"))),
    h("td", {class: "soft"}, row.within_noise ? "within noise" : ""),
  ];
  const heads = [["Measure", "sticky"], ["Sampled", null], ["this", "right"], ["other", "right"], ["difference", "right"], ["", null]];
  return [...d3.group(rows, (row) => row.table)].map(([title, some]) =>
    h(
      "details",
      {class: "group"},
      h("summary", {}, title),
      h(
        "div",
        {class: "scroll"},
        h(
          "table",
          {class: "list"},
          h("thead", {}, h("tr", {}, heads.map(([text, kind]) => h("th", {scope: "col", class: kind}, text)))),
          h("tbody", {}, some.map((row) => h("tr", {}, cells(row)))),
        ),
      ),
    ),
  );
}

function interval(row, name) {
  const pair = row.intervals?.[name];
  return pair ? `${figure(Math.round(pair[0] * 1000) / 1000)}–${figure(Math.round(pair[1] * 1000) / 1000)}` : "";
}

// The attempts at a problem by how they were sampled.
function kinds(problem) {
  return ["greedy", "sampled", "tree"].map((kind) => [kind, problem[kind] ?? []]);
}

async function answers(page, row) {
  if (!row.answered) {
    const trees = page.run?.trees.length ? h("a", {href: hashOf({page: "step", run: page.route.run, step: page.run.trees[0]})}, "its trees") : null;
    fill(page.holder, row.file ? h("p", {class: "soft"}, "The answers are in ", trees ?? "the trees beside this file", ".") : empty("This evaluation kept no answers."));
    return;
  }
  const same = page.rows.filter((one) => one.step === row.step && one.answered).length > 1 || row.file;
  let list;
  try {
    list = await get("/api/answers", {run: page.route.run, step: row.step, ...(same && row.name ? {name: row.name} : {})});
  } catch (error) {
    fill(page.holder, empty(error.message));
    return;
  }
  const problems = list.map((problem, at) => {
    const judged = problem.sampled ?? problem.tree ?? problem.greedy ?? [];
    return {...problem, at, share: share(judged), reward: meanReward(judged)};
  });
  const state = {sort: page.route.options.sort ?? "at", wanted: "", most: PROBLEMS_AT_ONCE};
  const holder = h("div", {class: "problems"});
  const draw = () => {
    const order = {
      at: (one) => one.at,
      hard: (one) => one.share ?? one.reward ?? Infinity,
      easy: (one) => -(one.share ?? one.reward ?? -Infinity),
      spread: (one) => Math.abs((one.share ?? 2) - 0.5),
    }[state.sort];
    const found = problems
      .filter(
        (one) =>
          !state.wanted ||
          [one.problem, one.answer, ...kinds(one).flatMap(([, given]) => given.map((attempt) => attempt.text))].join("\n").toLowerCase().includes(state.wanted),
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

function meanReward(given) {
  return d3.mean(given, (one) => (Number.isFinite(one.reward) ? one.reward : null)) ?? null;
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
      problem.share === null && problem.reward !== null ? null : h("span", {class: "track"}, bar),
      h("span", {class: "number"}, problem.share === null && problem.reward !== null ? "reward " + figure(problem.reward) : percent(problem.share)),
      h("span", {class: "mono grow", dir: "auto"}, oneLine(problem.problem ?? problem.id, 140)),
      h("span", {class: "soft mono", dir: "auto"}, oneLine(problem.answer ?? "", 24)),
    ),
  );
  details.addEventListener("toggle", () => {
    if (details.children.length > 1) return;
    const lists = kinds(problem);
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
  const called = one.correct !== undefined && one.correct !== null;
  const became = called ? (Number(one.correct) > 0 ? "right" : "wrong") : Number.isFinite(one.reward) ? "scored" : "ungraded";
  return h(
    "div",
    {class: "sibling"},
    h(
      "p",
      {class: "small"},
      h("span", {class: "badge " + became}, became === "scored" ? `reward ${figure(one.reward)}` : became),
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
