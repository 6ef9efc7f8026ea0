// The selected point: its settings, its problems, its layers, one tensor's range, its training.

const plan = (row) => {
  const stored = qexp.data.points[row.index].layers;
  return stored ? Object.fromEntries(Object.entries(stored).map(([name, at]) => [name, qexp.data.pool[at]])) : null;
};
const names = (columns) => columns.layer.map((layer) => String(layer));
qexp.siteColor = (site) => (String(site).startsWith("weight") ? qexp.shade(qexp.about.sites.weight) : String(site).startsWith("input") ? qexp.about.sites.input : "#009E73");
const siteMarker = (site) => (String(site).startsWith("weight") ? "circle" : String(site).startsWith("input") ? "square" : "triangle");

qexp.drawPoint = () => {
  const row = qexp.rows[qexp.selected];
  qexp.byId("point").hidden = !row;
  if (!row) return;
  qexp.fill("h-point", `${row.series} ${row.width}`, ...(row.status === "ok" ? [] : [qexp.el("span", { class: "mark bad" }, "failed")]));
  const step = (by) => () => {
    const at = qexp.order.indexOf(qexp.selected);
    const next = qexp.order[(at + by + qexp.order.length) % qexp.order.length];
    if (next !== undefined) qexp.choose(next, true);
  };
  qexp.fill("c-point", qexp.el("button", { class: "button", type: "button", onclick: step(-1) }, "← previous"), qexp.el("button", { class: "button", type: "button", onclick: step(1) }, "next →"));
  drawSummary(row);
  const columns = plan(row);
  for (const box of ["box-sqnr", "box-saturation", "box-plan"]) qexp.byId(box).hidden = !columns;
  if (columns) { drawLayers(columns); drawPlan(columns); }
  qexp.layer = null;
  qexp.buildHistogram(row, columns);
  drawCurves(row);
  qexp.drawSearch(row);
  qexp.drawDepth(row);
  qexp.buildHistory(row);
};

const drawSummary = (row) => {
  const fact = (name, value) => (value === undefined || value === null || value === "–" ? null : qexp.el("div", {}, qexp.el("dt", {}, name), qexp.el("dd", {}, value)));
  const interval = qexp.finite(row.ci_low) ? `${qexp.plainScore(row, row.ci_low)} – ${qexp.score(row, row.ci_high)}${row.interval ? `, ${row.interval}` : ""}` : undefined;
  const main = [
    fact(qexp.metricName(), qexp.finite(row.value) ? qexp.score(row, row.value) : undefined), fact("95 % interval", interval),
    fact(row.reference || "float", qexp.finite(row.value_float) ? qexp.score(row, row.value_float) : undefined),
    fact(qexp.measure(row).sign > 0 ? "below float" : "worse than float", qexp.finite(row.drop) ? qexp.apart(row, row.drop) : undefined),
    fact("rank", row.rank_low ? `${qexp.rankText(row)}${qexp.nearBest(row) ? " (within noise of the best)" : ""}` : undefined),
    fact("model", row.model), fact("data set", row.dataset), fact("schedule", row.schedule), fact("seed", row.seed === undefined ? undefined : String(row.seed)),
    fact("weights", qexp.finite(row.weight_bytes) ? qexp.bytes(row.weight_bytes) : undefined), fact("bit operations", qexp.finite(row.bops) ? qexp.count(row.bops) : undefined),
    fact("integers", row.verify ? `${row.verify === "equal" ? "equal to the simulation" : "DIFFERENT from the simulation"} on ${row.verify_images} images` : undefined),
    fact("codes that real scales round otherwise", qexp.finite(row.verify_codes_differ_real_scales) ? qexp.percent(row.verify_codes_differ_real_scales) : undefined),
    fact("started from", row.weights), fact("folder", row.folder ? qexp.el("a", { href: row.folder.split("/").map(encodeURIComponent).join("/") + "/config.yaml" }, row.point) : row.point),
    fact("time", qexp.seconds(qexp.total(row))),
  ];
  const shown = new Set(["series", "network", "extra", "index", "width", "folder", "pages", "error", "diagnosis", "rank_low", "rank_high", "value", "value_float", "drop", "ci_low", "ci_high", "model", "dataset", "schedule", "seed", "status"]);
  const written = (value) => (typeof value === "object" ? JSON.stringify(value) : qexp.finite(value) ? qexp.number(value, 5) : String(value));
  const rest = Object.entries(row).filter(([name]) => !shown.has(name)).map(([name, value]) => fact(name, written(value)));
  const link = (file) => qexp.el("a", { href: `${row.folder.split("/").map(encodeURIComponent).join("/")}/${file}` }, file);
  const files = row.folder ? [fact("files", qexp.el("span", {}, link("config.yaml"), " · ", link("log.txt"), " · ", link("layers.csv"), ...(row.verify ? [" · ", link("integer.csv"), " · ", link("integer/program.json")] : [])))] : [];
  if (row.folder && row.pages) main.push(fact("see", qexp.el("span", {}, ...row.pages.split(" ").flatMap((page, i) => [i ? " · " : "", link(page)]))));
  const lines = [].concat(row.diagnosis || []);
  qexp.fill("summary", qexp.el("dl", { class: "facts" }, ...main.filter(Boolean)),
    lines.length ? qexp.el("div", { class: "callout" }, qexp.el("b", {}, "Diagnosis"), qexp.el("ul", {}, ...lines.map((line) => qexp.el("li", {}, String(line))))) : null,
    qexp.el("details", {}, qexp.el("summary", {}, "Everything recorded"), qexp.el("dl", { class: "facts" }, ...[...rest, ...files].filter(Boolean))));
  qexp.fill("failure", row.error ? qexp.el("div", { class: "callout bad" }, qexp.el("b", {}, "It failed with"), qexp.el("pre", {}, String(row.error))) : null);
};

// The codes of each tensor, one measure at a time.
const USES = {
  saturation: ["saturation", "%", "saturated values (%)", "Share of values outside the chosen range."],
  levels: ["codes used", "%", "codes that occur (%)", "Share of the codes a tensor may use that occur at all, on the calibration images."],
  entropy: ["entropy", "bits", "entropy of the codes (bits)", "What a code carries: as many bits as it has where all codes are equally frequent, less where few do the work."],
};
let use = "saturation";
const useOf = (columns, name) => (name === "levels" ? (columns.levels_used || []).map((used, i) => (qexp.finite(used) && columns.levels && columns.levels[i] ? (100 * used) / columns.levels[i] : null)) : columns[name] || []);
const buildUse = (columns) => {
  const options = Object.keys(USES).filter((name) => useOf(columns, name).some(qexp.finite));
  const shown = options.includes(use) ? use : options[0] || "saturation";
  qexp.fill("c-saturation", options.length > 1 ? qexp.segment(options.map((name) => [name, USES[name][0]]), shown, (name) => { use = name; drawLayers(columns); }) : null);
  const figure = qexp.model("saturation");
  figure.below[0].axis_label = USES[shown][2];
  qexp.fill("hint-saturation", USES[shown][3]);
  return shown;
};

const drawLayers = (columns) => {
  const layers = [...new Set(names(columns))];
  const height = Math.max(200, 86 + Math.min(19, Math.max(11, 1500 / layers.length)) * layers.length);
  const sites = [...new Set(columns.site.map(String))];
  qexp.fill("legend-sites", ...sites.map((site) => qexp.el("span", {}, qexp.symbol(qexp.siteColor(site), siteMarker(site)), site)));
  const shift = (site) => 0.3 * ((sites.indexOf(String(site)) + 0.5) / sites.length - 0.5);  // sites side by side
  const records = columns.layer.map((layer, i) => ({
    y: [String(layer), shift(columns.site[i])], index: i, layer: String(layer), site: String(columns.site[i]), color: qexp.siteColor(columns.site[i]), marker: siteMarker(columns.site[i]),
    zero: 0, bits: columns.bits ? String(columns.bits[i] ?? "float") : "–", rule: columns.range ? String(columns.range[i] ?? "–") : "–",
    range: columns.low && columns.high && columns.low[i] !== null ? `${qexp.number(columns.low[i])} to ${qexp.number(columns.high[i])}` : "–",
  }));
  const fields = ["x", "y", "zero", "color", "marker", "index", "layer", "site", "bits", "value", "rule", "range"];
  qexp.factors(qexp.model("sqnr").y_range, [...layers].reverse());
  const use = buildUse(columns);
  for (const [name, unit, values] of [["sqnr", "dB", columns.sqnr || []], ["saturation", USES[use][1], useOf(columns, use)]]) {
    const known = records.filter((record) => qexp.finite(values[record.index])).map((record) => ({ ...record, x: values[record.index], value: `${qexp.number(values[record.index])} ${unit}` }));
    qexp.put(`${name}-dots`, qexp.columns(fields, known));
    qexp.model(name).height = height;
    qexp.span(qexp.model(name).x_range, [0, ...known.map((record) => record.x)], { room: 0.04 });
    qexp.byId(`box-${name}`).hidden = !known.length;
  }
  const worst = records.filter((record) => qexp.finite((columns.sqnr || [])[record.index])).sort((a, b) => columns.sqnr[a.index] - columns.sqnr[b.index])[0];
  qexp.fill("hint-sqnr", worst ? `Lowest: ${worst.layer} ${worst.site}, ${qexp.number(columns.sqnr[worst.index])} dB. Click a dot to see its range.` : "No errors were recorded.");
};

const LABELS = { sqnr: "SQNR (dB)", norm1: "norm-1 error (%)", saturation: "saturation (%)", entropy: "entropy (bits)", range: "range rule", rule: "decided by", zero_point: "zero point", levels_used: "levels used", macs: "MACs", bops: "bit operations" };
const WORDS = new Set(["layer", "site", "quantizer", "granularity", "signed", "range", "rule"]);
const BIG = new Set(["weights", "macs", "bops"]);

const drawPlan = (columns) => {
  const others = Object.keys(columns).filter((name) => name !== "sqnr" && !(name === "levels" && columns.levels_used));
  // what one looks for stands beside the bits, since wide tables scroll
  const shown = columns.sqnr ? others.flatMap((name) => (name === "bits" ? [name, "sqnr"] : [name])) : others;
  const head = shown.map((name) => qexp.el("th", { class: WORDS.has(name) ? "text" : "" }, LABELS[name] || name.replace("_", " ")));
  const low = Math.min(...(columns.sqnr || []).filter(qexp.finite));
  const cell = (name, i) => {
    const value = columns[name][i];
    if (value === null || value === undefined) return "–";
    if (BIG.has(name)) return qexp.count(value);
    if (name === "levels_used" && columns.levels && columns.levels[i]) {
      const bar = qexp.el("span", { class: "use" }, qexp.el("i", { style: `width:${Math.min(100, (100 * value) / columns.levels[i])}%` }));
      return qexp.el("span", {}, `${value} of ${columns.levels[i]}`, bar);
    }
    if (name === "sqnr" && value === low) return qexp.el("b", { class: "bad" }, qexp.number(value));
    return qexp.finite(value) ? qexp.number(value) : WORDS.has(name) ? String(value) : qexp.numbers(value);
  };
  const body = columns.layer.map((layer, i) => {
    const open = () => { qexp.chooseRow(i); qexp.byId("box-histogram").scrollIntoView({ block: "nearest" }); };
    return qexp.el("tr", { onclick: open, "data-layer": `${layer} ${columns.site[i]}` }, ...shown.map((name) => qexp.el("td", { class: WORDS.has(name) ? "text long" : "", title: WORDS.has(name) ? columns[name][i] : null }, cell(name, i))));
  });
  qexp.fill("plan", qexp.el("thead", {}, qexp.el("tr", {}, ...head)), qexp.el("tbody", {}, ...body));
  qexp.fill("hint-plan", `${columns.layer.length} quantized tensors`);
};

const drawCurves = (row) => {
  const stored = qexp.data.points[row.index].curves || {};
  const family = (name) => (/loss/i.test(name) ? "loss" : (row.metric && name.endsWith(`_${row.metric}`)) || /top|acc|map/i.test(name) ? "score" : "rate");
  const lines = { loss: [], score: [], rate: [] };
  for (const [name, [x, y]] of Object.entries(stored)) {
    const mine = lines[family(name)];
    mine.push({ name, xs: qexp.data.pool[x], ys: qexp.data.pool[y], color: qexp.paint(mine.length), dash: "solid" });
  }
  qexp.byId("box-curves").hidden = !Object.keys(stored).length;
  for (const [name, mine] of Object.entries(lines)) {
    qexp.byId(`box-${name}`).hidden = !mine.length;
    qexp.span(qexp.model(name).x_range, mine.flatMap((line) => line.xs), { room: 0.02 });
    qexp.span(qexp.model(name).y_range, mine.flatMap((line) => line.ys));
    qexp.put(`${name}-lines`, qexp.columns(["xs", "ys", "color", "name", "dash"], mine));
  }
};
