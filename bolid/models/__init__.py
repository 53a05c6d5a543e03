"""`bolid models`: the families, where their files are published, and fetching, checking and converting them."""
