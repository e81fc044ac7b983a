"""The steps of a compile, each a function on the run's state; ``pipeline.py`` has their order."""
