"""The rewrites, one per file. ``passes/README.md`` lists them in the order they run."""
