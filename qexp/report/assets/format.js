// Numbers in a form for people, and elements whose text stays text (nothing here parses HTML).
"use strict";
const qexp = (window.qexp = {});

qexp.finite = (x) => typeof x === "number" && Number.isFinite(x);

qexp.number = (x, digits = 3) => {
  if (!qexp.finite(x)) return typeof x === "string" ? x : "–";
  if (x !== 0 && (Math.abs(x) >= 1e6 || Math.abs(x) < 1e-4)) return x.toExponential(digits - 1).replace("e+", "e");
  return String(Number(x.toPrecision(Math.max(digits, Math.abs(x) >= 1 ? Math.floor(Math.log10(Math.abs(x))) + 1 : 0))));
};

// The least and the greatest of several numbers, as a table holds them: "0.00128941..0.00240994".
qexp.numbers = (text) => String(text).split("..").map((part) => (part !== "" && qexp.finite(Number(part)) ? qexp.number(Number(part)) : part)).join("..");

qexp.scaled = (x, base, units) => {
  if (!qexp.finite(x)) return "–";
  let i = 0;
  while (Math.abs(x) >= base && i < units.length - 1) { x /= base; i += 1; }
  return `${Number(x.toPrecision(3))}${units[i]}`;
};
qexp.bytes = (x) => qexp.scaled(x, 1000, [" B", " kB", " MB", " GB", " TB"]);
qexp.count = (x) => qexp.scaled(x, 1000, ["", " k", " M", " G", " T", " P"]);
qexp.percent = (x) => (qexp.finite(x) ? `${x.toFixed(2)} %` : "–");
qexp.points = (x) => (qexp.finite(x) ? (Math.abs(x) < 0.005 ? "0.00" : x.toFixed(2).replace("-", "−")) : "–");

qexp.seconds = (x) => {
  if (!qexp.finite(x)) return "–";
  if (x < 0.995) return `${Number((1000 * x).toPrecision(2))} ms`;
  if (x < 100 && x % 60) return `${Number(x.toPrecision(x < 10 ? 2 : 3))} s`;
  const minutes = Math.round(x / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
};

// Axis ticks of the figures, called by the plotting library.
qexp.tick = (kind, x) => {
  if (kind === "time") return qexp.seconds(x);
  if (kind === "size" && qexp.view && qexp.view.size === "weight_bytes") return qexp.bytes(x);
  return kind === "trials" ? qexp.price(x) : qexp.count(x);
};

// el("td", {class: "text"}, "words", otherElement): strings become text nodes.
qexp.el = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
};
qexp.byId = (id) => document.getElementById(id);
qexp.fill = (id, ...children) => qexp.byId(id).replaceChildren(...children.filter((child) => child !== null && child !== undefined));

// The same shapes as the plotting library's markers, for chips and table cells.
const SHAPES = {
  circle: "M6 1a5 5 0 1 1 0 10a5 5 0 1 1 0-10z", square: "M1.5 1.5h9v9h-9z", triangle: "M6 1l5.2 9.5H.8z",
  diamond: "M6 .5l4.5 5.5L6 11.5 1.5 6z", inverted_triangle: "M6 11L.8 1.5h10.4z", hex: "M3.2 1.2h5.6L11.6 6 8.8 10.8H3.2L.4 6z",
  star: "M6 .3l1.6 3.7 4 .3-3 2.7.9 4L6 8.9 2.5 11l.9-4-3-2.7 4-.3z",
};
qexp.symbol = (color, marker) => {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const path = document.createElementNS(space, "path");
  svg.setAttribute("viewBox", "0 0 12 12");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", SHAPES[marker] || SHAPES.circle);
  path.setAttribute("fill", color);
  svg.append(path);
  return svg;
};

qexp.segment = (options, current, choose) => {
  const box = qexp.el("div", { class: "segment", role: "group" });
  for (const [value, label] of options) {
    const press = () => {
      for (const other of box.children) other.setAttribute("aria-pressed", String(other === button));
      choose(value);
    };
    const button = qexp.el("button", { type: "button", "aria-pressed": String(value === current), onclick: press }, label);
    box.append(button);
  }
  return box;
};
qexp.select = (label, options, current, choose) => {
  const box = qexp.el("select", { "aria-label": label, onchange: () => choose(box.value) });
  for (const [value, text] of options) box.append(qexp.el("option", { value, selected: value === current }, text));
  return box;
};
