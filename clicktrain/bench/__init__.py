"""Side-by-side measurements: interleaved in one process, medians, ratios."""
