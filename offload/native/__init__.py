"""The C++ library: sources in src/, compiled at install where there is a compiler, and how it is called."""
