"""Every byte that crosses from one command to another: one module per file format."""
