"""The C++ library: its sources (src/), compiled at install if there is a compiler, and its interface."""
