// Elements, numbers and texts. Data becomes text nodes only, so whatever a model wrote stays text.

// An element: `h("button", {class: "chip", onclick: act}, "Text", child)`. Attributes that are null or false are left out.
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "open") element[name] = value;
    else element.setAttribute(name, value === true ? "" : typeof value === "string" ? shown(value) : value);
  }
  element.append(...drawable(children));
  return element;
}

// What can be a child: elements, and texts made visible; null, undefined and false are left out.
function drawable(children) {
  const there = children.flat().filter((child) => child !== null && child !== undefined && child !== false);
  return there.map((child) => (typeof child === "string" ? shown(child) : child));
}

export function fill(element, ...children) {
  element.replaceChildren(...drawable(children));
  return element;
}

// Tell a screen reader, without moving the focus.
export function say(text) {
  document.getElementById("said").textContent = shown(text);
}

export function trouble(text) {
  const line = document.getElementById("trouble");
  line.hidden = !text;
  line.textContent = shown(text || "");
}

export function empty(text, ...more) {
  return h("div", {class: "empty"}, h("p", {}, text), ...more);
}

// Control, direction-changing and invisible characters, made visible; new lines and tabs stay.
const CONTROL = /(?![\n\t])[\p{Cc}\p{Cf}\u115f\u1160\u2028\u2029\u2060-\u206f\u3164\uffa0\u{e0000}-\u{e0fff}]/gu;

export function shown(text) {
  return String(text).replace(CONTROL, (character) => {
    return "\u27e8U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "\u27e9";
  });
}

// One line of at most `width` characters.
export function oneLine(text, width = 120) {
  const cut = text.length > width * 2 ? text.slice(0, width * 2) : text;
  const line = shown(cut.replace(/\n/g, "⏎").replace(/\t/g, " "));
  return line.length > width ? line.slice(0, width - 1) + "…" : line;
}

// A number for people: three to four digits, thin spaces between thousands, a dash where there is none.
export function figure(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value !== "number") return String(value);
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return d3.format(",d")(value).replaceAll(",", "\u2009").replace("-", "−");
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) return d3.format(".2e")(value).replace("-", "−");
  return d3
    .format(size >= 100 ? ".1f" : ".3~f")(value)
    .replace("-", "−");
}

export function percent(value) {
  return value === null || value === undefined ? "–" : Math.round(value * 100) + "\u2009%";
}

export function duration(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 5400) return figure(Math.round(value / 360) / 10) + "\u2009h";
  if (value >= 90) return figure(Math.round(value / 6) / 10) + "\u2009min";
  if (value >= 1) return figure(Math.round(value * 10) / 10) + "\u2009s";
  return figure(Math.round(value * 1e4) / 10) + "\u2009ms";
}

export function plural(count, word, words = word + "s") {
  return figure(count) + " " + (count === 1 ? word : words);
}

// A labelled <select>: options are [value, text].
export function choice(label, options, value, act, id) {
  const select = h(
    "select",
    {id, onchange: () => act(select.value)},
    options.map(([key, text]) => h("option", {value: key}, text)),
  );
  select.value = value;
  return h("label", {class: "field"}, h("span", {}, label), select);
}

export function toggle(label, on, act, title) {
  const button = h(
    "button",
    {
      type: "button",
      class: "chip",
      "aria-pressed": String(on),
      title,
      onclick: () => {
        const next = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(next));
        act(next);
      },
    },
    label,
  );
  return button;
}

export function debounce(act, wait) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...values), wait);
  };
}

export function remember(name, value) {
  try {
    if (value === undefined) return localStorage.getItem("ramulus." + name);
    localStorage.setItem("ramulus." + name, value);
  } catch {
    /* a page from file:// may have no storage */
  }
  return null;
}
