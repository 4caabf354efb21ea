"""A pair of models behind a page and a JSON endpoint: questions that come at the same time are answered together."""
