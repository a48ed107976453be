"""Data of other people, fetched by package name and turned into JSON Lines."""
