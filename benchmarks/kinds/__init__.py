"""What ``benchmarks/parity_table.py`` trains: models, layouts, and three ways to train each row."""
