"""Parts of the report: reading a run folder, and the page made of it."""
