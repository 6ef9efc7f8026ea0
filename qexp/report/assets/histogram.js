// One tensor of the selected point: its values, the range that was chosen, the levels inside it.

const find = (row, layer, site) => (qexp.data.points[row.index].histograms || []).find(([l, s]) => l === layer && s === site);

qexp.buildHistogram = (row, columns) => {
  const stored = qexp.data.points[row.index].histograms || [];
  const box = qexp.byId("box-histogram");
  qexp.byId("plot-histogram").hidden = !stored.length;
  box.hidden = !stored.length && (!columns || Boolean(qexp.data.points[row.index].none));
  if (!stored.length) {
    qexp.fill("c-histogram");
    qexp.fill("hint-histogram", `To keep this page small, histograms are embedded for ${qexp.about.histograms} of ${qexp.rows.length} points, the highest ranked first. Those of this point are in ${row.folder || row.point}/histograms.json; a page of fewer studies shows more.`);
    return;
  }
  const options = stored.map(([layer, site], i) => [String(i), `${layer} · ${site}`]);
  const pick = qexp.select("layer and site", options, "0", (value) => qexp.chooseLayer(...stored[Number(value)]));
  pick.id = "pick-layer";
  qexp.fill("c-histogram", pick);
  const sqnr = columns && columns.sqnr ? columns.sqnr : [];
  const order = sqnr.map((value, i) => [value, i]).filter(([value]) => qexp.finite(value)).sort((a, b) => a[0] - b[0]);
  const worst = order.map(([, i]) => find(row, String(columns.layer[i]), String(columns.site[i]))).find(Boolean);
  qexp.chooseLayer(...(worst || stored[0]));
};

// The row of the plan that was clicked, in the table or in a figure.
qexp.chooseRow = (i) => {
  const stored = qexp.data.points[qexp.selected].layers;
  qexp.chooseLayer(String(qexp.data.pool[stored.layer][i]), String(qexp.data.pool[stored.site][i]));
};

qexp.chooseLayer = (layer, site) => {
  for (const line of document.querySelectorAll("#plan tbody tr")) line.setAttribute("aria-selected", String(line.dataset.layer === `${layer} ${site}`));
  const row = qexp.rows[qexp.selected];
  const entry = find(row, layer, site);
  qexp.layer = [layer, site];
  if (!entry) return;
  const stored = qexp.data.points[row.index].histograms;
  qexp.byId("pick-layer").value = String(stored.indexOf(entry));
  drawHistogram(entry);
};

const levelsOf = (levels) => {
  if (!Array.isArray(levels)) return levels.at;
  const [first, last, n] = levels;
  return Array.from({ length: n }, (_, i) => first + ((last - first) * i) / (n - 1));
};

// The part of a tensor that has a scale of its own: "channel", "group"; the edges drawn are then the outermost of all parts.
const scaleOf = (layer, site) => {
  const stored = qexp.data.points[qexp.selected].layers;
  const column = (name) => (stored && stored[name] !== undefined ? qexp.data.pool[stored[name]] : []);
  const [layers, sites] = [column("layer"), column("site")];
  const i = layers.findIndex((name, k) => String(name) === layer && String(sites[k]) === site);
  const shared = String(column("granularity")[i] ?? "").split(":")[0];
  return ["channel", "group"].includes(shared) ? shared : null;
};

const drawHistogram = ([layer, site, at, low, high, stored]) => {
  const [edge, width, counts, zeros, count] = qexp.data.pool[at];
  const levels = levelsOf(stored);
  const bins = counts.map((top, i) => ({ left: edge + i * width, right: edge + (i + 1) * width, top, count: Math.round(top).toLocaleString("en") })).filter((bin) => bin.top > 0);
  for (const bin of bins) bin.span = `${qexp.number(bin.left)} to ${qexp.number(bin.right)}`;
  const edges = [low, high].filter(qexp.finite);
  const ends = [edge, edge + counts.length * width, ...edges];
  const [start, end] = [Math.min(...ends), Math.max(...ends)];
  const pad = (end - start) * 0.03 || 1;
  const figure = qexp.model("histogram");
  figure.x_range.setv({ start: start - pad, end: end + pad, reset_start: start - pad, reset_end: end + pad });
  const top = 2.5 * Math.max(1, ...counts);
  figure.y_range.setv({ start: 0.5, end: top, reset_start: 0.5, reset_end: top });
  qexp.model("cut-low").setv({ right: low ?? start, visible: qexp.finite(low) && low > edge });
  qexp.model("cut-high").setv({ left: high ?? end, visible: qexp.finite(high) && high < edge + counts.length * width });
  qexp.put("histogram-bins", qexp.columns(["left", "right", "top", "count", "span"], bins));
  qexp.put("histogram-edges", { x: edges });
  qexp.put("histogram-levels", { x: levels, alpha: levels.map(() => (levels.length > 40 ? 0.18 : 0.6)) });
  figure.below[0].axis_label = qexp.plain(`value of ${layer}, ${site}`);
  const zero = zeros > 0 && qexp.finite(count) && count > 0 ? ` ${qexp.percent((100 * zeros) / count)} are exact zeros, counted apart.` : "";
  const owner = scaleOf(layer, site);
  const word = owner ? `Ranges of all ${owner}s within` : "Range";
  const range = edges.length === 2 ? `${word} ${qexp.number(low)} to ${qexp.number(high)} (orange)` : "No range recorded";
  const outside = owner ? `each ${owner} has its own, and saturates outside that` : "what lies outside saturates";
  qexp.fill("hint-histogram", `${range}${levels.length ? `, ${levels.length} levels (green)` : ""}; ${outside}.${zero}`);
};
