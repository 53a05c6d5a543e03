"""The only place that knows a terminal: one file per command, named like its twin in bolid/."""
