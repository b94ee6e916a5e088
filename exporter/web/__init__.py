"""The endpoint: HTTP connections and their bounds, paths and formats, and who may read them."""
