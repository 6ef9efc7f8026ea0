// The leaderboard: the visible points, sortable, ranks as ranges where the intervals leave them open. A browser takes seconds to lay out
// thousands of lines, so the first ones are shown, and more on demand.

const STEP = 200;
qexp.boardLength = STEP;

const scaleBar = (row, low, high) => {
  if (!qexp.finite(row.ci_low) || !qexp.finite(row.ci_high)) return null;
  const at = (x) => Math.max(0, Math.min(100, (100 * (x - low)) / (high - low || 1)));
  const band = qexp.el("i", { style: `left:${at(row.ci_low)}%;width:${at(row.ci_high) - at(row.ci_low)}%` });
  // A point below the bars' range gets no tick: a tick at the edge would be read as its value.
  const tick = row.value < low || row.value > high ? null : qexp.el("b", { style: `left:calc(${at(row.value)}% - 1px)` });
  const words = `95 % interval ${qexp.plainScore(row, row.ci_low)} to ${qexp.plainScore(row, row.ci_high)}${row.interval ? ` (${row.interval})` : ""}`;
  return qexp.el("span", { class: "interval", title: words, "aria-label": words }, band, tick);
};
const plainText = (name) => ({ key: name, name: name.replace("_", " "), text: true, value: (row) => row[name], show: (row) => row[name] ?? "–" });
const methodCell = (row) => qexp.el("span", { class: "method" }, qexp.symbol(qexp.color(row), qexp.marker(row)), row.series);

const rankCell = (row) => {
  if (row.status !== "ok") return qexp.el("span", { class: "mark bad" }, "failed");
  const near = qexp.nearBest(row) ? qexp.el("span", { class: "mark", title: "chance may have put it below the best" }, "≈ best") : null;
  return qexp.el("span", {}, qexp.rankText(row), near);
};

const COLUMNS = [
  { key: "rank", name: "rank", text: true, value: (row) => (row.rank_low ? row.rank_low + row.rank_high / 1e6 : undefined), up: true, show: rankCell },
  { key: "method", name: "method", text: true, value: (row) => row.series, show: methodCell },
  { key: "width", name: "bits", text: true, value: (row) => (row.mean_wbit ?? 0) * 100 + (row.mean_abit ?? 0), show: (row) => row.width },
  { key: "value", name: qexp.metricName(), value: (row) => row.value, show: (row) => (row.status === "ok" ? qexp.score(row, row.value) : "–") },
  { key: "interval", name: "95 % interval", text: true, value: (row) => row.ci_low, show: (row, [low, high]) => (row.status === "ok" ? scaleBar(row, low, high) : null) },
  { key: "drop", name: qexp.rows.some((row) => qexp.measure(row).sign < 0) ? "worse than float" : "below float", value: (row) => row.drop, up: true, show: (row) => qexp.plainScore(row, row.drop) },
  { key: "weight_bytes", name: "weights", value: (row) => row.weight_bytes, up: true, show: (row) => qexp.bytes(row.weight_bytes) },
  { key: "ratio", name: "smaller", value: (row) => (row.weight_bytes_float && row.weight_bytes ? row.weight_bytes_float / row.weight_bytes : undefined), show: (row) => (row.weight_bytes_float && row.weight_bytes ? `${(row.weight_bytes_float / row.weight_bytes).toFixed(1)}×` : "–") },
  { key: "bops", name: "bit operations", value: (row) => row.bops, up: true, show: (row) => qexp.count(row.bops) },
  { key: "time", name: "time", value: qexp.total, up: true, show: (row) => qexp.seconds(qexp.total(row)) },
];

qexp.buildBoard = () => {
  const varied = ["seed", "study", "model", "dataset", "plan", "ends_bit", "rounding", "granularity", "bn", "add", "quantize_input", "n_calibrate", "n_eval", "weights", "kernels", "device"];
  qexp.boardColumns = [...COLUMNS, ...varied.filter((name) => qexp.distinct(name).length > 1).map(plainText)];
  qexp.sort = { key: "value", down: !qexp.rows.some((row) => qexp.measure(row).sign < 0) };
};

qexp.sorted = (rows) => {
  const column = qexp.boardColumns.find((one) => one.key === qexp.sort.key);
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  return [...rows].sort((one, two) => {
    const [a, b] = [column.value(one), column.value(two)];
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);  // gaps last, either way
    return (qexp.sort.down ? -1 : 1) * compare(a, b) || one.index - two.index;
  });
};

qexp.drawBoard = () => {
  const rows = qexp.sorted(qexp.visible());
  qexp.order = rows.map((row) => row.index);
  const known = rows.filter((row) => row.status === "ok" && qexp.finite(row.ci_low) && qexp.finite(row.ci_high));
  // The bars show the top and the whole interval of the best point; with a point near chance, all others would shrink to a dash at the right.
  const ends = [qexp.ends(known.map((row) => row.ci_low))[0], qexp.ends(known.map((row) => row.ci_high))[1]];
  const best = known.reduce((a, b) => (qexp.better(b, a) ? b : a), known[0]);
  const { share, sign } = qexp.measure(best);
  const reach = known.length ? Math.max(share ? 8 : 0.1 * (ends[1] - ends[0]), 2 * (sign > 0 ? ends[1] - best.ci_low : best.ci_high - ends[0])) : 0;
  const span = !known.length ? [0, 100] : sign > 0 ? [Math.max(ends[0], ends[1] - reach), ends[1]] : [ends[0], Math.min(ends[1], ends[0] + reach)];
  const head = qexp.boardColumns.map((column) => {
    const mine = qexp.sort.key === column.key;
    const press = () => {
      qexp.sort = { key: column.key, down: mine ? !qexp.sort.down : !(column.up || column.text) };
      qexp.drawBoard();
    };
    const arrow = mine ? (qexp.sort.down ? " ↓" : " ↑") : "";
    return qexp.el("th", { class: column.text ? "text" : "", "aria-sort": mine ? (qexp.sort.down ? "descending" : "ascending") : "none" },
      qexp.el("button", { type: "button", onclick: press }, `${column.name}${arrow}`));
  });
  const body = rows.slice(0, qexp.boardLength).map((row) => {
    const open = () => qexp.choose(row.index, true);
    const key = (event) => { if (event.key === "Enter") open(); };
    const cells = qexp.boardColumns.map((column) => qexp.el("td", { class: column.text ? "text long" : "" }, column.show(row, span) ?? ""));
    return qexp.el("tr", { "data-row": row.index, tabindex: 0, "aria-selected": String(row.index === qexp.selected), onclick: open, onkeydown: key }, ...cells);
  });
  const left = rows.length - body.length;
  const more = () => {
    qexp.boardLength += STEP;
    qexp.drawBoard();
  };
  const rest = left > 0 ? [qexp.el("tfoot", {}, qexp.el("tr", {}, qexp.el("td", { class: "text", colspan: head.length }, qexp.el("button", { type: "button", onclick: more }, `Show ${Math.min(STEP, left)} more of ${left}`))))] : [];
  qexp.fill("board", qexp.el("thead", {}, qexp.el("tr", {}, ...head)), qexp.el("tbody", {}, ...body), ...rest);
  const networks = new Set(qexp.rows.map((row) => `${row.model}|${row.dataset}`)).size;
  const near = rows.filter(qexp.nearBest).length;
  const noise = near > 1 ? ` ${near} points are within noise of the best.` : "";
  qexp.fill("hint-board", `${rows.length} of ${qexp.rows.length} points. A rank such as 1–4 means that the differences between these places may be chance${networks > 1 ? " of the same network and data set" : ""} (${qexp.basis}).${noise} Click a row to see its layers.`);
};

qexp.markBoard = () => {
  for (const line of document.querySelectorAll("#board tbody tr")) line.setAttribute("aria-selected", String(Number(line.dataset.row) === qexp.selected));
};
