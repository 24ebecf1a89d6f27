"""The demo model in the package, and the program that trained it.

`model/` is an ordinary Hugging Face folder; `moe-local chat` without a name talks to it.  Nothing here is
imported when moe-local runs.
"""
