// The state of the page: rows, cells, series with their colours, the filter, the selection.

// A failure of the page itself is shown on the page, not only in the console.
qexp.problem = (text) => {
  const box = qexp.byId("problems");
  box.hidden = false;
  box.append(qexp.el("p", {}, `This page has a fault: ${text}`));
};
window.addEventListener("error", (event) => {
  if (!/^ResizeObserver/.test(event.message)) qexp.problem(event.message);  // that one is a notice, not a fault
});
window.addEventListener("unhandledrejection", (event) => qexp.problem(String(event.reason)));

qexp.data = JSON.parse(qexp.byId("qexp-data").textContent);
qexp.about = JSON.parse(qexp.byId("qexp-about").textContent);
// Rows come as columns, see `packed` in qexp/report/payload.py.
const unpacked = ({ length, common, columns }) => {
  const rows = Array.from({ length }, () => ({ ...common }));
  for (const [name, column] of Object.entries(columns)) {
    rows.forEach((row, i) => {
      const value = Array.isArray(column) ? column[i] : column.of[column.at[i]];
      if (value !== null && value !== undefined) row[name] = value;
    });
  }
  return rows;
};
qexp.rows = unpacked(qexp.data.rows);
qexp.cells = unpacked(qexp.data.cells);
qexp.view = { x: null, size: "weight_bytes", y: "value", zoom: "all", grid: null, width: null };
qexp.filter = { off: new Set(), text: "", study: "", model: "", dataset: "", schedule: "", status: "" };
qexp.selected = null;

qexp.distinct = (name, rows = qexp.rows) => [...new Set(rows.map((row) => row[name]).filter((value) => value !== undefined))];
const several = (name) => qexp.distinct(name).length > 1;

// The kind of a row's numbers, from its record: a share in percent or a number with its own unit, better upwards or downwards.
qexp.measure = (row = {}) => ({ unit: row.is_share === false ? row.unit || "" : "%", share: row.is_share !== false, sign: row.higher_is_better === false ? -1 : 1 });
qexp.metricName = () => {
  const names = [...new Set(qexp.rows.filter((row) => row.metric).map((row) => row.metric_label || row.metric))];
  return names.length === 1 ? names[0] : "score";
};
qexp.metricUnit = () => {
  const units = [...new Set(qexp.rows.filter((row) => row.metric).map((row) => qexp.measure(row).unit))];
  return units.length === 1 && units[0] ? ` (${units[0]})` : "";
};
const digits = (row, x) => (qexp.measure(row).share || Math.abs(x) >= 1 || x === 0 ? qexp.points(x) : qexp.number(x, 4));
qexp.plainScore = (row, x) => (qexp.finite(x) ? digits(row, x) : "–");
qexp.score = (row, x) => (qexp.finite(x) ? `${qexp.measure(row).share ? x.toFixed(2) : digits(row, x)} ${qexp.measure(row).unit}`.trim() : "–");
qexp.apart = (row, x) => (qexp.finite(x) ? `${digits(row, x)} ${qexp.measure(row).share ? "points" : qexp.measure(row).unit}`.trim() : "–");
qexp.lost = (row, x) => (qexp.finite(row.value_float) ? qexp.measure(row).sign * (row.value_float - x) : undefined);
qexp.better = (one, other, name = "value") => qexp.measure(one).sign * (one[name] - other[name]) > 0;

// How differences were judged (see surely_better in qexp/results/confidence.py).
const byIntervals = `seeds and runs without kept hits${qexp.rows.length > 1000 ? ", and places after the first 1000," : ""} by their 95 % intervals`;
qexp.basis = qexp.data.paired ? `5 %, McNemar's test on the same images, corrected for the number compared; ${byIntervals}` : "their 95 % intervals overlap";

// A series is a method (with its schedule where that varies): one colour. A network is a marker where there are several.
// What varies is found once, not anew for each of thousands of rows.
const schedules = several("schedule"), places = ["study", "model", "dataset"].filter(several);
const seriesOf = (row) => [row.quant, schedules ? row.schedule : null].filter(Boolean).join(" · ") || "none";
const networkOf = (row) => places.map((name) => row[name]).filter(Boolean).join(" / ");
const VARIED = ["plan", "ends_bit", "rounding", "granularity", "bn", "add", "quantize_input", "n_calibrate", "n_eval", "weights", "kernels", "device"].filter(several);

for (const row of [...qexp.rows, ...qexp.cells]) {
  row.series = seriesOf(row);
  row.network = networkOf(row);
  row.extra = VARIED.filter((name) => row[name] !== undefined).map((name) => `${name} ${row[name]}`).join(", ");
}
qexp.rows.forEach((row, index) => { row.index = index; });
qexp.cells.forEach((cell, index) => { cell.index = index; });
qexp.series = [...new Set(qexp.rows.map((row) => row.series))].sort((a, b) => a.localeCompare(b));
qexp.networks = [...new Set(qexp.rows.map((row) => row.network))];

// The palette's blue is too dark for a dark card.
qexp.dark = window.matchMedia("(prefers-color-scheme: dark)");
qexp.shade = (color) => (qexp.dark.matches && color === "#0072B2" ? "#3391d4" : color);
qexp.paint = (index) => qexp.shade(qexp.about.palette[index % qexp.about.palette.length]);
qexp.color = (row) => qexp.paint(qexp.series.indexOf(row.series));
qexp.marker = (row) => {
  const key = qexp.networks.length > 1 ? qexp.networks.indexOf(row.network) : qexp.series.indexOf(row.series);
  return qexp.about.markers[key % qexp.about.markers.length];
};

qexp.title = (row) => [row.series, row.width, row.network].filter(Boolean).join("  ");
qexp.phases = ["calibrate", "search", "train", "evaluate"];
qexp.total = (row) => {
  const parts = qexp.phases.map((name) => row[`seconds_${name}`]).filter(qexp.finite);
  return parts.length ? parts.reduce((a, b) => a + b, 0) : undefined;
};
qexp.rankText = (row) => {
  if (!row.rank_low) return "–";
  return row.rank_low === row.rank_high ? String(row.rank_low) : `${row.rank_low}–${row.rank_high}`;
};
qexp.nearBest = (row) => row.rank_low === 1 && row.rank_high > 1;

qexp.passes = (row) => {
  const f = qexp.filter;
  if (f.off.has(row.series)) return false;
  for (const name of ["study", "model", "dataset", "schedule"]) if (f[name] && row[name] !== f[name]) return false;
  return true;
};
qexp.matches = (row) => {
  const f = qexp.filter;
  if (!qexp.passes(row) || (f.status && row.status !== f.status)) return false;
  if (!f.text) return true;
  const text = [row.title, row.point, row.quant, row.schedule, row.width, row.model, row.dataset, row.error, row.extra, `seed ${row.seed}`];
  return f.text.toLowerCase().split(/\s+/).every((word) => text.join(" ").toLowerCase().includes(word));
};
qexp.visible = () => qexp.rows.filter(qexp.matches);
qexp.visibleCells = () => qexp.cells.filter((cell) => qexp.passes(cell) && cell.rows.some((index) => qexp.matches(qexp.rows[index])));

qexp.model = (name) => window.Bokeh.documents[0].get_model_by_name(name);
qexp.put = (name, columns) => {
  qexp.model(name).data = Object.fromEntries(Object.entries(columns).map(([key, values]) => [key, values.map(qexp.plain)]));
};
qexp.factors = (range, list) => { range.factors = list.map(qexp.plain); };
// The plotting library sets $$...$$ and \(...\) as formulas, with a script from the network: but names are not formulas.
qexp.plain = (value) => {
  if (Array.isArray(value)) return typeof value[0] === "string" ? value.map(qexp.plain) : value;
  return typeof value === "string" ? value.replaceAll("$$", "$\u200b$").replace(/\\([[(])/g, "\\\u200b$1") : value;
};
qexp.columns = (names, records) => Object.fromEntries(names.map((name) => [name, records.map((record) => record[name])]));

// The least and the greatest number; as arguments of one call, those of a hundred thousand points overflow the stack.
qexp.ends = (values) => values.reduce(([low, high], x) => [Math.min(low, x), Math.max(high, x)], [Infinity, -Infinity]);

// Sets an axis to hold the values with some room; `log` multiplies the room, `least` keeps one value from filling it.
qexp.span = (range, values, { room = 0.06, log = false, least = 0 } = {}) => {
  const known = values.filter((x) => qexp.finite(x) && (!log || x > 0));
  let [start, end] = known.length ? qexp.ends(known) : [log ? 1 : 0, log ? 10 : 1];
  if (log) {
    const grow = Math.max((end / start) ** room, 1.15);
    [start, end] = [start / grow, end * grow];
  } else {
    const pad = Math.max((end - start) * room, least || (end === start ? Math.abs(start) * 0.05 || 0.5 : 0));
    [start, end] = [start - pad, end + pad];
  }
  range.setv({ start, end, reset_start: start, reset_end: end });
};
