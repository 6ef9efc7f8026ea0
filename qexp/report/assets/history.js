// The selected point: its error, layer by layer, and the course of its quantizers during training.

qexp.drawDepth = (row) => {
  const stored = qexp.data.points[row.index].depth;
  qexp.byId("box-depth").hidden = !stored;
  if (!stored) return;
  const layers = qexp.data.pool[stored.layer].map(String);
  const fig = qexp.model("depth");
  qexp.factors(fig.y_range, [...layers].reverse());
  fig.height = Math.max(220, 100 + Math.min(19, Math.max(11, 1500 / layers.length)) * layers.length);
  const values = {};
  for (const [name, what] of [["local", "made by the layer, on float inputs"], ["total", "added up by then"]]) {
    values[name] = qexp.data.pool[stored[name]];
    const known = layers.map((layer, i) => ({ layer, x: values[name][i], value: `${qexp.number(values[name][i])} dB`, what })).filter((record) => qexp.finite(record.x));
    qexp.put(`depth-${name}`, qexp.columns(["x", "layer", "value", "what"], known));
  }
  qexp.span(fig.x_range, [0, ...values.local, ...values.total], { room: 0.04 });
  const worst = layers.map((layer, i) => [values.local[i], layer]).filter(([value]) => qexp.finite(value)).sort((a, b) => a[0] - b[0])[0];
  const norm = stored.norm ? ` Of the batch norms ${stored.norm[0]} is furthest from what arrives: means off by ${qexp.number(stored.norm[1])} deviations, deviations by ${qexp.number(stored.norm[2])}x.` : "";
  qexp.fill("hint-depth", `First layer at the top, against the same network with its quantizers off.${worst ? ` The largest error is made in ${worst[1]}, ${qexp.number(worst[0])} dB.` : ""}${norm}`);
};

const MEASURES = {
  scale: ["scale", "scale, relative to its start"], sqnr: ["SQNR", "SQNR (dB)"], saturation: ["saturation", "saturated values (%)"],
  levels_used: ["levels used", "levels used (%)"], oscillating: ["oscillating", "weights that oscillate (%)"], frozen: ["frozen", "frozen weights (%)"],
};
let measure = "scale";

qexp.buildHistory = (row) => {
  const stored = qexp.data.points[row.index].history;
  qexp.byId("box-history").hidden = !stored;
  if (!stored) return;
  const options = Object.entries(MEASURES).filter(([name]) => stored.some(([, , , values]) => values[name] !== undefined)).map(([name, [label]]) => [name, label]);
  if (!options.some(([name]) => name === measure)) measure = options[0][0];
  qexp.fill("c-history", qexp.segment(options, measure, (name) => { measure = name; drawHistory(stored); }));
  drawHistory(stored);
};

const drawHistory = (stored) => {
  const lines = stored.filter(([, , , values]) => values[measure] !== undefined).map(([layer, site, steps, values]) => ({
    name: `${layer} · ${site}`, xs: qexp.data.pool[steps], ys: qexp.data.pool[values[measure]].map((y) => (qexp.finite(y) ? y : NaN)), alpha: 0.7,
    color: qexp.siteColor(site),
  }));
  const fig = qexp.model("history");
  fig.left[0].axis_label = MEASURES[measure][1];
  qexp.put("history-lines", qexp.columns(["xs", "ys", "color", "name", "alpha"], lines));
  qexp.span(fig.x_range, lines.flatMap((line) => line.xs), { room: 0.02 });
  qexp.span(fig.y_range, lines.flatMap((line) => line.ys), { least: 0.02 });
  const last = lines.map((line) => [line.ys[line.ys.length - 1], line.name]).filter(([y]) => qexp.finite(y)).sort((a, b) => b[0] - a[0]);
  const ends = last.length ? ` At the end greatest in ${last[0][1]} (${qexp.number(last[0][0])}), least in ${last[last.length - 1][1]} (${qexp.number(last[last.length - 1][0])}).` : "";
  qexp.fill("hint-history", `One line per tensor: weights blue, inputs orange, on held-out images.${ends}`);
};
