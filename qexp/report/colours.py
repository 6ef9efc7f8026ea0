"""Palette, markers and typeface of the page, for its figures and for its script."""

# Okabe and Ito (2008), distinguishable with every common colour vision; black is left to the float reference.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B3A100")
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex", "star")
WEIGHT, INPUT, ALARM = "#0072B2", "#E69F00", "#D55E00"
# Stand-ins: the page replaces them by its card colour and its text colour, in light and in dark.
HALO, RING = "white", "black"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
