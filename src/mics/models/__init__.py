"""Language models by transformers: named configurations, and modules built from them."""
