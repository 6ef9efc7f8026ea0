// The selected point: a search's results on its tensors and plans, and its accuracy with narrow accumulators.

const pooled = (stored, names) => Object.fromEntries(names.filter((name) => stored[name] !== undefined).map((name) => [name, qexp.data.pool[stored[name]]]));
const BARS = 40;
let tried = null;  // the width the bars are drawn at
let price = "weight_bytes";

qexp.drawSearch = (row) => {
  const point = qexp.data.points[row.index];
  for (const name of ["sensitivity", "trials", "accumulator"]) qexp.byId(`box-${name}`).hidden = !point[name];
  if (point.sensitivity) buildSensitivity(point);
  if (point.trials) buildTrials(row, point.trials);
  if (point.accumulator) drawAccumulator(row, point.accumulator);
};

const buildSensitivity = (point) => {
  const columns = pooled(point.sensitivity, ["layer", "site", "bits", "divergence", "drop"]);
  const widths = [...new Set(columns.bits)].sort((a, b) => a - b);
  if (!widths.includes(tried)) tried = widths.includes(4) ? 4 : widths[0];
  qexp.fill("c-sensitivity", widths.length > 1 ? qexp.select("width of the bars", widths.map((w) => [String(w), `at ${w} bits`]), String(tried), (w) => { tried = Number(w); drawSensitivity(point, columns); }) : null);
  drawSensitivity(point, columns);
};

const drawSensitivity = (point, columns) => {
  const given = new Map();
  if (point.layers && point.layers.bits !== undefined) {
    const plan = pooled(point.layers, ["layer", "site", "bits"]);
    plan.layer.forEach((layer, i) => given.set(`${layer}|${plan.site[i]}`, plan.bits[i]));
  }
  const all = columns.layer.map((layer, i) => ({ layer: String(layer), site: String(columns.site[i]), bits: columns.bits[i], x: columns.divergence[i], lost: columns.drop ? columns.drop[i] : null }))
    .filter((bar) => bar.bits === tried && qexp.finite(bar.x)).sort((a, b) => b.x - a.x);
  const bars = all.slice(0, BARS).map((bar) => {
    const plan = given.get(`${bar.layer}|${bar.site}`);
    const words = plan === null || plan === undefined ? "" : `${plan} bits`;
    return { ...bar, y: `${bar.layer} · ${bar.site}`, color: qexp.siteColor(bar.site), bits: `${bar.bits} bits`, divergence: qexp.number(bar.x), drop: qexp.apart(qexp.rows[qexp.selected], bar.lost), given: words || "–", note: words };
  });
  const figure = qexp.model("sensitivity");
  qexp.factors(figure.y_range, bars.map((bar) => bar.y).reverse());
  figure.height = Math.max(200, 86 + 19 * bars.length);
  const most = Math.max(1e-9, ...bars.map((bar) => bar.x));
  const end = (window.innerWidth < 700 ? 1.4 : 1.1) * most;  // room for the words beside the longest bar
  figure.x_range.setv({ start: 0, end, reset_start: 0, reset_end: end });
  qexp.put("sensitivity-bars", qexp.columns(["x", "y", "color", "layer", "site", "bits", "divergence", "drop", "given", "note"], bars));
  const more = all.length > bars.length ? `, the ${bars.length} most sensitive of ${all.length}` : "";
  qexp.fill("hint-sensitivity", `Each tensor alone at ${tried} bits, all others in float${more}; blue weights, orange inputs. Beside each bar: the bits this run gives it.`);
};

const buildTrials = (row, stored) => {
  const set = (name) => { price = name; drawTrials(row, stored); };
  qexp.fill("c-trials", qexp.segment([["weight_bytes", "weight bytes"], ["bops", "bit operations"]], price, set));
  drawTrials(row, stored);
};

qexp.price = (x) => (price === "weight_bytes" ? qexp.bytes(x) : qexp.count(x));
const GOALS = { value: "score on training images", top1: "top-1 on training images (%)", agree: "agreement with float (%)", divergence: "divergence from float, lower is better" };

const drawTrials = (row, stored) => {
  const { trial, weight_bytes, bops, front, score } = pooled(stored, ["trial", "weight_bytes", "bops", "front", "score"]);
  const dots = trial.map((n, i) => ({ x: price === "bops" ? bops[i] : weight_bytes[i], y: score[i], trial: String(n), score: qexp.number(score[i], 4), weight_bytes: qexp.bytes(weight_bytes[i]), bops: qexp.count(bops[i]), front: front[i] })).filter((dot) => qexp.finite(dot.x) && qexp.finite(dot.y));
  const names = ["x", "y", "trial", "score", "weight_bytes", "bops"];
  qexp.put("trials-front", qexp.columns(names, dots.filter((dot) => dot.front)));
  qexp.put("trials-others", qexp.columns(names, dots.filter((dot) => !dot.front)));
  const figure = qexp.model("trials");
  qexp.span(figure.x_range, dots.map((dot) => dot.x));
  qexp.span(figure.y_range, dots.map((dot) => dot.y));
  figure.below[0].axis_label = price === "weight_bytes" ? "size of the packed weights" : "bit operations (MAC × bits × bits)";
  figure.left[0].axis_label = qexp.plain(GOALS[stored.goal] || String(stored.goal));
  const where = row.folder ? ` Those of the front are plans to run: ${row.folder}/front/.` : "";
  qexp.fill("hint-trials", `${dots.length} plans; of ${dots.filter((dot) => dot.front).length} none is beaten in score, size and bit operations at once.${where}`);
};

const drawAccumulator = (row, stored) => {
  const { bits, overflow, value, share } = pooled(stored, ["bits", "overflow", "value", "share"]);
  for (const kind of ["saturate", "wrap"]) {
    const dots = bits.map((x, i) => ({ x, y: value[i], kind: overflow[i], what: `${x} bits, ${overflow[i]}`, accuracy: qexp.score(row, value[i]), share: share ? `${qexp.number(share[i])} %` : "–" }));
    qexp.put(`accumulator-${kind}`, qexp.columns(["x", "y", "what", "accuracy", "share"], dots.filter((dot) => dot.kind === kind && qexp.finite(dot.y)).sort((a, b) => a.x - b.x)));
  }
  const figure = qexp.model("accumulator");
  qexp.span(figure.x_range, bits, { least: 0.5 });
  qexp.span(figure.y_range, value, { least: qexp.measure(row).share ? 0.5 : 0 });
  figure.left[0].axis_label = qexp.plain(`${row.metric_label || row.metric}${qexp.measure(row).unit ? ` (${qexp.measure(row).unit})` : ""}`);
  qexp.fill("hint-accumulator", `The integer program${row.verify_images ? ` on ${row.verify_images} images` : ""}, with a register that overflows at the end of each sum.`);
};
