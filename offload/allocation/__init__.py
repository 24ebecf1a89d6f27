"""How many bits each expert gets: what each format costs in error, measured, and the best assignment of it."""
