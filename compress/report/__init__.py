"""report.json, its schema, comparisons of several, and the pages and cards made from them."""
