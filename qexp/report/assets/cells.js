// Configurations with their seeds joined: the grid, methods at one width, the spread, the cost by method.

const NO_NOISE = "clearly worse than the best";
const cellTip = (cell) => ({
  row: cell.rows[0], color: qexp.color(cell), marker: qexp.marker(cell),
  title: [qexp.title(cell), cell.extra].filter(Boolean).join("  "),
  accuracy: `${qexp.score(cell, cell.mean)} (${qexp.plainScore(cell, cell.ci_low)} to ${qexp.plainScore(cell, cell.ci_high)})`,
  drop: qexp.apart(cell, qexp.lost(qexp.rows[cell.rows[0]], cell.mean)),
  seeds: cell.n > 1 ? `${cell.n}, standard deviation ${qexp.plainScore(cell, cell.sd)}` : "1",
  verdict: "–",
});
// Whether `cell` may be below `best` by chance only; decided beforehand among the best of each network and width.
const open = (best, cell) => (best.near && cell.near ? best.near.includes(cell.index) : qexp.measure(cell).sign > 0 ? cell.ci_high >= best.ci_low : cell.ci_low <= best.ci_high);
const network = (cell) => `${cell.model}|${cell.dataset}|${cell.metric}`;
const bitsOf = (spec) => (qexp.finite(Number(spec)) && spec !== "" && spec !== null ? Number(spec) : null);

qexp.buildCells = () => {
  const names = [...new Set(qexp.cells.map((cell) => `${cell.series}${cell.network ? `  ${cell.network}` : ""}`))].sort();
  qexp.view.grid = qexp.view.grid || names.map((name) => [name, qexp.cells.filter((cell) => gridName(cell) === name).length]).reduce((a, b) => (b[1] > a[1] ? b : a), ["", -1])[0];
  qexp.fill("c-grid", names.length > 1 ? qexp.select("method of the grid", names.map((name) => [name, name]), qexp.view.grid, (value) => { qexp.view.grid = value; qexp.drawGrid(); }) : null);
};
const gridName = (cell) => `${cell.series}${cell.network ? `  ${cell.network}` : ""}`;

qexp.drawGrid = () => {
  const mine = qexp.visibleCells().filter((cell) => gridName(cell) === qexp.view.grid);
  const plain = mine.filter((cell) => bitsOf(cell.layer_wbit) !== null && bitsOf(cell.layer_abit) !== null);
  const best = new Map();
  for (const cell of plain) {
    const key = `${Number(cell.layer_wbit)},${Number(cell.layer_abit)}`;
    const held = best.get(key);
    best.set(key, { cell: held && !qexp.better(cell, held.cell, "mean") ? held.cell : cell, n: (held ? held.n : 0) + 1 });
  }
  const axis = (name) => [...new Set(plain.map((cell) => Number(cell[name])))].sort((a, b) => a - b).map(String);
  const means = [...best.values()].map(({ cell }) => cell.mean);
  const [low, high] = means.length ? [Math.min(...means), Math.max(...means)] : [0, 100];
  const tiles = [...best.entries()].map(([key, { cell, n }]) => {
    const [x, y] = key.split(",");
    const light = high > low && (cell.mean - low) / (high - low) > 0.55;
    return { ...cellTip(cell), x, y, value: cell.mean, text: qexp.measure(cell).share ? cell.mean.toFixed(1) : qexp.number(cell.mean), ink: light ? "#1b2027" : "#ffffff", verdict: n > 1 ? `best of ${n} configurations` : "–" };
  });
  const figure = qexp.model("grid");
  qexp.factors(figure.x_range, axis("layer_wbit"));
  qexp.factors(figure.y_range, axis("layer_abit"));
  qexp.model("tiles").glyph.fill_color.transform.setv({ low, high: high > low ? high : low + 1 });
  qexp.put("grid-tiles", qexp.columns(["x", "y", "value", "text", "ink", "row", "title", "accuracy", "drop", "seeds", "verdict"], tiles));
  const mixed = mine.length - plain.length;
  const note = mixed ? ` ${mixed} configuration${mixed > 1 ? "s" : ""} with a width per layer not in the grid.` : "";
  qexp.fill("hint-grid", tiles.length ? `${qexp.metricName()}${qexp.metricUnit()}; click a tile to compare methods there.${note}` : `Nothing to show.${note}`);
};

qexp.drawMethods = () => {
  const cells = qexp.visibleCells();
  const counts = new Map();
  for (const cell of cells) counts.set(cell.width, (counts.get(cell.width) || 0) + 1);
  const widths = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || b.localeCompare(a, "en", { numeric: true }));
  if (!counts.has(qexp.view.width)) {
    // Where most methods can be compared and the choice matters: 8 bits are easy for all of them.
    const most = widths.filter((width) => counts.get(width) === counts.get(widths[0]));
    qexp.view.width = most.includes("W4A4") ? "W4A4" : most[Math.floor(most.length / 2)] ?? null;
  }
  const ordered = [...widths].sort((a, b) => b.localeCompare(a, "en", { numeric: true }));
  const choose = (value) => { qexp.view.width = value; qexp.drawMethods(); };
  qexp.fill("c-methods", ordered.length > 1 ? qexp.select("widths", ordered.map((w) => [w, `${w} (${counts.get(w)})`]), qexp.view.width, choose) : ordered[0] ?? "");
  const here = cells.filter((cell) => cell.width === qexp.view.width).sort((a, b) => qexp.measure(a).sign * (b.mean - a.mean)).slice(0, 24);
  const top = new Map();
  for (const cell of here) if (!top.has(network(cell))) top.set(network(cell), cell);
  const apart = ["study", "model", "dataset"].filter((name) => qexp.distinct(name, here).length > 1);
  const names = unique(here.map((cell) => [cell.series, ...apart.map((name) => cell[name]), cell.extra].filter(Boolean).join("  ")));
  const dots = here.map((cell, i) => {
    const best = top.get(network(cell));
    const near = cell !== best && open(best, cell);
    const tied = cell === best && here.some((other) => other !== cell && network(other) === network(cell) && open(cell, other));
    const verdict = cell === best ? (tied ? "best, but not alone: others are within noise" : "best") : near ? "within noise of the best" : NO_NOISE;
    return { ...cellTip(cell), x: cell.mean, low: cell.ci_low, high: cell.ci_high, y: names[i], verdict, note: `${near || tied ? "≈ " : ""}${qexp.plainScore(cell, cell.mean)}` };
  });
  qexp.fill("hint-methods", `≈ marks methods that may be below the best by chance only (${qexp.basis}).`);
  const figure = qexp.model("methods");
  qexp.factors(figure.y_range, [...names].reverse());
  figure.height = Math.max(180, 90 + 42 * names.length);
  qexp.span(figure.x_range, dots.flatMap((dot) => [dot.x, dot.low, dot.high]));
  figure.below[0].axis_label = `${qexp.metricName()} at ${qexp.view.width ?? "–"}${qexp.metricUnit()}`;
  qexp.put("methods-dots", qexp.columns(["x", "y", "low", "high", "color", "marker", "row", "title", "accuracy", "drop", "seeds", "verdict", "note"], dots));
};

// Names of rows in a categorical axis must differ; configurations with equal names get a number.
const unique = (names) => {
  const seen = new Map();
  return names.map((name) => {
    const short = name.length > 30 ? `${name.slice(0, 29)}…` : name;
    seen.set(short, (seen.get(short) || 0) + 1);
    return seen.get(short) > 1 ? `${short} #${seen.get(short)}` : short;
  });
};

qexp.drawSeeds = () => {
  const repeated = qexp.visibleCells().filter((cell) => cell.n > 1);
  const shown = [...repeated].sort((a, b) => qexp.measure(a).sign * (b.mean - a.mean)).slice(0, 12);
  const names = unique(shown.map((cell) => qexp.title(cell)));
  const spread = shown.map((cell, i) => ({ y: names[i], low: cell.mean - cell.sd, high: cell.mean + cell.sd, mean: cell.mean, color: qexp.color(cell) }));
  const dots = shown.flatMap((cell, i) => cell.rows.map((index) => {
    const row = qexp.rows[index];
    return { ...cellTip(cell), x: row.value, y: names[i], row: index, seeds: `seed ${row.seed}: ${qexp.score(row, row.value)}` };
  }));
  // If no configuration has several seeds, there is nothing to draw; the card explains how to get seeds only if it may appear again.
  qexp.byId("card-seeds").hidden = !qexp.cells.some((cell) => cell.n > 1);
  qexp.byId("box-seeds").hidden = !shown.length;
  const sds = repeated.map((cell) => cell.sd).sort((a, b) => a - b);
  qexp.fill("hint-seeds", shown.length
    ? `One dot per seed, the band is ± one standard deviation; in the middle ${qexp.apart(shown[0], sds[Math.floor(sds.length / 2)])}.${repeated.length > shown.length ? ` The best ${shown.length} of ${repeated.length}.` : ""}`
    : "Every configuration shown was run with one seed. A run with seed=0,1,2 shows here how much luck is in it.");
  const figure = qexp.model("seeds");
  qexp.factors(figure.y_range, [...names].reverse());
  figure.height = Math.max(180, 90 + 26 * names.length);
  qexp.span(figure.x_range, [...dots.map((dot) => dot.x), ...spread.flatMap((bar) => [bar.low, bar.high])]);
  figure.below[0].axis_label = `${qexp.metricName()}${qexp.metricUnit()}`;
  qexp.put("seeds-spread", qexp.columns(["y", "low", "high", "mean", "color"], spread));
  qexp.put("seeds-dots", qexp.columns(["x", "y", "color", "row", "title", "accuracy", "drop", "seeds", "verdict"], dots));
};

qexp.drawCosts = () => {
  const rows = qexp.visible();
  const phases = qexp.phases.filter((name) => name !== "search" || rows.some((row) => qexp.finite(row.seconds_search)));
  const head = ["method", "points", ...phases, "all points"];
  const mean = (mine, name) => {
    const known = mine.map((row) => row[`seconds_${name}`]).filter(qexp.finite);
    return known.reduce((a, b) => a + b, 0) / known.length || undefined;  // nothing spent shows as a dash
  };
  const body = qexp.series.map((name) => [name, rows.filter((row) => row.series === name)]).filter(([, mine]) => mine.length).map(([name, mine]) => {
    const total = mine.map(qexp.total).filter(qexp.finite).reduce((a, b) => a + b, 0);
    const cells = [String(mine.length), ...phases.map((phase) => qexp.seconds(mean(mine, phase))), qexp.seconds(total)];
    const label = qexp.el("span", { class: "method" }, qexp.symbol(qexp.color(mine[0]), qexp.marker(mine[0])), name);
    return qexp.el("tr", {}, qexp.el("td", { class: "text" }, label), ...cells.map((text) => qexp.el("td", {}, text)));
  });
  qexp.fill("costs", qexp.el("thead", {}, qexp.el("tr", {}, ...head.map((text, i) => qexp.el("th", { class: i ? "" : "text" }, text)))), qexp.el("tbody", {}, ...body));
};
