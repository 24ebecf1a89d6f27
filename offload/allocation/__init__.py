"""Chooses how many bits each expert gets: the error of each format, and the assignment with least harm."""
