"""Computing one expert from its flat buffer: one function, with an implementation per device and format."""
