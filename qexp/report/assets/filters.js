// The bar at the top: methods as chips that are the legend of every figure too, and the other filters.

qexp.buildFilters = () => {
  const chips = qexp.series.map((name) => {
    const sample = qexp.rows.find((row) => row.series === name);
    const press = () => {
      const off = qexp.filter.off;
      if (off.has(name)) off.delete(name); else off.add(name);
      chip.setAttribute("aria-pressed", String(!off.has(name)));
      qexp.refresh();
    };
    const marker = qexp.networks.length > 1 ? "circle" : qexp.marker(sample);
    const chip = qexp.el("button", { type: "button", class: "chip", "aria-pressed": String(!qexp.filter.off.has(name)), onclick: press }, qexp.symbol(qexp.color(sample), marker), name);
    return chip;
  });
  const networks = qexp.networks.length > 1 ? qexp.networks : [];
  const shapes = networks.map((name) => qexp.el("span", { class: "shape" }, qexp.symbol("currentColor", qexp.marker({ network: name })), name));
  qexp.fill("methods", ...chips, ...shapes);
  const selects = ["study", "model", "dataset", "schedule", "status"].filter((name) => qexp.distinct(name).length > 1).map((name) => {
    const options = [["", `any ${name}`], ...qexp.distinct(name).map((value) => [String(value), String(value)])];
    return qexp.select(name, options, qexp.filter[name], (value) => { qexp.filter[name] = value; qexp.refresh(); });
  });
  const search = qexp.el("input", { type: "search", value: qexp.filter.text, placeholder: "Search …", "aria-label": "search", oninput: () => { qexp.filter.text = search.value.trim(); qexp.refresh(); } });
  qexp.fill("filters", ...selects, search);
};

qexp.buildHead = () => {
  const ok = qexp.rows.filter((row) => row.status === "ok");
  const failed = qexp.rows.length - ok.length;
  const models = qexp.distinct("model"), datasets = qexp.distinct("dataset");
  const list = (names) => (names.length > 4 ? `${names.slice(0, 3).join(", ")} and ${names.length - 3} more` : names.join(", "));
  qexp.fill("subtitle", `${list(models)} on ${list(datasets)} · ${qexp.about.made}`);
  const stat = (name, value, note) => qexp.el("div", { class: "stat" }, qexp.el("span", { class: "name" }, name), qexp.el("b", {}, value), qexp.el("span", {}, note));
  const stats = [stat("Points", String(qexp.rows.length), failed ? `${ok.length} ok, ${failed} failed` : "all ok")];
  const floats = qexp.references(ok);
  if (floats.length) {
    const values = floats.map((f) => f.value);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const images = ok.find((row) => row.n_eval);
    const note = `${qexp.metricName()}${images && floats.length === 1 ? `, ${images.n_eval.toLocaleString("en")} images` : ""}`;
    stats.unshift(stat("Float", low === high ? qexp.score(floats[0], low) : `${qexp.plainScore(floats[0], low)} – ${qexp.score(floats[0], high)}`, note));
  }
  for (const margin of [1, 5]) {
    if (!ok.every((row) => qexp.measure(row).share)) break;  // only shares have a known scale
    const near = ok.filter((row) => qexp.finite(row.drop) && row.drop <= margin && qexp.finite(row.weight_bytes));
    if (!near.length || floats.length !== 1) continue;
    const best = near.reduce((a, b) => (b.weight_bytes < a.weight_bytes || (b.weight_bytes === a.weight_bytes && qexp.better(b, a)) ? b : a));
    const ratio = best.weight_bytes_float ? `, ${qexp.number(best.weight_bytes_float / best.weight_bytes, 2)}× smaller` : "";
    stats.push(stat(`Smallest within ${margin} point${margin > 1 ? "s" : ""}`, best.width, `${best.series}, ${qexp.score(best, best.value)}, ${qexp.bytes(best.weight_bytes)}${ratio}`));
  }
  const time = qexp.rows.map(qexp.total).filter(qexp.finite).reduce((a, b) => a + b, 0);
  const searched = qexp.rows.some((row) => qexp.finite(row.seconds_search)) ? " search," : "";
  stats.push(stat("Compute", qexp.seconds(time), `calibration,${searched} training, evaluation`));
  qexp.fill("stats", ...stats);
  const { skipped } = qexp.about;
  if (skipped.length) {
    const items = skipped.slice(0, 10).map((text) => qexp.el("li", {}, text));
    qexp.fill("notes", qexp.el("div", { class: "callout bad" }, qexp.el("b", {}, `${skipped.length} point${skipped.length > 1 ? "s" : ""} left out: metrics.json cannot be read`), qexp.el("ul", {}, ...items)));
  }
};

// One entry per float network that visible points are compared with: its float score, or the mean over seeds where each has its own.
qexp.references = (rows) => {
  const own = (row) => ["study", "model", "dataset", "metric", "weights", "reference", "n_eval"].map((name) => row[name] ?? "").join("|");
  const shown = new Set(rows.filter((row) => qexp.finite(row.value_float)).map(own));
  const mine = qexp.data.references.filter((one) => shown.has(own(one)));
  const apart = ["model", "dataset", "weights", "n_eval"].filter((name) => qexp.distinct(name, mine).length > 1);
  return mine.map((one) => ({
    is_share: one.is_share, unit: one.unit, higher_is_better: one.higher_is_better, value: one.mean, low: one.ci_low, high: one.ci_high, n: one.n, what: one.reference || "float",
    names: apart.map((name) => (name === "n_eval" ? `on ${one[name]} images` : one[name])).filter((name) => name !== undefined),
  }));
};
