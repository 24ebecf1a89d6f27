"""The converted experts of a model on disk, and how they get there."""
