"""A cluster on one Linux machine: network namespaces as nodes, links of a chosen rate."""
