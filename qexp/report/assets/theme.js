// Figures take their text, axis and grid colours from the style sheet, so they follow light and dark.
const standIns = new Map();  // glyph -> the colour it was made with

qexp.theme = () => {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  const [ink, muted, line, card] = ["ink", "muted", "line", "card"].map(color);
  for (const root of window.Bokeh.documents[0].roots()) {
    for (const model of root.references()) {
      if (model.type.endsWith("Axis")) {
        model.setv({ axis_line_color: line, major_tick_line_color: line, major_label_text_color: muted, axis_label_text_color: muted });
      } else if (model.type === "Grid") {
        if (model.grid_line_color !== null) model.setv({ grid_line_color: line });
      } else if (model.type === "Legend") {
        model.setv({ background_fill_color: card, background_fill_alpha: 0.8, border_line_color: null, label_text_color: ink });
      } else if (model.type === "Quad") {
        model.fill_color = { value: qexp.shade("#0072B2") };
      } else if (model.type === "Scatter") {
        if (!standIns.has(model)) standIns.set(model, model.line_color.value);
        const color = { white: card, black: ink }[standIns.get(model)];
        if (color) model.line_color = { value: color };
      }
    }
  }
};
