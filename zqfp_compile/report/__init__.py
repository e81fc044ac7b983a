"""The report: what a compile cost in accuracy and what it gained in size, as data, JSON and one HTML page."""
