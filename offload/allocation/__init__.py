"""How many bits each expert gets: what each format costs in error, and which assignment errs least."""
