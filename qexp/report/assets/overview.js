// Accuracy against bits, size and time: one dot per visible point.

qexp.buildOverview = () => {
  const varied = (name) => qexp.distinct(name).length > 1;
  qexp.view.x = !varied("mean_wbit") && varied("mean_abit") ? "mean_abit" : "mean_wbit";
  const set = (name) => (value) => { qexp.view[name] = value; qexp.drawOverview(); };
  qexp.fill("c-bits",
    qexp.segment([["mean_wbit", "weights"], ["mean_abit", "inputs"], ["mean_both", "both"]], qexp.view.x, set("x")),
    qexp.segment([["value", qexp.metricName()], ["delta", "against float"]], "value", set("y")),
    qexp.segment([["all", "all"], ["near", "near float"]], "all", set("zoom")));
  const range = qexp.model("time").x_range;
  for (const end of ["start", "end"]) range.properties[end].change.connect(() => timeTicks(range));
  qexp.fill("c-size", qexp.segment([["weight_bytes", "weight bytes"], ["bops", "bit operations"]], "weight_bytes", set("size")));
};

// Round durations inside the range shown: the coarser list unless that leaves almost none.
const timeTicks = ({ start, end }) => {
  const coarse = [0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 36000, 360000];
  const fine = coarse.flatMap((x) => (x < 10 || x > 3600 ? [x, 2 * x, 5 * x] : [x, 2 * x, 3 * x]));
  const inside = (list) => list.filter((x) => x >= start && x <= end);
  const log = (n) => Array.from({ length: n }, (_, i) => Number((start * (end / start) ** ((i + 0.5) / n)).toPrecision(2)));
  const ticks = [coarse, fine].map(inside).find((list) => list.length >= 3) || log(4);
  qexp.model("time-ticks").ticks = ticks;
};

const X = {
  mean_wbit: (row) => row.mean_wbit,
  mean_abit: (row) => row.mean_abit,
  mean_both: (row) => (qexp.finite(row.mean_wbit) && qexp.finite(row.mean_abit) ? (row.mean_wbit + row.mean_abit) / 2 : undefined),
};

qexp.dot = (row) => {
  const base = qexp.view.y === "delta" ? row.value_float : 0;
  const interval = qexp.finite(row.ci_low) && qexp.finite(row.ci_high) ? ` (${qexp.plainScore(row, row.ci_low)} to ${qexp.plainScore(row, row.ci_high)})` : "";
  return {
    row: row.index, y: row.value - base, low: (row.ci_low ?? row.value) - base, high: (row.ci_high ?? row.value) - base,
    color: qexp.color(row), marker: qexp.marker(row), title: qexp.title(row), accuracy: `${qexp.score(row, row.value)}${interval}`,
    drop: qexp.apart(row, row.drop), rank: `${qexp.rankText(row)}${qexp.nearBest(row) ? ", within noise of the best" : ""}`,
    bits: [["weights", row.mean_wbit], ["inputs", row.mean_abit]].map(([name, x]) => `${name} ${qexp.number(x, 4)}`).join(", "),
    extra: [row.seed !== undefined ? `seed ${row.seed}` : "", row.extra].filter(Boolean).join(", ") || "–",
  };
};

// The points on the Pareto front: no other point with the same or lower cost has a better score.
qexp.front = (dots) => {
  const front = [], sign = dots.length && dots[0].row !== undefined ? qexp.measure(qexp.rows[dots[0].row]).sign : 1;
  for (const dot of [...dots].sort((a, b) => a.x - b.x || sign * (b.y - a.y))) {
    if (!front.length || sign * (dot.y - front[front.length - 1].y) > 0) front.push(dot);
  }
  return front;
};

qexp.drawOverview = () => {
  const rows = qexp.visible().filter((row) => row.status === "ok" && qexp.finite(row.value) && (qexp.view.y === "value" || qexp.finite(row.value_float)));
  const names = ["x", "y", "low", "high", "color", "marker", "row", "title", "accuracy", "drop", "rank", "bits", "extra"];
  setSlots(rows);
  const place = { bits: X[qexp.view.x], size: (row) => row[qexp.view.size], time: qexp.total };
  qexp.dots = {};
  for (const [name, x] of Object.entries(place)) {
    const kept = rows.filter((row) => qexp.finite(x(row)) && (name === "bits" || x(row) > 0));
    qexp.dots[name] = kept.map((row) => ({ ...qexp.dot(row), x: name === "bits" ? beside(row) : x(row) }));
    qexp.put(`${name}-dots`, qexp.columns(names, qexp.dots[name]));
  }
  drawLines(rows);
  drawFront();
  const references = qexp.references(rows);
  const label = (f) => [f.what, ...(references.length > 1 ? f.names : []), qexp.score(f, f.value), ...(f.n > 1 ? [`(mean of ${f.n} seeds)`] : [])].join(" ");
  const lines = qexp.view.y === "delta" ? (rows.length ? [{ y: 0, text: "float" }] : []) : references.slice(0, 12).map((f) => ({ y: f.value, text: label(f) }));
  qexp.put("float-lines", qexp.columns(["y", "text"], lines));
  scale(rows, lines);
  qexp.drawRing();
};

// Methods at one width are drawn side by side, a few pixels apart, to separate their intervals; a single one is not moved.
let slots = new Map(), step = 0;
const setSlots = (rows) => {
  const known = rows.filter((row) => qexp.finite(X[qexp.view.x](row)));
  slots = new Map();
  for (const row of known) {
    const x = X[qexp.view.x](row);
    slots.set(x, (slots.get(x) || new Set()).add(row.series));
  }
  const at = [...slots.keys()];
  const most = Math.max(2, ...[...slots.values()].map((names) => names.size));
  const span = at.length > 1 ? Math.max(...at) - Math.min(...at) : 1;
  step = span * Math.min(0.006, 0.03 / (most - 1));
};
const beside = (row) => {
  const x = X[qexp.view.x](row);
  const here = qexp.series.filter((name) => slots.get(x).has(name));
  return x + (here.indexOf(row.series) - (here.length - 1) / 2) * step;
};

// One line per method, if it has one configuration per width; otherwise only dots.
const drawLines = (rows) => {
  const groups = new Map();
  for (const row of rows) {
    const key = `${row.series}|${row.network}|${row.extra}`;
    const x = X[qexp.view.x](row);
    if (!qexp.finite(x)) continue;
    if (!groups.has(key)) groups.set(key, { color: qexp.color(row), at: new Map() });
    const at = groups.get(key).at;
    if (!at.has(x)) at.set(x, []);
    at.get(x).push(row);
  }
  const lines = [];
  for (const { color, at } of groups.values()) {
    const steps = [...at.entries()].sort((a, b) => a[0] - b[0]);
    if (steps.length < 2 || steps.some(([, same]) => new Set(same.map((row) => row.width)).size > 1)) continue;
    const y = (same) => same.map((row) => qexp.dot(row).y).reduce((a, b) => a + b, 0) / same.length;
    lines.push({ color, xs: steps.map(([, same]) => beside(same[0])), ys: steps.map(([, same]) => y(same)) });
  }
  qexp.put("bits-lines", qexp.columns(["xs", "ys", "color"], lines));
};

const drawFront = () => {
  const networks = new Map();
  for (const dot of qexp.dots.size) {
    const { model, dataset, metric } = qexp.rows[dot.row];
    const key = `${model}|${dataset}|${metric}`;
    if (!networks.has(key)) networks.set(key, []);
    networks.get(key).push(dot);
  }
  const steps = [...networks.values()].flatMap((dots) => {
    const front = qexp.front(dots);
    return [...front, { x: qexp.ends(dots.map((dot) => dot.x))[1], y: front[front.length - 1].y }, { x: NaN, y: NaN }];
  });
  qexp.put("size-front", qexp.columns(["x", "y"], steps));
};

const scale = (rows, lines) => {
  const base = (row) => (qexp.view.y === "delta" ? row.value_float : 0);
  const values = [...lines.map((line) => line.y), ...rows.flatMap((row) => [(row.ci_low ?? row.value) - base(row), (row.ci_high ?? row.value) - base(row)])];
  let [low, high] = values.length ? qexp.ends(values) : [0, 100];
  if (qexp.view.zoom === "near" && lines.length) {
    const { share, sign } = qexp.measure(rows[0]), ends = lines.map((line) => line.y);
    const unit = share ? 1 : Math.max(1e-9, ...ends.map(Math.abs)) / 50;  // a point, or a fiftieth of the float network's number
    const [worse, better] = [5 * unit, 0.6 * unit];
    low = sign > 0 ? Math.max(low, Math.min(...ends) - worse) : Math.min(...ends) - better;
    high = sign > 0 ? Math.max(...ends) + better : Math.min(high, Math.max(...ends) + worse);
  }
  const apart = qexp.metricUnit() === " (%)" ? " (points)" : qexp.metricUnit();
  const label = qexp.plain(qexp.view.y === "delta" ? `${qexp.metricName()} minus float${apart}` : `${qexp.metricName()}${qexp.metricUnit()}`);
  for (const name of ["bits", "size", "time"]) {
    const figure = qexp.model(name);
    qexp.span(figure.y_range, [low, high], { least: qexp.measure(rows[0]).share ? 0.2 : 0, room: 0.07 });
    qexp.span(figure.x_range, qexp.dots[name].map((dot) => dot.x), { log: name !== "bits", least: 0.5 });
    figure.left[0].axis_label = label;
  }
  const bits = { mean_wbit: "mean bits of the weights", mean_abit: "mean bits of the inputs", mean_both: "mean bits, weights and inputs" };
  qexp.model("bits").below[0].axis_label = bits[qexp.view.x];
  qexp.model("size").below[0].axis_label = qexp.view.size === "weight_bytes" ? "size of the packed weights" : "bit operations (MAC × bits × bits)";
};

qexp.drawRing = () => {
  for (const [name, dots] of Object.entries(qexp.dots)) {
    const dot = dots.find((one) => one.row === qexp.selected);
    qexp.put(`${name}-ring`, { x: dot ? [dot.x] : [], y: dot ? [dot.y] : [] });
  }
};
