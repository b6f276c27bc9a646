"""From text to tokens: sources, data sets, tables, documents, and the windows drawn from them."""
