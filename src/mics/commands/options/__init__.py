"""The options of verbs whose work needs torch: what their help shows, read without it."""
