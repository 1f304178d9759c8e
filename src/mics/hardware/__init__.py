"""GPUs, links, nodes and clusters: the catalogue, and the formulas of a link."""
